"""Batches of images that live on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.data.loader import Augmentation, Loader


class DeviceLoader(Loader):
    """Batches of images that live on the device.

    Args:
        images: uint8 array `N x H x W x C`.
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        options: Those of `Loader`.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], **options: Any
    ) -> None:
        super().__init__(labels, mean, std, **options)
        self.images_NHWC = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on."""
        if self.augmentation is None:
            order_N, draws = None, {}
        else:
            order_N, draws = self._draw(epoch)
        for window in self._windows(start):
            own = self._own(window)
            index = own if order_N is None else order_N[own]
            labelled = index if own == window else window if order_N is None else order_N[window]
            batch = {name: draw[self._own_views, own] for name, draw in draws.items()}
            yield self._views(self.images_NHWC[index], batch), self.labels_N[labelled]

    def first(self) -> Tensor:
        """Return a batch of views to try things on; no draw of any epoch depends on it."""
        return next(self.epoch())[0]

    def _draw(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the epoch's order and, for every view and place in it, its crop, flip and cutout."""
        assert self.augmentation is not None
        size, spread = self.images_NHWC.shape[1], 2 * self.augmentation.pad + 1
        rng = self._generator(epoch)
        order = self._order(rng)
        count, draws = self.num_samples, []
        for _ in range(self.views):  # view 0 is drawn first, and so does not depend on the number of views
            view = {}
            if self.augmentation.pad:
                view["top"] = torch.randint(spread, (count,), generator=rng)
                view["left"] = torch.randint(spread, (count,), generator=rng)
            if self.augmentation.flip:
                view["flip"] = torch.randint(2, (count,), generator=rng).bool()
            if self.augmentation.cutout:
                view["cut_y"] = torch.randint(size, (count,), generator=rng)
                view["cut_x"] = torch.randint(size, (count,), generator=rng)
            draws.append(view)
        stacked = {name: torch.stack([view[name] for view in draws]).to(self.device) for name in draws[0]}
        return order.to(self.device), stacked

    def _views(self, pixels_BHWC: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Return `V x B x C x H x W`, from raw pixels and the batch's draws (`V x B` each)."""
        if draws and self.augmentation is not None:
            return self._normalised(augment(pixels_BHWC, draws, self.augmentation), draws)
        return self._normalised(pixels_BHWC.unsqueeze(0), {})


def augment(pixels_BHWC: Tensor, draws: dict[str, Tensor], augmentation: Augmentation) -> Tensor:
    """Crop and flip a batch at once, by indexing rows and columns -> `V x B x H x W x C`, uint8.

    Args:
        pixels_BHWC: uint8 images.
        draws: `top`, `left` (pixels, 0 .. 2 pad) and `flip` (bool), each `V x B`; absent ones are left undone.
        augmentation: Says how far the zero padding goes.
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
