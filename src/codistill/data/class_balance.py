"""Random draws balanced over classes: a fraction of every class, and epochs with equally frequent classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
