"""What loaders have in common, and batches from uint8 images that live on the device: all work on them is batched.

Order and augmentation depend on (seed, epoch) alone: a run that is resumed in mid-epoch continues exactly.
Shapes: N images, V views, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codistill.data.class_balance import balanced_order


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for every sample, view and epoch."""

    pad: int = 0
    """Pixels of zero padding for random crops, of images in memory."""
    flip: bool = False
    cutout: int = 0
    resized_crop: bool = False
    """A part of the image at a random place, size and aspect ratio, of image files."""


class Loader:
    """What loaders have in common: they yield `(views_VBCHW, targets_B)`, normalised, in the dtype asked for.

    Args:
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        batch_size: Samples a batch; the last one is smaller where N is no multiple.
        augmentation: What to vary; `None` for evaluation, where the order is kept too.
        views: Views a sample, each with a draw of its own.
        seed: Seed of order and augmentation.
        balanced: Draw every class equally often in an epoch, which keeps its length.
        device: Where the batches live.
        dtype: Of the batches.
        channels_last: Memory format of the batches.
    """

    skipped: dict[str, str]
    """Files that could not be read and were replaced, and why."""

    def __init__(
        self,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        views: int = 1,
        seed: int = 0,
        balanced: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        self.labels_N = torch.from_numpy(labels).to(device)
        self.batch_size, self.augmentation, self.views, self.seed = batch_size, augmentation, views, seed
        self.device, self.dtype, self.channels_last = torch.device(device), dtype, channels_last
        self._balanced_labels = labels if balanced else None
        self.skipped = {}
        self._share: tuple[int, int] | None = None
        self._own_views = slice(None)
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale = 1.0 / (255.0 * np.asarray(std, dtype=np.float64))
        self.scale_C = torch.tensor(scale).to(dtype).to(device)
        self.shift_C = torch.tensor(-np.asarray(mean) / np.asarray(std)).to(dtype).to(device)

    def share(self, index: int, parts: int, own_views: range) -> None:
        """Yield from now on part `index` of each batch's images (as even as can be), with all of its labels.

        Everything is drawn as before, for the whole batch and all views, so that the parts make up the same batch.

        Args:
            index: Which part; where a batch has no sample for it, its first one stands in.
            parts: How many there are.
            own_views: Which views are wanted, where there is one a peer.
        """
        self._share = index, parts
        if self.views > 1:
            self._own_views = slice(own_views.start, own_views.stop)

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return -(-len(self.labels_N) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Number of images N."""
        return len(self.labels_N)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        raise NotImplementedError

    def first(self) -> Tensor:
        """Return a batch of views to try things on; no draw of any epoch depends on it."""
        raise NotImplementedError

    def _windows(self, start: int) -> Iterator[slice]:
        """Yield the places of every batch, from number `start` on."""
        for first in range(start * self.batch_size, self.num_samples, self.batch_size):
            yield slice(first, min(first + self.batch_size, self.num_samples))

    def _own(self, window: slice) -> slice:
        """Return the part of a batch that is this process's."""
        if self._share is None:
            return window
        (index, parts), size = self._share, window.stop - window.start
        first = window.start + index * (size // parts) + min(index, size % parts)
        count = size // parts + (index < size % parts)
        return slice(first, first + count) if count else slice(window.start, window.start + 1)

    def _generator(self, epoch: int) -> torch.Generator:
        # On the CPU whatever the device, so that every machine sees the same samples.
        return torch.Generator().manual_seed((self.seed * 100_003 + epoch) % 2**63)

    def _order(self, rng: torch.Generator) -> Tensor:
        """Draw which sample stands at which place of an epoch."""
        if self._balanced_labels is None:
            return torch.randperm(self.num_samples, generator=rng)
        return balanced_order(self._balanced_labels, rng)

    def _normalised(self, pixels_VBHWC: Tensor, cuts: dict[str, Tensor]) -> Tensor:
        """Return `V x B x C x H x W` from raw pixels, with a square cut out around each centre in `cuts`."""
        # A row at a time (channels alone are too short to vectorise), and in place: both cost less than half.
        width = pixels_VBHWC.shape[-2]
        x = pixels_VBHWC.flatten(-2).to(self.dtype)
        torch.addcmul(self.shift_C.repeat(width), x, self.scale_C.repeat(width), out=x)
        x = x.unflatten(-1, (width, -1))
        if "cut_y" in cuts and self.augmentation is not None:
            x = x * _outside_square(cuts["cut_y"], cuts["cut_x"], self.augmentation.cutout, x.shape[2]).to(x.dtype)
        x = x.movedim(-1, 2)
        return x if self.channels_last else x.contiguous()


def _outside_square(y_VB: Tensor, x_VB: Tensor, side: int, size: int) -> Tensor:
    """Return a mask `V x B x H x W x 1` that is False in the square of `side` pixels around each centre."""
    place = torch.arange(size, device=y_VB.device)
    low, high = side // 2, side - side // 2
    in_y = (place >= y_VB.unsqueeze(-1) - low) & (place < y_VB.unsqueeze(-1) + high)
    in_x = (place >= x_VB.unsqueeze(-1) - low) & (place < x_VB.unsqueeze(-1) + high)
    return ~(in_y.unsqueeze(-1) & in_x.unsqueeze(-2)).unsqueeze(-1)
