"""Batches of images that are kept on the device, where all work on them is batched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.data.auto_augment import AutoAugment
from codistill.data.loader import Augmentation, Loader, LoaderOptions


class DeviceLoader(Loader):
    """Batches of images that live on the device.

    Args:
        images: uint8 array `N x H x W x C`.
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        options: Everything else.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        options: LoaderOptions,
    ) -> None:
        super().__init__(labels, mean, std, options)
        self.images_NHWC = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        policy = "none" if options.augmentation is None else options.augmentation.policy
        self.auto_augment = None if policy == "none" else AutoAugment(policy, *images.shape[1:3])

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        augmentation = self.options.augmentation
        order_N, draws, drawn_VKN = (None, {}, None) if augmentation is None else self._draw_epoch(epoch, augmentation)
        for batch in self._batch_slices(start):
            local = self._local_slice(batch)
            index = local if order_N is None else order_N[local]
            all_index = index if local == batch else batch if order_N is None else order_N[batch]
            local_draws = {name: draw[self._local_views, local] for name, draw in draws.items()}
            pixels_BHWC = self.images_NHWC[index]
            pixels_VBHWC = (
                augment(pixels_BHWC, local_draws, augmentation)
                if local_draws and augmentation is not None
                else pixels_BHWC.unsqueeze(0)
            )
            if self.auto_augment is not None and drawn_VKN is not None:
                drawn_VKB = drawn_VKN[self._local_views, :, local]
                pixels_VBHWC = self.auto_augment.apply(
                    pixels_VBHWC if local_draws else pixels_VBHWC.repeat(len(drawn_VKB), 1, 1, 1, 1), drawn_VKB
                )
            yield self._normalize(pixels_VBHWC, local_draws), self.labels_N[all_index]

    def sample_batch(self) -> Tensor:
        """Return the first batch of views; see `Loader.sample_batch`."""
        return next(self.epoch())[0]

    def _draw_epoch(self, epoch: int, augmentation: Augmentation) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Draw the epoch's order and, for every view and position in it, its augmentation.

        Returns:
            The order and the draws on the device, and on the CPU what `AutoAugment` applies, `V x K x N`.
        """
        size, num_offsets = self.images_NHWC.shape[1], 2 * augmentation.pad + 1
        rng = self._generator(epoch)
        order = self._order(rng)
        count, draws, drawn = self.num_samples, [], []
        for _ in range(self.options.views):  # view 0 is drawn first: it does not depend on the number of views
            view = {}
            if augmentation.pad:
                view["top"] = torch.randint(num_offsets, (count,), generator=rng)
                view["left"] = torch.randint(num_offsets, (count,), generator=rng)
            if augmentation.flip:
                view["flip"] = torch.randint(2, (count,), generator=rng).bool()
            view |= augmentation.draws_for_device(size, count, rng)
            if self.auto_augment is not None:
                drawn.append(self.auto_augment.draw(count, rng))
            draws.append(view)
        stacked = {name: torch.stack([view[name] for view in draws]).to(self.device) for name in draws[0]}
        return order.to(self.device), stacked, torch.stack(drawn) if drawn else None


def augment(pixels_BHWC: Tensor, draws: dict[str, Tensor], augmentation: Augmentation) -> Tensor:
    """Crop and flip a batch at once, by indexing rows and columns; return `V x B x H x W x C`, uint8.

    Args:
        pixels_BHWC: uint8 images.
        draws: `top`, `left` (pixels, 0 .. 2 pad) and `flip` (bool), each `V x B`; an absent one changes nothing.
        augmentation: Its `pad` is the width of the zero padding.
    """
    batch, height, width, _ = pixels_BHWC.shape
    pad = augmentation.pad
    rows = torch.arange(height, device=pixels_BHWC.device).expand(1, batch, height)
    columns = torch.arange(width, device=pixels_BHWC.device).expand(1, batch, width)
    if "flip" in draws:
        columns = torch.where(draws["flip"].unsqueeze(-1), columns.flip(-1), columns)
    if "top" in draws:
        pixels_BHWC = F.pad(pixels_BHWC, (0, 0, pad, pad, pad, pad))
        rows = rows + draws["top"].unsqueeze(-1)
        columns = columns + draws["left"].unsqueeze(-1)
    sample = torch.arange(batch, device=pixels_BHWC.device).view(1, batch, 1, 1)
    return pixels_BHWC[sample, rows.unsqueeze(-1), columns.unsqueeze(-2)]
