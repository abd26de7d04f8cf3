"""Sharing out the samples of a batch among processes. No torch."""

from __future__ import annotations


def share_out(count: int, num_shares: int) -> list[int]:
    """Return how many of `count` samples each share gets: as equal as can be, but never a single one.

    A single sample leaves BatchNorm nothing to normalize where a network's maps are 1 x 1. So a batch of fewer than two
    samples a share goes to the first shares, and the others get none; one sample alone goes to the first share.

    >>> share_out(7, 3), share_out(3, 2), share_out(1, 2)
    ([3, 2, 2], [3, 0], [1, 0])
    """
    used = max(min(num_shares, count // 2), 1)
    return [count // used + (share < count % used) for share in range(used)] + [0] * (num_shares - used)
