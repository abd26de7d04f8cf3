"""Measuring all members on a set."""

from __future__ import annotations

from typing import Any

import torch

from codistill.data import Loader
from codistill.distributed.mesh import Mesh
from codistill.distributed.peers import MeshPeers
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.evaluation.metrics import PeerMetrics
from codistill.methods import Method
from codistill.peers.base import Peers
from codistill.peers.modes import eval_mode


def folded_members(peers: Peers, loader: Loader) -> Peers:
    """Return peers that evaluate faster; on a mesh each rank sees to its own, if it has a sample to try them on."""
    if not len(loader):
        return peers
    example = loader.first()[0][:2]
    if not isinstance(peers, MeshPeers):
        return folded_for_evaluation(peers, example)
    return peers.with_members(folded_for_evaluation(peers.local, example))


def collect(
    peers: Peers, method: Method, loader: Loader, mesh: Mesh | None = None, detail: bool = False
) -> PeerMetrics:
    """Run every member and the method's ensemble over a set (on a mesh, each rank over its part); return the sums."""
    metrics = PeerMetrics(peers.num_peers, peers.num_classes, method.group, loader.device, detail)
    with eval_mode(peers), eval_mode(method), torch.inference_mode():
        folded = folded_members(peers, loader)
        for views_VBCHW, targets_B in loader.epoch():
            outputs = folded(views_VBCHW)
            metrics.update(outputs.logits_PBC, targets_B, method.ensemble(outputs))
    if mesh is not None:
        metrics.add_up(mesh.sum_along_data)
    return metrics


def validate(peers: Peers, method: Method, loader: Loader, mesh: Mesh | None = None) -> dict[str, Any]:
    """Measure every member and the method's ensemble on a set; on a mesh, each rank on its part of it."""
    return collect(peers, method, loader, mesh).compute()
