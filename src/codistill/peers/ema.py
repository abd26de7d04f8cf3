"""An exponential moving average of peers, which teaches them (PCL).

Shapes: V views, P peers, B batch, C classes, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from codistill.peers.base import PeerOutputs, Peers


class MeanTeacher(nn.Module):
    """An exponential moving average of peers: phi = min(1 - 1/(g + 1), decay) at step g (PCL, section 3.3).

    While training it normalises by batch statistics and leaves its running ones alone; those are averaged from the
    peers' own, for evaluation.

    Args:
        peers: What is averaged; copied.
        decay: Most that the average keeps of itself.
    """

    def __init__(self, peers: Peers, decay: float) -> None:
        super().__init__()
        self.peers = copy.deepcopy(peers).requires_grad_(False)
        self.decay = decay
        _track(self.peers, False)  # in training: batch statistics, nothing recorded

    @torch.no_grad()
    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Return what the averaged peers say; no gradient."""
        return self.peers(views_VBCHW)

    def export_member(self, index: int) -> nn.Module:
        """Return the average of a member as a plain network, which normalises and records as any other does."""
        return _track(self.peers.export_member(index), True)

    def counterparts(self, peers: Peers, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return the averages of some `modules` of the peers that were copied."""
        twins = dict(zip(map(id, peers.modules()), self.peers.modules(), strict=True))
        return [twins[id(module)] for module in modules]

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Average in the peers as they are after step `step`, counted from 0 (which copies them).

        Args:
            peers: What is averaged in.
            step: Number of the step.
            good: Whether the step counts, one number on the device; where it is 0, the average stays.
        """
        keep = min(1.0 - 1.0 / (step + 1), self.decay)
        ours = [*self.peers.trained_parameters(), *(b for b in self.peers.buffers() if b.is_floating_point())]
        theirs = [*peers.trained_parameters(), *(b for b in peers.buffers() if b.is_floating_point())]
        if good is None or step == 0:  # before the first step both are the same
            torch._foreach_lerp_(ours, theirs, 1.0 - keep)
            return
        shares = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(shares, good.to(ours[0].dtype) * (1.0 - keep))
        torch._foreach_add_(ours, shares)


def _track(network: nn.Module, on: bool) -> nn.Module:
    """Let its BatchNorms keep running statistics in training, or not."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = on
    return network
