"""Peers of which some live on other ranks; every rank hears what all of them say.

Shapes: P peers, K own members, B batch, C classes, D features, V views.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from codistill.distributed.mesh import Mesh
from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.modes import eval_mode, frozen_batchnorm_stats
from codistill.peers.networks import NetworkPeers
from codistill.peers.split_head import SplitMember
from codistill.utils.errors import InputError

IMBALANCE = 1.1  # a rank that costs that many times what another one costs is spoken of


class MeshPeers(Peers):
    """A rank's own members as `local`, and all peers' outputs.

    Its `members`, and so its parameters and state, are the rank's own, numbered from 0; everything else (`num_peers`,
    `feature_dims`, the outputs) is that of all peers.

    Args:
        local: The rank's own members.
        mesh: The rank's place.
    """

    def __init__(self, local: Peers, mesh: Mesh) -> None:
        super().__init__()
        self.members = local.members
        self._local = (local,)  # not registered: its members are this module's already
        self.mesh, self.num_classes = mesh, local.num_classes
        told = mesh.all_gather_object([(m.feature_dim, _numbers(m)) for m in map(local.member, range(local.num_peers))])
        everybody = [about for rank in range(mesh.num_peer) for about in told[rank]]
        self._feature_dims = [dim for dim, _ in everybody]
        self.parameter_counts = [numbers for _, numbers in everybody]
        """Parameters of every member, trained or frozen."""
        self.trained_counts = list(self.parameter_counts)
        """Those that are trained."""
        self.features = self.needs_full_batch = False
        self.only_logits = False
        """Whether training hears logits alone (mean teachers)."""

    @property
    def local(self) -> Peers:
        """The rank's own members, as peers of their own."""
        return self._local[0]

    @property
    def num_peers(self) -> int:
        """Number of all members, on whichever rank."""
        return len(self._feature_dims)

    @property
    def feature_dims(self) -> list[int]:
        """Width of every member's features."""
        return self._feature_dims

    @property
    def trunk_dim(self) -> int | None:
        """Width of the pooled trunk, where the members share one."""
        return self.local.trunk_dim

    def member(self, index: int) -> SplitMember:
        """Return a member that lives here."""
        assert index in self.mesh.own, "the member lives on another rank"
        return self.local.member(index - self.mesh.own.start)

    def count_trained(self) -> None:
        """Learn of all ranks how many of their members' parameters are trained (after some have been frozen)."""
        told = self.mesh.all_gather_object([_numbers(self.local.member(k), True) for k in range(self.local.num_peers)])
        self.trained_counts = [numbers for rank in range(self.mesh.num_peer) for numbers in told[rank]]

    def with_members(self, local: Peers) -> MeshPeers:
        """Return peers that run these members of the rank's own instead, and leave this one as it is."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.members, twin._local = local.members, (local,)
        return twin

    def serve(self, features: bool, needs_full_batch: bool) -> None:
        """Gather from now on what a method needs beside the logits."""
        self.features, self.needs_full_batch = features, needs_full_batch

    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run the rank's members on their views and return what all peers say, others' words as constants.

        Args:
            views_VBCHW: The rank's rows of the images: one view, or one for each of its members.
        """
        if not self.training:
            return self._gather_peers(self.local(views_VBCHW), self.features)
        with self.mesh.rank_rng(), self._without_statistics_if_idle():
            outputs = self.local(views_VBCHW)
        features = self.features and not self.only_logits
        outputs = self._gather_peers(outputs, features)
        return self._along_data(outputs, features) if self.needs_full_batch else outputs

    @torch.no_grad()
    def refresh(self, said: PeerOutputs, views_VBCHW: Tensor, index: int) -> None:
        """Run one member of all again, wherever it lives; see `NetworkPeers.refresh`."""
        mesh, local = self.mesh, self.local
        dims = [self._feature_dims[index]] if said.features else []
        word = said.logits_PBC.new_zeros(views_VBCHW.shape[1], self.num_classes + sum(dims))
        if index in mesh.own:
            own, count = index - mesh.own.start, len(mesh.own)
            outputs = PeerOutputs(word.new_zeros(count, len(word), self.num_classes), [word] * count if dims else [])
            assert isinstance(local, NetworkPeers)  # branches are stepped together
            with mesh.rank_rng():
                local.refresh(outputs, views_VBCHW, own)
            word = _pack(outputs.logits_PBC[own : own + 1], outputs.features[own : own + 1])
        if mesh.num_peer > 1:
            widths = [word.shape[1]] * mesh.num_peer
            word = mesh.exchange(word, "peer", [len(word)] * mesh.num_peer, widths)[index // len(mesh.own)]
        if self.needs_full_batch and mesh.num_data > 1:
            rows = word[: mesh.rows[mesh.data_index]]
            word = torch.cat(mesh.exchange(rows, "data", mesh.rows, [word.shape[1]] * mesh.num_data))
        logits_1BC, features = _unpack(word, 1, self.num_classes, dims)
        said.logits_PBC[index] = logits_1BC[0]
        if features:
            said.features[index] = features[0]

    @contextmanager
    def _without_statistics_if_idle(self) -> Iterator[None]:
        """Record no statistics of its own where the rank has no sample of the batch."""
        if self.mesh.idle and not self.mesh.sync_bn:
            with frozen_batchnorm_stats(self):
                yield
        else:
            yield

    def _gather_peers(self, outputs: PeerOutputs, features: bool) -> PeerOutputs:
        """Put all members' outputs on the rank's rows together."""
        mesh = self.mesh
        if not features:
            outputs.features = []
        if mesh.num_peer == 1:
            return outputs
        share, batch = len(mesh.own), outputs.logits_PBC.shape[1]
        dims = [self._feature_dims[q * share : (q + 1) * share] if features else [] for q in range(mesh.num_peer)]
        widths = [share * self.num_classes + sum(d) for d in dims]
        packed = _pack(outputs.logits_PBC, outputs.features)
        parts = mesh.exchange(packed, "peer", [batch] * mesh.num_peer, widths)
        pairs = [_unpack(part, share, self.num_classes, d) for part, d in zip(parts, dims)]
        return PeerOutputs(torch.cat([z for z, _ in pairs]), [f for _, fs in pairs for f in fs], outputs.trunk_BD)

    def _along_data(self, outputs: PeerOutputs, features: bool) -> PeerOutputs:
        """Put all rows of the batch together."""
        mesh = self.mesh
        if mesh.num_data == 1:
            return outputs
        dims = list(self._feature_dims) if features else []
        extra = [] if outputs.trunk_BD is None else [outputs.trunk_BD]
        dims += [trunk.shape[1] for trunk in extra]
        packed = _pack(outputs.logits_PBC, outputs.features + extra)[: mesh.rows[mesh.data_index]]
        whole = torch.cat(mesh.exchange(packed, "data", mesh.rows, [packed.shape[1]] * mesh.num_data))
        logits_PBC, tail = _unpack(whole, self.num_peers, self.num_classes, dims)
        return PeerOutputs(logits_PBC, tail[:-1] if extra else tail, tail[-1] if extra else None)


def _pack(logits_PBC: Tensor, features: list[Tensor]) -> Tensor:
    """Put everything that belongs to a sample into its row."""
    return torch.cat([logits_PBC.transpose(0, 1).flatten(1), *features], 1)


def _unpack(rows: Tensor, peers: int, classes: int, dims: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Take rows apart into logits `P x B x C` and features."""
    logits, *features = rows.split([peers * classes, *dims], 1)
    return logits.unflatten(1, (peers, classes)).transpose(0, 1), features


def _numbers(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


@torch.no_grad()
def imbalance(peers: MeshPeers, example_BCHW: Tensor) -> str | None:
    """Return a warning where the ranks of an axis `peer` have unequal work for one image, else None."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, eval_mode(peers):
        peers.local(example_BCHW)
    costs = peers.mesh.all_gather_object(counter.get_total_flops())[: peers.mesh.num_peer]
    least, most = min(costs), max(costs)
    if most <= IMBALANCE * least:
        return None
    slow, fast = costs.index(most), costs.index(least)
    return (
        f"--mesh: the members on peer={slow} cost {most / least:.1f} times those on peer={fast}, which will wait; "
        "give --model in an order that shares the work out evenly"
    )


def require_local(peers: Peers, index: int) -> None:
    """Raise where a member is asked for that lives on another rank."""
    if isinstance(peers, MeshPeers) and index not in peers.mesh.own:
        raise InputError(f"member {index} lives on another rank; load the run folder in one process to get at it")
