"""Snapshots on a mesh: every rank holds those of all members, and exchanges weights when they are taken.

Shapes: V views, P peers, K local members, Q = P - 1 others, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from codistill.distributed.peers import MeshPeers
from codistill.peers import NetworkPeers, PeerOutputs, Peers, SnapshotTeacher, Views, copy_where


class MeshSnapshots(SnapshotTeacher):
    """Snapshots of all members in every process of the axis `peer`.

    A member learns from the others' snapshots, which run here on this rank's images. So nothing is sent in a step
    between two snapshots, and 4 bytes for each parameter and running statistic when one is taken.

    Args:
        peers: The peers that are trained, of which this rank has some.
        whole: All members, on the device, converted as this rank's own; their weights do not matter.
        interval: Steps from one snapshot to the next, at least 1.
    """

    holds_all_members = True

    def __init__(self, peers: MeshPeers, whole: Peers, interval: int) -> None:
        super().__init__(whole, interval)
        self._trained = (peers,)  # in a tuple, so that its members are not registered here
        self._copy(None)

    @torch.no_grad()
    def forward(self, views_VBCHW: Views) -> PeerOutputs:
        """Return the logits of all snapshots for one view, without gradient; of a rank's only member zeros."""
        mesh = self._trained[0].mesh
        skipped = mesh.local_members if len(mesh.local_members) == 1 else range(0)
        run = [p for p in range(self.peers.num_peers) if p not in skipped]
        with mesh.rank_rng():
            logits_PBC = self._run_members(views_VBCHW[0], run)
        return PeerOutputs(self._gather_rows(logits_PBC), [])

    @torch.no_grad()
    def outputs_of_others(self, views: Views) -> Tensor:
        """Return the logits of the others' snapshots for this rank's members' images, `Q x P x B x C`.

        The rows of other ranks' members are zeros.

        Args:
            views: The images of this rank's members.
        """
        mesh, count = self._trained[0].mesh, self.peers.num_peers
        by_member = []
        with mesh.rank_rng():
            for member, view in zip(mesh.local_members, views, strict=True):
                others = [(member + turn) % count for turn in range(1, count)]
                by_member.append(self._run_members(view, others)[others])
        own_QKBC = torch.stack(by_member, 1)
        others_QPBC = own_QKBC.new_zeros(count - 1, count, *own_QKBC.shape[2:])
        others_QPBC[:, mesh.local_members.start : mesh.local_members.stop] = own_QKBC
        return self._gather_rows(others_QPBC)

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Exchange and copy all members' weights after step `step`, if a snapshot is due; see `SnapshotTeacher`."""
        if self.is_due(step):
            self._copy(good)

    def counterparts(self, peers: Peers, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Return none: frozen modules are those of all members, not only of this rank's."""
        return []

    def _copy(self, good: Tensor | None) -> None:
        """Copy the weights and running statistics of all members, this rank's own and those of others."""
        mesh, local = self._trained[0].mesh, self._trained[0].local
        count = len(mesh.local_members)
        for rank in range(mesh.num_peer):
            snapshots = [self.peers.member(rank * count + k) for k in range(count)]
            sent = [local.member(k) for k in range(count)] if rank == mesh.peer_index else snapshots
            received = mesh.send_along_peer(_tensors_of(sent), rank)
            copy_where(_tensors_of(snapshots), received, good)

    def _run_members(self, view: Tensor, members: list[int]) -> Tensor:
        """Return the logits of some members for a view, `P x B x C`; zeros for the others."""
        dtype = next(self.peers.parameters()).dtype
        zeros_PBC = torch.zeros(
            self.peers.num_peers, len(view), self.peers.num_classes, dtype=dtype, device=view.device
        )
        outputs = PeerOutputs(zeros_PBC, [])
        assert isinstance(self.peers, NetworkPeers)
        for index in members:
            self.peers.refresh(outputs, view.unsqueeze(0), index)
        return outputs.logits_PBC

    def _gather_rows(self, logits: Tensor) -> Tensor:
        """Return the logits `... x B x C` for the rows of all data ranks, where the method needs the full batch."""
        peers = self._trained[0]
        if not (peers.needs_full_batch and peers.mesh.num_data > 1 and self.training):
            return logits
        rows_BN = logits.movedim(-2, 0)
        whole = peers.gather_rows(rows_BN.flatten(1))
        return whole.unflatten(1, rows_BN.shape[1:]).movedim(0, -2)


def _tensors_of(members: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters and the running statistics of some members."""
    return [x for m in members for x in (*m.parameters(), *(b for b in m.buffers() if b.is_floating_point()))]
