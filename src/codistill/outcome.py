"""What measuring a run gives, and what a finished one leaves behind: figures, costs, and details for a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codistill.cost import deploying, training_flops
from codistill.data import Loader
from codistill.mesh import Mesh
from codistill.mesh_peers import folded_members
from codistill.methods import Method
from codistill.metrics import PeerMetrics
from codistill.peers import PeerOutputs, Peers, eval_mode
from codistill.setup import (
    DTYPES,
    Training,
    deployed_figures,
    deployed_index,
    deployed_name,
    deployed_network,
    numbers_trained_and_deployed,
    part_loader,
)

MOST_CLASSES_IN_DETAIL = 100  # a confusion matrix of more classes cannot be looked at


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


@torch.inference_mode()
def holdout_outputs(t: Training) -> tuple[Tensor, Tensor]:
    """Return every member's logits on the holdout, `P x N x C`, in evaluation mode, and the labels."""
    loader = part_loader(t, t.splits.holdout)
    with eval_mode(t.peers):
        batches = [t.peers(views).logits_PBC for views, _ in loader.epoch()]
    none = t.loader.scale_C.new_zeros(t.peers.num_peers, 0, t.peers.num_classes)
    logits_PNC = torch.cat([none, *batches], 1)
    if t.mesh is not None:
        logits_PNC = t.mesh.all_samples(logits_PNC, len(t.splits.holdout))
    return logits_PNC, torch.from_numpy(t.data.y_train[t.splits.holdout]).to(t.device)


def outcome(t: Training, members: dict[str, Any], ema: dict[str, Any] | None) -> dict[str, Any]:
    """Return what result.json holds, but for the cost: figures of all members, mean teachers and the student."""
    trained, deployed = numbers_trained_and_deployed(t)
    figures: dict[str, Any] = {
        "deployed": deployed_name(t),
        "student": deployed_figures(t, members, ema),
        "protocol": t.config.protocol,
        "epochs": t.config.epochs,
        "test": members,
        "parameters_trained": trained,
        "parameters_deployed": deployed,
        "split": t.splits.describe(t.data),
        "augmentation": t.data.describe_augmentation(t.config.augment, t.config.cutout),
        "seconds": round(t.seconds, 3),
        "execution": t.execution,
    }
    if ema is not None:
        figures["test_ema"] = ema
    if t.best_validation is not None:
        figures["best_validation"] = t.best_validation
    if t.best is not None:
        figures["best_test"] = t.best
    return figures


def cost(t: Training, outputs_of: Callable[..., PeerOutputs]) -> dict[str, Any]:
    """Measure training and deploying; `outputs_of` runs the peers as the loop does.

    On a mesh no process holds all that is trained, so there these figures are left out.
    """
    if t.mesh is not None:
        return {"measured_on": f"{t.mesh.world} x {t.device.type}"}
    size = (t.data.channels, t.data.image_size, t.data.image_size)
    views = t.peers.num_peers if "views" in t.method.needs else 1
    zeros_VBCHW = torch.zeros(views, 2, *size, dtype=DTYPES[t.config.dtype], device=t.device)
    labels_B = torch.zeros(2, dtype=torch.int64, device=t.device)
    try:
        flops = training_flops(t.peers, t.method, outputs_of, zeros_VBCHW, labels_B)
    except RuntimeError:  # some networks of users have no backward in evaluation mode; their run counts all the same
        flops = None
    return {
        "training_flops_a_sample": flops,
        "samples_seen": t.loader.num_samples * t.config.epochs,
        "measured_on": str(t.device.type),
        **deploying(deployed_network(t), zeros_VBCHW[0, 0], t.peers.autocast),
    }


def details(t: Training, members: PeerMetrics, ema: PeerMetrics | None) -> dict[str, Any]:
    """Return the deployed one's reliability and confusion on the test set, the ensemble's reliability, the classes."""
    source = ema if t.config.deploy == "ema" and ema is not None else members
    row = -1 if t.config.deploy == "ensemble" else deployed_index(t)
    return {
        "deployed": deployed_name(t),
        "classes": list(t.data.classes),
        **source.details(row),
        "ensemble_reliability": members.details(-1)["reliability"] if t.peers.num_peers > 1 else [],
    }
