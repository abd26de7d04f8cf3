"""Peers: several members that see the same images, as whole networks or as branches on one trunk, over any module.

Shapes: V views (1, or one a peer), P peers, B batch, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from codistill.peers.split_head import SplitMember
from codistill.utils.errors import InputError

if TYPE_CHECKING:
    from codistill.peers.stacked import StackedPeers


@dataclass
class PeerOutputs:
    """What the peers say about one batch; the loop fills in what the method `needs`."""

    logits_PBC: Tensor
    features: list[Tensor]
    """One `B x D_p` tensor a peer: what its classifier head takes."""
    trunk_BD: Tensor | None = None
    """Pooled map that leaves the shared trunk (branches with one view only)."""
    ema_logits_PBC: Tensor | None = None
    teacher_logits_BC: Tensor | None = None


class Peers(nn.Module):
    """What `NetworkPeers` and `BranchPeers` share: `members`, one `SplitMember` each."""

    members: nn.ModuleList
    num_classes: int
    autocast: torch.dtype | None = None
    """Dtype of autocast around the members' bodies, if any."""
    runner: StackedPeers | None = None
    """Runs all members as one network in training (see codistill.peers.stacked); None: one after the other."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what an optimiser steps on: the members' parameters, or the stacked ones that they are views of."""
        return list(self.parameters()) if self.runner is None else self.runner.parameters

    @property
    def local(self) -> Peers:
        """The members that this process holds: all of them, unless they are distributed over ranks."""
        return self

    @property
    def num_peers(self) -> int:
        """Number of members."""
        return len(self.members)

    def member(self, index: int) -> SplitMember:
        """Return a member."""
        member = self.members[index]
        assert isinstance(member, SplitMember)
        return member

    @property
    def feature_dims(self) -> list[int]:
        """Width of every member's features."""
        return [self.member(p).feature_dim for p in range(self.num_peers)]

    @property
    def trunk_dim(self) -> int | None:
        """Width of the pooled trunk, where the members share one."""
        return None

    def _check(self, sizes: Sequence[int], num_classes: int | None) -> None:
        """Check that the heads that were found agree on the classes."""
        if len(set(sizes)) > 1 or (num_classes is not None and sizes[0] != num_classes):
            ends = ", ".join(map(str, sizes))
            raise InputError(f"--model: the peers end in {ends} classes; all need {num_classes or 'the same number'}")
        self.num_classes = sizes[0]

    def _stack(self, pairs: list[tuple[Tensor, Tensor]], trunk_BD: Tensor | None) -> PeerOutputs:
        return PeerOutputs(torch.stack([z for _, z in pairs]), [f for f, _ in pairs], trunk_BD)

    def _views(self, views: Tensor) -> Tensor:
        """Accept `V x B x C x H x W`, or `B x C x H x W` as one view."""
        views = views.unsqueeze(0) if views.dim() == 4 else views
        if views.shape[0] not in (1, self.num_peers):
            raise InputError(f"{views.shape[0]} views for {self.num_peers} peers; give 1, or one a peer")
        return views

    def export_member(self, index: int) -> nn.Module:
        """Return member `index` as a plain network that stands alone."""
        return self.member(index).merge()
