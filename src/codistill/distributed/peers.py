"""Peers distributed over ranks; outputs are all-gathered.

Shapes: V views, P peers, K local members, B batch, C classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from codistill.distributed.process_mesh import ProcessMesh
from codistill.peers import (
    Inputs,
    MapShape,
    NetworkPeers,
    PeerOutputs,
    Peers,
    SplitMember,
    eval_mode,
    frozen_batchnorm_stats,
)
from codistill.utils import InputError, count_parameters

MAX_IMBALANCE = 1.1  # ratio of two ranks' FLOPs above which the user is warned


class MeshPeers(Peers):
    """Peers of which each rank holds some as `local`; `forward` returns the outputs of all of them.

    `members`, and so parameters and state, are the rank's own, numbered from 0; everything else (`num_peers`,
    `feature_dims`, the outputs) is about all peers. Code for any kind of peers reaches modules through `local`.

    Args:
        local: The rank's own members.
        mesh: The ranks.
    """

    def __init__(self, local: Peers, mesh: ProcessMesh) -> None:
        super().__init__()
        self.members = local.members
        self.autocast = local.autocast
        self._local = (local,)  # in a tuple, so that its members are not registered twice
        self.mesh, self.num_classes = mesh, local.num_classes
        local_members = [local.member(k) for k in range(local.num_peers)]
        described = [(m.feature_dim, m.exit_dims, _count_plain(m), count_parameters(m)) for m in local_members]
        gathered = mesh.all_gather_object(described)
        of_all = [member for rank in range(mesh.num_peer) for member in gathered[rank]]
        self._feature_dims = [dim for dim, *_ in of_all]
        self._exit_dims = [dims for _, dims, *_ in of_all]
        self.parameter_counts = [count for *_, count, _ in of_all]
        """Parameters of every member, trained or frozen, without those of its exits."""
        self.trained_counts = [count for *_, count in of_all]
        """Trained parameters of every member, exits included."""
        self.features = self.exits = self.needs_full_batch = False
        self.rows_per_image = 1
        self.members_apart = False
        """Whether no outputs are exchanged along `peer` in training: those of other ranks' members are then zeros."""
        self.only_logits = False
        """Whether only logits are gathered in training (mean teachers)."""

    @property
    def local(self) -> Peers:
        """The rank's own members."""
        return self._local[0]

    @property
    def num_peers(self) -> int:
        """Number of all members, on any rank."""
        return len(self._feature_dims)

    @property
    def feature_dims(self) -> list[int]:
        """Width of every member's features."""
        return self._feature_dims

    @property
    def exit_dims(self) -> list[tuple[int, ...]]:
        """Widths of every member's exits; empty where it has none."""
        return self._exit_dims

    @property
    def map_shapes(self) -> list[tuple[MapShape, ...]]:
        """Empty: methods that compare maps train in one process."""
        return [()] * self.num_peers

    @property
    def trunk_dim(self) -> int | None:
        """Width of the pooled trunk, where the members share one."""
        return self.local.trunk_dim

    def member(self, index: int) -> SplitMember:
        """Return a member of this rank.

        Raises:
            InputError: the member is on another rank.
        """
        if index not in self.mesh.local_members:
            raise InputError(f"member {index} is on another rank; load the run folder in one process to use it")
        return self.local.member(index - self.mesh.local_members.start)

    def count_trained(self) -> None:
        """Gather how many parameters of every member are trained (after some have been frozen)."""
        local_members = [self.local.member(k) for k in range(self.local.num_peers)]
        gathered = self.mesh.all_gather_object([count_parameters(m, trained_only=True) for m in local_members])
        self.trained_counts = [count for rank in range(self.mesh.num_peer) for count in gathered[rank]]

    def with_members(self, local: Peers) -> MeshPeers:
        """Return a copy whose local members are others; this object is unchanged."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.members, twin._local = local.members, (local,)
        return twin

    def require(
        self,
        *,
        features: bool,
        needs_full_batch: bool,
        exits: bool = False,
        rows_per_image: int = 1,
        members_apart: bool = False,
    ) -> None:
        """Say what a method needs besides logits of the rank's rows.

        Args:
            features: The features.
            needs_full_batch: The outputs for the full batch.
            exits: The exits.
            rows_per_image: Rows of the outputs for each image of the batch.
            members_apart: Members need no outputs of those of other ranks.
        """
        self.members_apart = members_apart and self.mesh.num_peer > 1
        self.features, self.needs_full_batch, self.exits = features, needs_full_batch, exits
        self.rows_per_image = rows_per_image

    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run the local members on their views; return all peers' outputs, those of other ranks as constants.

        Args:
            views_VBCHW: The rank's rows of the images: one view, or one for each local member.
        """
        if not self.training:
            return self._gather_peers(self.local(views_VBCHW), features=self.features)
        with self.mesh.rank_rng(), self._without_statistics_if_idle():
            outputs = self.local(views_VBCHW)
        features = self.features and not self.only_logits
        outputs = self._gather_peers(outputs, features=features)
        return self._gather_batch(outputs, features=features) if self.needs_full_batch else outputs

    def hybrid_logits(self, inputs: Inputs, shares_P: Tensor | None = None) -> Tensor:
        """Return the logits of the mean of all members' weights, for the rows that `forward` returns."""
        with self.mesh.rank_rng():
            logits_BC = self.local.hybrid_logits(inputs, shares_P)
        return self.gather_rows(logits_BC) if self.training and self.needs_full_batch else logits_BC

    @torch.no_grad()
    def refresh(self, outputs: PeerOutputs, views_VBCHW: Tensor, index: int) -> None:
        """Run one member of all again, on the rank that holds it; see `NetworkPeers.refresh`."""
        mesh, local = self.mesh, self.local
        dims = [self._feature_dims[index]] if outputs.features else []
        packed = outputs.logits_PBC.new_zeros(views_VBCHW.shape[1], self.num_classes + sum(dims))
        count = len(mesh.local_members)
        if index in mesh.local_members:
            k = index - mesh.local_members.start
            logits_KBC = packed.new_zeros(count, len(packed), self.num_classes)
            local_outputs = PeerOutputs(logits_KBC, [packed] * count if dims else [])
            assert isinstance(local, NetworkPeers)  # branches are stepped together
            with mesh.rank_rng():
                local.refresh(local_outputs, views_VBCHW, k)
            packed = _pack(local_outputs.logits_PBC[k : k + 1], local_outputs.features[k : k + 1])
        if mesh.num_peer > 1:
            widths = [packed.shape[1]] * mesh.num_peer
            packed = mesh.all_gather(packed, "peer", [len(packed)] * mesh.num_peer, widths)[index // count]
        if self.needs_full_batch and mesh.num_data > 1:
            rows = packed[: mesh.rows[mesh.data_index]]
            packed = torch.cat(mesh.all_gather(rows, "data", mesh.rows, [packed.shape[1]] * mesh.num_data))
        logits_1BC, features = _unpack(packed, 1, self.num_classes, dims)
        outputs.logits_PBC[index] = logits_1BC[0]
        if features:
            outputs.features[index] = features[0]

    @contextmanager
    def _without_statistics_if_idle(self) -> Iterator[None]:
        """Record no BatchNorm statistics where the rank has no sample of the batch."""
        if self.mesh.idle and not self.mesh.sync_bn:
            with frozen_batchnorm_stats(self):
                yield
        else:
            yield

    def _gather_peers(self, outputs: PeerOutputs, *, features: bool) -> PeerOutputs:
        """All-gather the outputs of all members for the rank's rows."""
        mesh = self.mesh
        if not features:
            outputs.features = []
        if not self.exits:
            outputs.exits = []
        if mesh.num_peer == 1:
            return outputs
        if self.training and self.members_apart:
            return self._add_zeros(outputs)
        count, batch = len(mesh.local_members), outputs.logits_PBC.shape[1]
        ranks = [slice(q * count, (q + 1) * count) for q in range(mesh.num_peer)]
        exit_dims = self._exit_dims if outputs.exits else []
        dims = [
            [*(self._feature_dims[own] if features else []), *(d for widths in exit_dims[own] for d in widths)]
            for own in ranks
        ]
        widths = [count * self.num_classes + sum(d) for d in dims]
        packed = _pack(outputs.logits_PBC, outputs.features + [x for exits in outputs.exits for x in exits])
        parts = mesh.all_gather(packed, "peer", [batch] * mesh.num_peer, widths)
        pairs = [_unpack(part, count, self.num_classes, d) for part, d in zip(parts, dims)]
        first = count if features else 0
        whole = PeerOutputs(
            torch.cat([z for z, _ in pairs]), [f for _, fs in pairs for f in fs[:first]], outputs.trunk_BD
        )
        whole.exits = _group([x for _, fs in pairs for x in fs[first:]], exit_dims)
        return whole

    def _add_zeros(self, outputs: PeerOutputs) -> PeerOutputs:
        """Return the outputs with zeros as the logits of other ranks' members."""
        own, z_KBC = self.mesh.local_members, outputs.logits_PBC
        before = z_KBC.new_zeros(own.start, *z_KBC.shape[1:])
        after = z_KBC.new_zeros(self.num_peers - own.stop, *z_KBC.shape[1:])
        return PeerOutputs(torch.cat((before, z_KBC, after)), [], outputs.trunk_BD)

    def gather_rows(self, x_BN: Tensor) -> Tensor:
        """Return the rows of all data ranks, in the order of the batch: `B x N` of this rank's rows -> `B x N`."""
        mesh, rows = self.mesh, [self.rows_per_image * count for count in self.mesh.rows]
        local = x_BN[: rows[mesh.data_index]]
        return torch.cat(mesh.all_gather(local, "data", rows, [x_BN.shape[1]] * mesh.num_data))

    def _gather_batch(self, outputs: PeerOutputs, *, features: bool) -> PeerOutputs:
        """All-gather the outputs for the rows of all data ranks."""
        mesh = self.mesh
        if mesh.num_data == 1:
            return outputs
        trunk = [] if outputs.trunk_BD is None else [outputs.trunk_BD]
        exits = [x for own in outputs.exits for x in own]
        tensors = [*(outputs.features if features else []), *trunk, *exits]
        whole = self.gather_rows(_pack(outputs.logits_PBC, tensors))
        logits_PBC, tail = _unpack(whole, self.num_peers, self.num_classes, [x.shape[1] for x in tensors])
        first = len(tail) - len(exits)
        outputs = PeerOutputs(logits_PBC, tail[: first - len(trunk)], tail[first - 1] if trunk else None)
        outputs.exits = _group(tail[first:], self._exit_dims if exits else [])
        return outputs


def _count_plain(member: SplitMember) -> int:
    """Return the number of a member's parameters without those of its exits."""
    return count_parameters(nn.ModuleList([member.body, member.head]))


def _group(tensors: list[Tensor], exit_dims: list[tuple[int, ...]]) -> list[list[Tensor]]:
    """Return the exits of all members as one list per member."""
    rest = iter(tensors)
    return [[next(rest) for _ in widths] for widths in exit_dims]


def _pack(logits_PBC: Tensor, features: list[Tensor]) -> Tensor:
    """Put all numbers of a sample into its row: `B x (P C + D ...)`."""
    return torch.cat([logits_PBC.transpose(0, 1).flatten(1), *features], 1)


def _unpack(rows: Tensor, peers: int, classes: int, dims: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Split rows into logits `P x B x C` and features."""
    logits, *features = rows.split([peers * classes, *dims], 1)
    return logits.unflatten(1, (peers, classes)).transpose(0, 1), features


@torch.no_grad()
def describe_imbalance(peers: MeshPeers, example_BCHW: Tensor) -> str | None:
    """Return a warning where the ranks of an axis `peer` need unequal FLOPs per image, else None."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, eval_mode(peers):
        peers.local(example_BCHW)
    flops = peers.mesh.all_gather_object(counter.get_total_flops())[: peers.mesh.num_peer]
    if max(flops) <= MAX_IMBALANCE * min(flops):
        return None
    slow, fast = flops.index(max(flops)), flops.index(min(flops))
    return (
        f"--mesh: the members on peer={slow} cost {max(flops) / min(flops):.1f} times those on peer={fast}, which will "
        "wait; give --model in an order that divides the work evenly"
    )
