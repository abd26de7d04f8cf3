"""Whole networks as peers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.exits import add_exits
from codistill.peers.inputs import Inputs, InputSpec, device_of
from codistill.peers.maps import find_maps
from codistill.peers.members import Spec, build_members, member_seed, num_head_classes
from codistill.peers.modes import autocast_of, frozen_batchnorm_stats
from codistill.peers.streams import run_side_by_side
from codistill.utils import InputError


class NetworkPeers(Peers):
    """Whole networks as peers; they may differ in size and kind.

    Args:
        spec: A name (see `models.resolve`), a callable that builds one network, or a list of names, callables or
            modules, one per peer.
            Modules are used as they are and changed: their heads are cut off (`export_member` puts them back).
            A callable is called with those of `num_classes`, `in_channels` and `image_size` that it takes and that
            are known.
        num_peers: Number of members, the leader included; default the length of the list.
        num_classes: Number of classes; default what the networks end in.
        seed: Member p is initialized from a seed made of (seed, p).
        in_channels: Channels of the images; default 3.
        image_size: Height and width used once, to check the networks; default 32.
        example: Instead of the two, for any input: a batch as the networks take it, of which one row is used to check
            them. A tensor, or a mapping (the keywords) or tuple (the arguments) of tensors. From a tensor of 3 axes or
            more, `B x C x ...`, follow `in_channels` and (of square images) `image_size`.
        first: Number of the first member, where these peers are a part of more (see `codistill.distributed`).
        same_start: Initialize all members as member 0, so that those of one architecture begin with the same weights.
        exits: Exits of every network, for a method that learns from intermediate maps too (see
            `codistill.peers.exits`).
        maps: Sizes of intermediate maps that are taken in training, the last ones (see `codistill.peers.maps`).

    Raises:
        InputError: one built instance is given for several peers, the heads do not agree, a network does not take the
            images or the example, or it has no places for so many exits, or not so many maps.

    >>> peers = NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8)
    >>> peers(torch.zeros(4, 3, 8, 8)).logits_PBC.shape
    torch.Size([2, 4, 10])
    >>> rows = torch.zeros(4, 6)
    >>> mlp = lambda num_classes: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, num_classes))
    >>> NetworkPeers(mlp, num_peers=2, num_classes=3, example=rows)(rows).logits_PBC.shape
    torch.Size([2, 4, 3])
    """

    def __init__(
        self,
        spec: Spec | Sequence[Spec],
        num_peers: int | None = None,
        num_classes: int | None = None,
        *,
        seed: int = 0,
        in_channels: int | None = None,
        image_size: int | None = None,
        example: Inputs | None = None,
        first: int = 0,
        same_start: bool = False,
        exits: int = 0,
        maps: int = 0,
    ) -> None:
        super().__init__()
        specs: list[Spec] = [spec] if isinstance(spec, str | nn.Module) or callable(spec) else list(spec)
        num_peers = len(specs) if num_peers is None else num_peers
        if len(specs) == 1 and num_peers > 1:
            if isinstance(specs[0], nn.Module):
                raise InputError("one built model cannot be several peers; give a name, a callable or a list of models")
            specs *= num_peers
        if len(specs) != num_peers:
            raise InputError(f"{len(specs)} models are given for {num_peers} peers; give one, or one per peer")
        inputs = InputSpec.of(example, in_channels, image_size)
        self.num_input_axes, self.takes_tuple = inputs.num_axes, isinstance(inputs.example, tuple)
        members = build_members(specs, seed, num_classes, inputs, first, same_start)
        self.members = nn.ModuleList(members)
        self._set_num_classes([num_head_classes(m) for m in members], num_classes)
        if exits:
            for p, (own_spec, member) in enumerate(zip(specs, members), first):
                add_exits(member, own_spec, exits, member_seed(seed, p), self.num_classes, inputs)
        for member in members if maps else ():
            member.map_shapes = find_maps(member.body, inputs.for_network(member), maps)

    def forward(self, inputs: Inputs | list[Inputs]) -> PeerOutputs:
        """Run every member on its own view, or all on the only one.

        Args:
            inputs: What the networks take, the same for all (images: `B x C x H x W`), or one view per peer: a list of
                such inputs, or of tensors one tensor with one more axis in front (`V x B x C x H x W`).
        """
        views = self._as_views(inputs)
        own_views = len(views) > 1
        if self.stacked_runner is not None and self.training:
            return self.stacked_runner(views)
        with autocast_of(device_of(views[0]), self.autocast):
            calls = [
                partial(self.member(p).forward_with_extras, views[p if own_views else 0]) for p in range(self.num_peers)
            ]
            tuples = run_side_by_side(calls)
        return self._stack_outputs(tuples, None)

    @torch.no_grad()
    def refresh(self, outputs: PeerOutputs, inputs: Inputs | list[Inputs], index: int) -> None:
        """Run member `index` again and replace its logits and features in `outputs`; no statistics are recorded."""
        views, member = self._as_views(inputs), self.member(index)
        with (
            autocast_of(device_of(views[0]), self.autocast, cache=False),
            frozen_batchnorm_stats(member),
        ):
            features_BD, logits_BC = member(views[index if len(views) > 1 else 0])
        outputs.logits_PBC[index] = logits_BC
        if outputs.features:
            outputs.features[index] = features_BD
