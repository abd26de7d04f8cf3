"""Twins: one network as two peers, which differ by what is random in it, or by the views that they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.inputs import Inputs, InputSpec, Views, device_of, map_tensors, tensors_of
from codistill.peers.members import Spec, build_members, num_head_classes
from codistill.peers.modes import autocast_of
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError


class TwinPeers(Peers):
    """Peers that share all weights: one network, run on a batch once for each of them in a single forward.

    In training its drop path or dropout makes the twins' outputs differ, unless every twin gets its own view; BatchNorm
    normalizes by the rows of all twins. Without gradient, in evaluation mode, one run on a single view is everyone's
    output. The weights count once, in parameters, optimizers and checkpoints.

    Args:
        spec: A name, a callable that builds one network, or a built network (see `NetworkPeers`).
        num_peers: Number of twins.
        num_classes: Number of classes; default what the network ends in.
        seed: The network is initialized as member 0 of `NetworkPeers` with this seed.
        in_channels: Channels of the images; default 3.
        image_size: Height and width used once, to check the network; default 32.
        example: An input of other kind than images (see `NetworkPeers`).

    Raises:
        InputError: the network cannot be split before its head.

    >>> peers = TwinPeers("resnet8", num_classes=10, image_size=8)
    >>> peers(torch.zeros(4, 3, 8, 8)).logits_PBC.shape, peers.member(0) is peers.member(1)
    (torch.Size([2, 4, 10]), True)
    """

    def __init__(
        self,
        spec: Spec,
        num_peers: int = 2,
        num_classes: int | None = None,
        *,
        seed: int = 0,
        in_channels: int | None = None,
        image_size: int | None = None,
        example: Inputs | None = None,
    ) -> None:
        super().__init__()
        if isinstance(spec, Sequence) and not isinstance(spec, str):
            raise InputError("twins are one network; give a name, a callable or a module, not a list")
        inputs = InputSpec.of(example, in_channels, image_size)
        self.num_input_axes, self.takes_tuple = inputs.num_axes, isinstance(inputs.example, tuple)
        (member,) = build_members([spec], seed, num_classes, inputs)
        self.members = nn.ModuleList([member])
        self._num_peers = num_peers
        self._set_num_classes([num_head_classes(member)], num_classes)

    @property
    def num_peers(self) -> int:
        """Number of twins."""
        return self._num_peers

    def member(self, index: int) -> SplitMember:
        """Return the network, which is every twin."""
        return cast(SplitMember, self.members[0])

    def forward(self, inputs: Inputs | list[Inputs]) -> PeerOutputs:
        """Run the network on every twin's rows at once.

        Args:
            inputs: One view for all or one per twin, as `NetworkPeers` takes them.
        """
        views = self._as_views(inputs)
        once = len(views) == 1 and not self.training and not torch.is_grad_enabled()
        rows = views[0] if once else join_rows(views if len(views) > 1 else [views[0]] * self.num_peers)
        with autocast_of(device_of(views[0]), self.autocast):
            features, logits = self.member(0)(rows)
        if once:
            return PeerOutputs(logits.expand(self.num_peers, *logits.shape), [features] * self.num_peers)
        return PeerOutputs(logits.unflatten(0, (self.num_peers, -1)), list(features.chunk(self.num_peers)))


def join_rows(views: Views) -> Inputs:
    """Return inputs of one kind as one input with the rows of all.

    >>> join_rows([(torch.zeros(2, 3),), (torch.ones(4, 3),)])[0].shape
    torch.Size([6, 3])
    """
    columns = iter([torch.cat(parts) for parts in zip(*(tensors_of(view) for view in views))])
    return map_tensors(lambda _: next(columns), views[0])
