"""Random draws balanced over classes: parts of every class, epochs with equally frequent classes, batches of pairs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codistill.utils import InputError


def balanced_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a mask of about `fraction` of every class; each class has at least one sample inside and one outside."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        mask[rng.permutation(members)[: max(count, 0)]] = True
    return mask


def balanced_order(labels: np.ndarray, rng: torch.Generator) -> Tensor:
    """Draw an epoch of N indices in which classes are equally frequent (their counts differ by 1 at most).

    No image is drawn again before all images of its class have been drawn.

    Args:
        labels: int64 array `N`.
        rng: Random state of the draw.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = np.full(len(members), len(labels) // len(members))
    counts[torch.randperm(len(members), generator=rng)[: len(labels) % len(members)].numpy()] += 1
    chosen = []
    for images, count in zip(members, counts):
        rounds = [torch.randperm(len(images), generator=rng) for _ in range(-(-int(count) // len(images)))]
        chosen.append(torch.from_numpy(images)[torch.cat(rounds)[: int(count)]])
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=rng)]


def check_class_batches(labels: np.ndarray, batch_size: int, count: int) -> None:
    """Check that batches of `count` images of each of `batch_size / count` classes can be drawn.

    Args:
        labels: int64 array `N`.
        batch_size: Images of a batch, a multiple of `count`.
        count: Images of each class.

    Raises:
        InputError: there are fewer classes, or a class has fewer images.
    """
    sizes = np.bincount(labels)
    smallest, num_classes = int(sizes[sizes > 0].min()), int((sizes > 0).sum())
    if smallest < count:
        raise InputError(
            f"--sampler pairs:{count}: a class has only {smallest} training image{'s' * (smallest > 1)}; give "
            + (f"pairs:{smallest}" if smallest > 1 else "uniform, or add images to it")
        )
    if batch_size // count > num_classes:
        raise InputError(
            f"--sampler pairs:{count} --batch-size {batch_size} needs {batch_size // count} classes, and the training "
            f"images have {num_classes}; give --batch-size {num_classes * count}, or more images of each class"
        )


def draw_class_batches(labels: np.ndarray, batch_size: int, count: int, rng: torch.Generator) -> Tensor:
    """Draw the batches of an epoch, each of `count` images of each of `batch_size / count` classes.

    Classes and, within a class, images are drawn without replacement within a batch, and anew for every batch: an image
    can be drawn several times in an epoch, or not at all. All classes that have images are equally likely.

    Args:
        labels: int64 array `N`; see `check_class_batches`.
        batch_size: Images of a batch.
        count: Images of each class.
        rng: Random state of the draw.

    Returns:
        Indices, batch after batch, those of a class side by side: as many whole batches as N images fill.
    """
    num_batches, num_drawn = len(labels) // batch_size, batch_size // count
    members = torch.from_numpy(np.argsort(labels, kind="stable"))  # class after class
    sizes = np.bincount(labels)
    sizes_C = torch.from_numpy(sizes[sizes > 0])
    starts_C = sizes_C.cumsum(0) - sizes_C
    classes = (
        torch.rand(num_batches, len(sizes_C), generator=rng, dtype=torch.float64).argsort(1)[:, :num_drawn].flatten()
    )
    drawn = _draw_without_replacement(sizes_C[classes], count, rng)
    return members[(starts_C[classes].unsqueeze(1) + drawn).flatten()]


def _draw_without_replacement(sizes_S: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return `count` different numbers below each of the sizes, `S x count`."""
    drawn = torch.empty(len(sizes_S), 0, dtype=torch.int64)
    for k in range(count):
        # One of the numbers that are left, counted past those that are taken.
        number_S = (torch.rand(len(sizes_S), generator=rng, dtype=torch.float64) * (sizes_S - k)).long()
        for taken_S in drawn.sort(1).values.unbind(1):
            number_S = number_S + (number_S >= taken_S)
        drawn = torch.cat((drawn, number_S.unsqueeze(1)), 1)
    return drawn
