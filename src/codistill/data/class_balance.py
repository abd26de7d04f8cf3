"""Draws that are balanced over classes: a part of every class, and epochs in which classes are equally frequent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def balanced_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return a mask of about `fraction` of every class; each class keeps at least one sample on either side."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        mask[rng.permutation(members)[: max(count, 0)]] = True
    return mask


def balanced_order(labels: np.ndarray, rng: torch.Generator) -> Tensor:
    """Draw an epoch of as many places as there are labels, in which classes are equally frequent (to one place).

    Within a class no image comes a second time before all of them have come once.

    Args:
        labels: int64 array `N`.
        rng: What the draw depends on.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    places = np.full(len(members), len(labels) // len(members))
    places[torch.randperm(len(members), generator=rng)[: len(labels) % len(members)].numpy()] += 1
    chosen = []
    for own, count in zip(members, places):
        rounds = [torch.randperm(len(own), generator=rng) for _ in range(-(-int(count) // len(own)))]
        chosen.append(torch.from_numpy(own)[torch.cat(rounds)[: int(count)]])
    everything = torch.cat(chosen)
    return everything[torch.randperm(len(everything), generator=rng)]
