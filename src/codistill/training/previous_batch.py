"""What the training loop keeps of a batch for the next step, for a method that `needs` it (`previous`).

At step i every member runs on the first view of the new images and, in the same forward, on the second view of the
images of step i - 1; the method also gets the logits that the members gave for their first view then.
Shapes: V views (2), P peers, B batch, C classes or channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from codistill.data import Loader
from codistill.peers import PeerOutputs, Peers, PreviousOutputs


class PreviousBatch(nn.Module):
    """The second view, labels and logits of the batch of the step before.

    They are buffers of the largest batch's size, so that a checkpoint and the guard of finite losses treat them like
    running statistics. The number of rows in use is known to the host.

    Args:
        peers: What is trained, on its device.
        loader: The training images.
        image_shape: C, H, W.
        soft_labels: Whether labels are rows of C probabilities.
    """

    def __init__(self, peers: Peers, loader: Loader, image_shape: tuple[int, int, int], *, soft_labels: bool) -> None:
        super().__init__()
        most, dtype = loader.largest_batch, loader.options.dtype
        labels = torch.zeros(most, peers.num_classes, dtype=dtype) if soft_labels else torch.zeros(most).long()
        layout = torch.channels_last if loader.options.channels_last else torch.contiguous_format
        images = torch.zeros(most, *image_shape, dtype=dtype).contiguous(memory_format=layout)
        logits = torch.zeros(peers.num_peers, most, peers.num_classes, dtype=next(peers.parameters()).dtype)
        self.images_BCHW: Tensor
        self.targets_B: Tensor
        self.logits_PBC: Tensor
        self.register_buffer("images_BCHW", images.to(loader.device))
        self.register_buffer("targets_B", labels.to(loader.device))
        self.register_buffer("logits_PBC", logits.to(loader.device))
        self.rows = 0
        """Rows in use: the size of the last batch, 0 before the first step."""

    def forward(self, peers: Peers, views_VBCHW: Tensor) -> PeerOutputs:
        """Return the peers' outputs for the new images, with `previous` for those of the step before.

        Args:
            peers: What is trained.
            views_VBCHW: Both views of the new images, or one for both.
        """
        if not self.rows:
            return peers(views_VBCHW[:1])
        count = views_VBCHW.shape[1]
        whole = peers(torch.cat((views_VBCHW[0], self.images_BCHW[: self.rows])).unsqueeze(0))
        old_PBC, targets = self.logits_PBC[:, : self.rows], self.targets_B[: self.rows]
        return dataclasses.replace(
            whole,
            logits_PBC=whole.logits_PBC[:, :count],
            features=[feature_BD[:count] for feature_BD in whole.features],
            trunk_BD=None if whole.trunk_BD is None else whole.trunk_BD[:count],
            exits=[[feature_BD[:count] for feature_BD in exits] for exits in whole.exits],
            previous=PreviousOutputs(whole.logits_PBC[:, count:], old_PBC, targets),
        )

    @torch.no_grad()
    def store(self, views_VBCHW: Tensor, targets_B: Tensor, logits_PBC: Tensor) -> None:
        """Keep a batch for the next step, after the backward of this one, which reads the old one.

        The caller sets `rows`, as a replayed CUDA graph runs no Python.
        """
        count = len(targets_B)
        self.images_BCHW[:count].copy_(views_VBCHW[-1])  # without augmentation there is one view
        self.targets_B[:count].copy_(targets_B)
        self.logits_PBC[:, :count].copy_(logits_PBC)

    @contextmanager
    def of_size(self, rows: int) -> Iterator[None]:
        """Use so many rows within the context, to measure the cost of a batch of that size."""
        kept, self.rows = self.rows, min(rows, len(self.targets_B))
        try:
            yield
        finally:
            self.rows = kept

    def get_extra_state(self) -> dict[str, int]:
        """Return what a checkpoint holds beside the buffers."""
        return {"rows": self.rows}

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` returned."""
        self.rows = int(state["rows"])
