"""Teachers made of the peers' earlier weights: an exponential moving average (PCL), or snapshots (codistillation).

Shapes: V views, P peers, Q = P - 1 others, B batch, C classes, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.inputs import Views
from codistill.peers.modes import copy_module


class MeanTeacher(nn.Module):
    """An exponential moving average of peers: phi = min(1 - 1/(g + 1), decay) at step g (PCL, section 3.3).

    In training mode it normalizes by batch statistics and does not change its running ones. Those are the average of
    the peers' running statistics, for evaluation.

    Args:
        peers: The peers to average; they are copied.
        decay: Upper bound of phi, the weight of the average in its own update.
    """

    holds_all_members = False
    """Whether every process of a mesh holds all members, also those that other processes train."""

    def __init__(self, peers: Peers, decay: float) -> None:
        super().__init__()
        self.peers = copy_module(peers).requires_grad_(False)
        self.decay = decay
        _track_running_stats(self.peers, enabled=False)  # in training: batch statistics, nothing recorded

    @torch.no_grad()
    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Return the outputs of the averaged peers, without gradient."""
        return self.peers(views_VBCHW)

    def export_member(self, index: int) -> nn.Module:
        """Return the average of a member as a plain network that records BatchNorm statistics as usual."""
        return _track_running_stats(self.peers.export_member(index), enabled=True)

    def counterparts(self, peers: Peers, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return the averages of `modules`, which are modules of the peers that were copied."""
        twins = dict(zip(map(id, peers.modules()), self.peers.modules(), strict=True))
        return [twins[id(module)] for module in modules]

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Move the average towards the peers after step `step`; step 0 copies them.

        Args:
            peers: The peers that were trained.
            step: Number of the step, from 0.
            good: Whether the step counts, one number on the device; where it is 0, the average is unchanged.
        """
        keep = min(1.0 - 1.0 / (step + 1), self.decay)
        # Before the first step both are the same.
        move_towards(_floating_tensors(self.peers), _floating_tensors(peers), 1.0 - keep, None if step == 0 else good)


class SnapshotTeacher(MeanTeacher):
    """Copies of the peers, taken at the start and after every `interval` steps (codistillation).

    In training mode they normalize by batch statistics, like the mean teachers.

    Args:
        peers: The peers to copy.
        interval: Steps from one snapshot to the next, at least 1.
    """

    def __init__(self, peers: Peers, interval: int) -> None:
        super().__init__(peers, 0.0)
        self.interval = interval

    @torch.no_grad()
    def outputs_of_others(self, views: Views) -> Tensor:
        """Return the logits of the other members' snapshots for each member's own images, `Q x P x B x C`.

        Args:
            views: The images of every member: `P x B x C x H x W`, or a list with an input for each.

        >>> from codistill.peers import NetworkPeers
        >>> peers = NetworkPeers("resnet8", 3, 10, image_size=8)
        >>> SnapshotTeacher(peers, 50).outputs_of_others(torch.zeros(3, 4, 3, 8, 8)).shape
        torch.Size([2, 3, 4, 10])
        """
        count = self.peers.num_peers
        # In turn s snapshot i + s runs on the images of member i.
        turns = [self.peers([*views[-s:], *views[:-s]]).logits_PBC.roll(-s, 0) for s in range(1, count)]
        return torch.stack(turns)

    def is_due(self, step: int) -> bool:
        """Return whether a snapshot is taken after step `step`, counted from 0."""
        return (step + 1) % self.interval == 0

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Copy the peers after step `step`, counted from 0, if a snapshot is due.

        Args:
            peers: The peers that were trained.
            step: Number of the step.
            good: Whether the step counts, one number on the device; where it is 0, the snapshot is unchanged.
        """
        if not self.is_due(step):
            return
        copy_where(_floating_tensors(self.peers), _floating_tensors(peers), good)


def _floating_tensors(peers: Peers) -> list[Tensor]:
    """Return the trained parameters and the running statistics."""
    return [*peers.trained_parameters(), *(b for b in peers.buffers() if b.is_floating_point())]


def move_towards(averages: list[Tensor], current: list[Tensor], part: float, good: Tensor | None) -> None:
    """Move averages towards the current tensors by a part of the way, in place; not where `good` is 0."""
    if good is None:
        torch._foreach_lerp_(averages, current, part)
        return
    changes = torch._foreach_sub(current, averages)
    torch._foreach_mul_(changes, good.to(averages[0].dtype) * part)
    torch._foreach_add_(averages, changes)


def copy_where(old: list[Tensor], new: list[Tensor], good: Tensor | None) -> None:
    """Copy tensors in place, bit for bit; not where `good` is 0."""
    for x, y in zip(old, new):
        x.copy_(y if good is None else torch.where(good, y, x))


def _track_running_stats(network: nn.Module, *, enabled: bool) -> nn.Module:
    """Set whether BatchNorms record running statistics in training."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = enabled
    return network
