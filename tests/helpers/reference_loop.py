"""What codistill's own training step makes of a few batches, for other loops to be compared with."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, optim

from codistill.methods import Method
from codistill.peers import Peers
from codistill.training.step import train_step
from codistill.training.student import deployed_network
from codistill.training.summary import holdout_outputs, part_loader
from helpers.method_cases import build, teacher_for

CASES = [
    ("independent", {}, "networks"),
    ("okddip", {}, "networks"),
    ("okddip", {}, "branches"),
    ("one", {}, "branches"),
    ("cl_ilr", {}, "branches"),
    ("pcl", {"ema_decay": 0.9}, "networks"),
    ("pcl", {"ema_decay": 0.9}, "branches"),
    ("kdcl", {}, "networks"),
    ("kdcl", {"target": "general", "holdout_fraction": 0.1}, "networks"),
    ("dml", {"update": "joint"}, "networks"),
    ("dml", {"update": "alternating"}, "networks"),
    ("codistillation", {"interval": 1, "interval_unit": "epochs", "burn_in_epochs": 0}, "networks"),
    ("switokd", {}, "networks"),
    ("kd", {}, "networks"),
]
NAMES = ["-".join((name, topology, *(str(v) for v in options.values()))) for name, options, topology in CASES]
EPOCHS = 2


def make_optimizer(parameters: Any) -> optim.Optimizer:
    """Return the optimizer of the reference."""
    return optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


@dataclass
class Reference:
    """Where training starts, the batches, and what comes out."""

    peers: Peers
    method: Method
    teacher: nn.Module | None
    batches: list[tuple[Tensor, Tensor]]
    """The same in every epoch."""
    holdout: list[tuple[Tensor, Tensor]]
    losses: list[float]
    """The loss of every step."""
    student: nn.Module
    """The deployed network after training."""
    trained: Peers


def train_reference(name: str, options: dict[str, Any], topology: str, **more: Any) -> Reference:
    """Train with the project's own step in float64."""
    place = {"branch_at": "norm"} if topology == "branches" else {}
    run = build(name, options, topology, model="tiny_network:Tiny,width=16", dtype="float64", lr=0.05, **place, **more)
    peers, method = copy.deepcopy(run.peers), copy.deepcopy(run.method)
    batches, losses = list(run.loader.epoch(0)), []
    holdout = list(part_loader(run, run.splits.holdout).epoch()) if "holdout" in method.needs else []
    for epoch in range(EPOCHS):
        for views, targets in batches:
            terms = train_step(run, views, targets, run.method.weight_at(epoch))
            run.progress.step += 1
            losses.append(float(terms["loss"].detach()))
        if holdout:
            run.method.update_on_holdout(*holdout_outputs(run))
        run.progress.epoch, run.progress.step = epoch + 1, 0
    teacher = teacher_for(name)
    teacher = teacher if teacher is None else teacher.double()
    return Reference(peers, method, teacher, batches, holdout, losses, deployed_network(run), run.peers)
