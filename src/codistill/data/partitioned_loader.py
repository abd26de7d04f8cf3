"""Batches of disjoint parts of the training images, one part for each peer.

Shapes: N images, P parts, V views (one per part here), B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from codistill.data.loader import Loader


def divide_images(labels: np.ndarray, num_parts: int, seed: int) -> list[np.ndarray]:
    """Return the indices of the images of each part, all parts of one size.

    The images are shuffled, and the last N mod P of them are in no part. The others are sorted by class and dealt to
    the parts in turn, so that a class's counts differ by one at most between parts.

    Args:
        labels: Class numbers, `N`.
        num_parts: P.
        seed: Of the shuffle.

    >>> [part.tolist() for part in divide_images(np.array([0, 0, 1, 1, 1]), 2, seed=0)]
    [[0, 4], [2, 3]]
    """
    shuffled = np.random.default_rng((seed, 8_009)).permutation(len(labels))
    shuffled = shuffled[: len(labels) - len(labels) % num_parts]
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(by_class[part::num_parts]) for part in range(num_parts)]


def part_seed(seed: int, part: int) -> int:
    """Return the seed of a part's order and augmentation."""
    return int(np.random.SeedSequence((seed, 8_009, part)).generate_state(1)[0])


class PartitionedLoader(Loader):
    """Loaders of the parts side by side: yields `(views_PBCHW, targets_PB)`, view p with images of part p.

    Args:
        parts: Loaders of one view, of equally many images.
    """

    def __init__(self, parts: Sequence[Loader]) -> None:
        self.parts, self.local = list(parts), range(len(parts))
        first = self.parts[0]
        self.options, self.device = first.options, first.device
        self.scale_C, self.shift_C = first.scale_C, first.shift_C

    def shard(self, index: int, num_shards: int, local_views: range) -> None:
        """Yield only shard `index` of each batch's images and only some parts; see `Loader.shard`.

        The rows of the other parts' targets are not used by this process, and repeat those of its first part.
        """
        self.local = local_views
        for part in self.parts:
            part.shard(index, num_shards, range(1))

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def num_samples(self) -> int:
        """Number of images that each part shows in an epoch."""
        return self.parts[0].num_samples

    @property
    def largest_batch(self) -> int:
        """Images of a part in the largest batch of an epoch."""
        return self.parts[0].largest_batch

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        rows = [self.local.index(p) if p in self.local else 0 for p in range(len(self.parts))]
        for batches in zip(*(self.parts[p].epoch(epoch, start) for p in self.local), strict=True):
            views, targets = zip(*batches, strict=True)
            yield self._join(views), torch.stack([targets[row] for row in rows])

    def sample_batch(self) -> Tensor:
        """Return a batch of views `P x B x C x H x W` for trial runs; see `Loader.sample_batch`."""
        return self._join([self.parts[p].sample_batch() for p in self.local])

    def _join(self, views: Sequence[Tensor]) -> Tensor:
        """Return all views as one tensor, in their memory format (which torch.cat keeps for four axes only)."""
        if not self.options.channels_last:
            return torch.cat(list(views))
        return torch.cat([view.movedim(2, -1) for view in views]).movedim(-1, 2)
