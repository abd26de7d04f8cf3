"""The base of the loaders: order, batches and normalization.

Order and augmentation depend on (seed, epoch) alone: a run that is resumed within an epoch continues exactly.
Shapes: N images, V views, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codistill.data.auto_augment import draw_erasing, outside_rectangle
from codistill.data.class_balance import balanced_order, check_class_batches, draw_class_batches
from codistill.utils import share_out


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn for every sample, view and epoch."""

    pad: int = 0
    """Pixels of zero padding for random crops, of images in memory."""
    flip: bool = False
    cutout: int = 0
    """Side of the square that is replaced by the mean, in pixels; 0: none."""
    resized_crop: bool = False
    """Crop a part of random position, size and aspect ratio, of image files."""
    policy: str = "none"
    """randaugment or trivialaugment (see `codistill.data.auto_augment`)."""
    erasing: float = 0.0
    """Probability that a rectangle is replaced by the mean."""

    def draws_for_device(self, size: int, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw what is done to normalized images, for one view of every sample of an epoch.

        Args:
            size: Side of the images.
            count: Samples.
            rng: Random numbers.
        """
        draws: dict[str, Tensor] = {}
        if self.cutout:
            draws["cut_y"] = torch.randint(size, (count,), generator=rng)
            draws["cut_x"] = torch.randint(size, (count,), generator=rng)
        return draws | (draw_erasing(self.erasing, count, size, rng) if self.erasing else {})


@dataclass(frozen=True)
class LoaderOptions:
    """Options of every loader."""

    batch_size: int
    """Samples per batch; the last one is smaller where N is no multiple, and of a training set never a single sample:
    that joins the batch before it, as BatchNorm needs more than one."""
    augmentation: Augmentation | None = None
    """Changes of training images; None for evaluation, where the order is kept too."""
    views: int = 1
    """Views per sample, each with its own draw."""
    seed: int = 0
    """Seed of order and augmentation."""
    balanced: bool = False
    """Draw every class equally often in an epoch, which keeps its length."""
    images_per_class: int = 0
    """Make every batch of this many images of each of some classes, drawn anew (`draw_class_batches`); 0: uniform."""
    device: torch.device | str = "cpu"
    """Device of the batches."""
    dtype: torch.dtype = torch.float32
    """Dtype of the batches."""
    channels_last: bool = True
    """Memory format of the batches."""


class Loader:
    """Base of the loaders, which yield `(views_VBCHW, targets_B)`, normalized.

    Args:
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        options: Everything else.
    """

    skipped: dict[str, str]
    """Files that could not be read and were replaced, and why."""

    def __init__(
        self, labels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], options: LoaderOptions
    ) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.labels_N = torch.from_numpy(labels).to(self.device)
        self._labels = labels
        if options.images_per_class:
            check_class_batches(labels, options.batch_size, options.images_per_class)
        self.skipped = {}
        self._shard: tuple[int, int] | None = None
        self._local_views = slice(None)
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale = 1.0 / (255.0 * np.asarray(std, dtype=np.float64))
        self.scale_C = torch.tensor(scale).to(options.dtype).to(self.device)
        self.shift_C = torch.tensor(-np.asarray(mean) / np.asarray(std)).to(options.dtype).to(self.device)

    def shard(self, index: int, num_shards: int, local_views: range) -> None:
        """Yield from now on only shard `index` of each batch's images, with all of its labels.

        Everything is drawn as before, for the whole batch and all views, so that the shards make up the same batch.

        Args:
            index: Number of the shard; a shard without any sample of a batch gets the batch's first two.
            num_shards: Number of shards; their sizes as `share_out` says.
            local_views: The views to yield, where there is one per peer.
        """
        self._shard = index, num_shards
        if self.options.views > 1:
            self._local_views = slice(local_views.start, local_views.stop)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        count = -(-self.num_samples // self.options.batch_size)
        return count - self._has_single_rest()

    @property
    def num_samples(self) -> int:
        """Number of images of an epoch: N, or as many as fill whole batches of `images_per_class`."""
        count = len(self.labels_N)
        return count - count % self.options.batch_size if self.options.images_per_class else count

    @property
    def largest_batch(self) -> int:
        """Images in the largest batch of an epoch."""
        return max(batch.stop - batch.start for batch in self._batch_slices(max(len(self) - 2, 0)))

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        raise NotImplementedError

    def sample_batch(self) -> Tensor:
        """Return a batch of views `V x B x C x H x W` for trial runs; no draw of any epoch depends on it."""
        raise NotImplementedError

    def _batch_slices(self, start: int) -> Iterator[slice]:
        """Yield the positions of every batch in the epoch, from batch number `start` on."""
        size, count = self.options.batch_size, len(self)
        for number in range(start, count):
            yield slice(number * size, self.num_samples if number == count - 1 else (number + 1) * size)

    def _has_single_rest(self) -> bool:
        """Return whether the last batch would be one sample, which joins the one before (only of training images).

        The rule depends on N and the batch size alone, so that all ranks and a resumed run have the same batches.
        """
        size = self.options.batch_size
        return self.options.augmentation is not None and 1 < size < self.num_samples and self.num_samples % size == 1

    def _local_slice(self, batch: slice) -> slice:
        """Return the positions of this process's shard of a batch."""
        if self._shard is None:
            return batch
        index, num_shards = self._shard
        counts = share_out(batch.stop - batch.start, num_shards)
        first = batch.start + sum(counts[:index])
        return (
            slice(first, first + counts[index])
            if counts[index]
            else slice(batch.start, min(batch.start + 2, batch.stop))
        )

    def _generator(self, epoch: int) -> torch.Generator:
        # On the CPU whatever the device, so that every machine sees the same samples.
        return torch.Generator().manual_seed((self.options.seed * 100_003 + epoch) % 2**63)

    def _order(self, rng: torch.Generator) -> Tensor:
        """Draw the indices of the samples in an epoch, in order."""
        options = self.options
        if options.images_per_class:
            return draw_class_batches(self._labels, options.batch_size, options.images_per_class, rng)
        if options.balanced:
            return balanced_order(self._labels, rng)
        return torch.randperm(self.num_samples, generator=rng)

    def _normalize(self, pixels_VBHWC: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Return `V x B x C x H x W` from raw pixels, with the squares and rectangles of `draws_for_device` cut out."""
        # Row by row (channels alone are too short to vectorize), and in place: together less than half of the time.
        width = pixels_VBHWC.shape[-2]
        x = pixels_VBHWC.flatten(-2).to(self.options.dtype)
        torch.addcmul(self.shift_C.repeat(width), x, self.scale_C.repeat(width), out=x)
        x = x.unflatten(-1, (width, -1))
        augmentation = self.options.augmentation
        if "cut_y" in draws and augmentation is not None:
            x = x * _outside_square(draws["cut_y"], draws["cut_x"], augmentation.cutout, x.shape[2]).to(x.dtype)
        if "erase_top" in draws:
            x = x * outside_rectangle(draws, *x.shape[2:4]).to(x.dtype)
        x = x.movedim(-1, 2)
        # Through a flat view: one channel is contiguous in both orders, and its strides would still say channels_last.
        return x if self.options.channels_last else x.contiguous().flatten().view(x.shape)


def _outside_square(y_VB: Tensor, x_VB: Tensor, side: int, size: int) -> Tensor:
    """Return a mask `V x B x H x W x 1` that is False in the square of `side` pixels around each center."""
    position = torch.arange(size, device=y_VB.device)
    low, high = side // 2, side - side // 2
    in_y = (position >= y_VB.unsqueeze(-1) - low) & (position < y_VB.unsqueeze(-1) + high)
    in_x = (position >= x_VB.unsqueeze(-1) - low) & (position < x_VB.unsqueeze(-1) + high)
    return ~(in_y.unsqueeze(-1) & in_x.unsqueeze(-2)).unsqueeze(-1)
