"""What measuring a run gives, and what a finished one leaves behind: figures, costs, and details for a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codistill.config.methods import MethodConfig
from codistill.distributed.peers import MeshPeers, imbalance
from codistill.evaluation.cost import deploying, training_flops
from codistill.evaluation.metrics import PeerMetrics
from codistill.peers.base import PeerOutputs
from codistill.peers.modes import eval_mode
from codistill.training.loaders import part_loader
from codistill.training.run import Training
from codistill.training.student import (
    deployed_figures,
    deployed_index,
    deployed_name,
    deployed_network,
    numbers_trained_and_deployed,
)
from codistill.utils.device import DTYPES


def describe(t: Training, resumed: str | None = None) -> list[str]:
    """Say in a few lines what is trained on what; warn where the distillation never reaches its weight.

    Args:
        t: What is trained.
        resumed: The checkpoint it goes on from, if it does.
    """
    config, method = t.config, t.method
    assert isinstance(config.method, MethodConfig)
    members = f"{t.peers.num_peers} {config.topology}" if t.peers.num_peers > 1 else "1 network"
    trained, deployed = numbers_trained_and_deployed(t)
    where = str(t.device) if t.mesh is None else f"{t.mesh.world} x {t.device.type} as {config.mesh}"
    notes = [
        f"{config.method.name}: {members} of {' + '.join(config.model)}, {trained:,} parameters trained; "
        f"deployed: {deployed_name(t)} ({deployed:,})",
        f"{config.data}: {t.splits.describe(t.data)}; augmentation: "
        f"{t.data.describe_augmentation(config.augment, config.cutout)}; protocol {config.protocol}",
        f"{config.epochs} epochs of {len(t.loader)} steps, batch {config.batch_size}, lr {config.lr:g}, "
        f"{config.schedule}{' at ' + ' '.join(map(str, config.milestones)) if config.milestones else ''}; "
        f"{config.dtype} on {where}, execution {t.execution}, seed {config.seed}",
    ]
    notes += t.data.notes
    unequal = t.data.imbalance(t.splits.train)
    if config.balanced_sampling:
        notes.append(f"every class is drawn equally often{f', though {unequal}' if unequal else ''}")
    elif unequal is not None:
        notes.append(f"{unequal}; --balanced-sampling draws all equally often")
    if method.ramp_epochs:
        notes.append(f"distillation weight ramps up to {method.weight:g} over {method.ramp_epochs:g} epochs")
        reached = method.weight_at(config.epochs - 1)
        if reached < 0.99 and (t.mesh is None or t.mesh.rank == 0):
            warnings.warn(
                f"the distillation weight only reaches {reached:.3g} of its full value in {config.epochs} epochs; "
                "shorten --method.ramp-epochs",
                stacklevel=2,
            )
    if isinstance(t.peers, MeshPeers) and t.mesh is not None:
        example = t.loader.first()[0][:1]
        if (said := imbalance(t.peers, example)) is not None and t.mesh.rank == 0:
            warnings.warn(said, stacklevel=2)
    if resumed is not None:
        notes.append(f"resumed at epoch {t.epoch}, step {t.step}, from {resumed}")
    return notes


MOST_CLASSES_IN_DETAIL = 100  # a confusion matrix of more classes cannot be looked at


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
