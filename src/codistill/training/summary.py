"""What measuring a run gives, and what a finished one leaves behind: figures, costs, and details for a report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codistill.config.methods import MethodConfig
from codistill.distributed.peers import MeshPeers, imbalance
from codistill.evaluation.cost import inference_cost, training_flops
from codistill.evaluation.metrics import PeerMetrics
from codistill.peers.base import PeerOutputs
from codistill.peers.modes import eval_mode
from codistill.training.loaders import part_loader
from codistill.training.run import Run
from codistill.training.student import (
    deployed_figures,
    deployed_index,
    deployed_name,
    deployed_network,
    numbers_trained_and_deployed,
)
from codistill.utils.device import DTYPES


def describe(run: Run, resumed: str | None = None) -> list[str]:
    """Say in a few lines what is trained on what; warn where the distillation never reaches its weight.

    Args:
        run: What is trained.
        resumed: The checkpoint it goes on from, if it does.
    """
    config, method = run.config, run.method
    assert isinstance(config.method, MethodConfig)
    members = f"{run.peers.num_peers} {config.topology}" if run.peers.num_peers > 1 else "1 network"
    trained, deployed = numbers_trained_and_deployed(run)
    where = str(run.device) if run.mesh is None else f"{run.mesh.world} x {run.device.type} as {config.mesh}"
    notes = [
        f"{config.method.name}: {members} of {' + '.join(config.model)}, {trained:,} parameters trained; "
        f"deployed: {deployed_name(run)} ({deployed:,})",
        f"{config.data}: {run.splits.describe(run.data)}; augmentation: "
        f"{run.data.describe_augmentation(augment=config.augment, cutout=config.cutout)}; protocol {config.protocol}",
        f"{config.epochs} epochs of {len(run.loader)} steps, batch {config.batch_size}, lr {config.lr:g}, "
        f"{config.schedule}{' at ' + ' '.join(map(str, config.milestones)) if config.milestones else ''}; "
        f"{config.dtype} on {where}, execution {run.execution}, seed {config.seed}",
    ]
    notes += run.data.provenance.messages
    unequal = run.data.imbalance(run.splits.train)
    if config.balanced_sampling:
        notes.append(f"every class is drawn equally often{f', though {unequal}' if unequal else ''}")
    elif unequal is not None:
        notes.append(f"{unequal}; --balanced-sampling draws all equally often")
    if method.ramp_epochs:
        notes.append(f"distillation weight ramps up to {method.weight:g} over {method.ramp_epochs:g} epochs")
        reached = method.weight_at(config.epochs - 1)
        if reached < 0.99 and (run.mesh is None or run.mesh.rank == 0):
            warnings.warn(
                f"the distillation weight only reaches {reached:.3g} of its full value in {config.epochs} epochs; "
                "shorten --method.ramp-epochs",
                stacklevel=2,
            )
    if isinstance(run.peers, MeshPeers) and run.mesh is not None:
        example = run.loader.sample_batch()[0][:1]
        if (said := imbalance(run.peers, example)) is not None and run.mesh.rank == 0:
            warnings.warn(said, stacklevel=2)
    if resumed is not None:
        notes.append(f"resumed at epoch {run.epoch}, step {run.step}, from {resumed}")
    return notes


MOST_CLASSES_IN_DETAIL = 100  # a confusion matrix of more classes cannot be looked at


@torch.inference_mode()
def holdout_outputs(run: Run) -> tuple[Tensor, Tensor]:
    """Return every member's logits on the holdout, `P x N x C`, in evaluation mode, and the labels."""
    loader = part_loader(run, run.splits.holdout)
    with eval_mode(run.peers):
        batches = [run.peers(views).logits_PBC for views, _ in loader.epoch()]
    none = run.loader.scale_C.new_zeros(run.peers.num_peers, 0, run.peers.num_classes)
    logits_PNC = torch.cat([none, *batches], 1)
    if run.mesh is not None:
        logits_PNC = run.mesh.all_samples(logits_PNC, len(run.splits.holdout))
    return logits_PNC, torch.from_numpy(run.data.y_train[run.splits.holdout]).to(run.device)


def outcome(run: Run, members: dict[str, Any], ema: dict[str, Any] | None) -> dict[str, Any]:
    """Return what result.json holds, but for the cost: figures of all members, mean teachers and the student."""
    trained, deployed = numbers_trained_and_deployed(run)
    figures: dict[str, Any] = {
        "deployed": deployed_name(run),
        "student": deployed_figures(run, members, ema),
        "protocol": run.config.protocol,
        "epochs": run.config.epochs,
        "test": members,
        "parameters_trained": trained,
        "parameters_deployed": deployed,
        "split": run.splits.describe(run.data),
        "augmentation": run.data.describe_augmentation(augment=run.config.augment, cutout=run.config.cutout),
        "seconds": round(run.seconds, 3),
        "execution": run.execution,
    }
    if ema is not None:
        figures["test_ema"] = ema
    if run.best_validation is not None:
        figures["best_validation"] = run.best_validation
    if run.best is not None:
        figures["best_test"] = run.best
    return figures


def cost(run: Run, outputs_of: Callable[..., PeerOutputs]) -> dict[str, Any]:
    """Measure training and deploying; `outputs_of` runs the peers as the loop does.

    On a mesh no process holds all that is trained, so there these figures are left out.
    """
    if run.mesh is not None:
        return {"measured_on": f"{run.mesh.world} x {run.device.type}"}
    size = (run.data.channels, run.data.image_size, run.data.image_size)
    views = run.peers.num_peers if "views" in run.method.needs else 1
    zeros_VBCHW = torch.zeros(views, 2, *size, dtype=DTYPES[run.config.dtype], device=run.device)
    labels_B = torch.zeros(2, dtype=torch.int64, device=run.device)
    try:
        flops = training_flops(run.peers, run.method, outputs_of, zeros_VBCHW, labels_B)
    except RuntimeError:  # some networks of users have no backward in evaluation mode; their run counts all the same
        flops = None
    return {
        "training_flops_a_sample": flops,
        "samples_seen": run.loader.num_samples * run.config.epochs,
        "measured_on": str(run.device.type),
        **inference_cost(deployed_network(run), zeros_VBCHW[0, 0], run.peers.autocast),
    }


def details(run: Run, members: PeerMetrics, ema: PeerMetrics | None) -> dict[str, Any]:
    """Return the deployed one's reliability and confusion on the test set, the ensemble's reliability, the classes."""
    source = ema if run.config.deploy == "ema" and ema is not None else members
    row = -1 if run.config.deploy == "ensemble" else deployed_index(run)
    return {
        "deployed": deployed_name(run),
        "classes": list(run.data.classes),
        **source.details(row),
        "ensemble_reliability": members.details(-1)["reliability"] if run.peers.num_peers > 1 else [],
    }
