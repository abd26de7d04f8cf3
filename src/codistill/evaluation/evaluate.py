"""Evaluating all members on a data set."""

from __future__ import annotations

import torch

from codistill.data import Loader
from codistill.distributed import Mesh, MeshPeers
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.evaluation.metrics import PeerMetrics
from codistill.methods import Method
from codistill.peers import Peers, eval_mode

MANY_PIXELS_ON_GPU = 500_000_000
"""Pixels of a data set below which a GPU evaluates it in less time than the host needs to fold the networks."""


def evaluate_peers(peers: Peers, method: Method, loader: Loader, mesh: Mesh, *, detail: bool = False) -> PeerMetrics:
    """Run every member and the method's ensemble over a data set and return the metrics of all its samples.

    Args:
        peers: What is evaluated, in evaluation mode.
        method: It makes the ensemble.
        loader: The samples; on a mesh, those of this data rank.
        mesh: The ranks, whose metrics are added.
        detail: Also accumulate a confusion matrix.
    """
    metrics = PeerMetrics(peers.num_peers, peers.num_classes, method.group, loader.device, detail)
    with eval_mode(peers), eval_mode(method), torch.inference_mode():
        folded = fold_members(peers, loader)
        for views_VBCHW, targets_B in loader.epoch():
            outputs = folded(views_VBCHW)
            metrics.update(outputs.logits_PBC, targets_B, method.ensemble(outputs))
    if mesh.num_data > 1:
        metrics.add_up(mesh.sum_along_data)
    return metrics


def fold_members(peers: Peers, loader: Loader) -> Peers:
    """Return peers with the same outputs that evaluate faster; this process folds its own members.

    Args:
        peers: In evaluation mode.
        loader: Samples to try the members on; without any, `peers` is returned as it is.
    """
    if not len(loader):
        return peers
    example_BCHW = loader.sample_batch()[0][:2]
    pixels = loader.num_samples * example_BCHW.shape[-1] * example_BCHW.shape[-2]
    if example_BCHW.device.type == "cuda" and pixels < MANY_PIXELS_ON_GPU:
        return peers
    local = folded_for_evaluation(peers.local, example_BCHW)
    return peers.with_members(local) if isinstance(peers, MeshPeers) else local
