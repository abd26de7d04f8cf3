"""`codistill check`: whether this machine computes what it should.

Every method's loss and gradients, on fixed weights and images, are compared with figures that this package holds
(`self_check.json`, float64 on a CPU), and a small run of two steps is trained, evaluated and deployed. The weights are
sines, so that nothing depends on how a version of torch draws random numbers.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from codistill.config import METHODS, Config, Device, OKDDipConfig, TeacherConfig
from codistill.data import ImageSet
from codistill.peers import NetworkPeers
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import Run
from codistill.training.step import forward_all
from codistill.utils import explain_failure, first_line, on_one_line, pick_device

Figures = dict[str, list[float]]
FIGURES = "self_check.json"
ALLOWED = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference from the stored figures, in parts of the largest of the figures compared."""
IMAGES, CLASSES, BATCH, PEERS = 24, 4, 12, 3


@dataclass(frozen=True)
class CheckRow:
    """The outcome of one check."""

    what: str
    passed: bool
    outcome: str
    """What was found, in words."""


def check_machine(device: Device = "auto") -> Iterator[CheckRow]:
    """Yield the outcome of every check, one after the other.

    Args:
        device: Where to compute.

    Raises:
        InputError: the device does not exist here.

    >>> row = next(check_machine("cpu"))
    >>> row.what, row.passed
    ('independent, networks', True)
    """
    where = pick_device(device)
    stored = read_figures()
    for name, config in METHODS.items():
        for topology in config.topologies:
            what = f"{name}, {topology}"
            yield _caught(what, partial(_compare_figures, name, topology, where, stored.get(what)))
    yield _caught("two steps of okddip", partial(_train_two_steps, device))


def read_figures() -> dict[str, Figures]:
    """Return the figures that the package holds, by "method, topology"."""
    stored: dict[str, Figures] = json.loads(files("codistill.training").joinpath(FIGURES).read_text(encoding="utf-8"))
    return stored


def compute_figures(name: str, topology: str, device: torch.device) -> Figures:
    """Return a method's losses on fixed weights and images, and what identifies its gradients.

    Args:
        name: The method.
        topology: networks or branches.
        device: Where to compute, in float64 where the device has it.

    Returns:
        `loss` and each member's `loss_P`; the `gradient` of the loss with respect to all parameters, as its norm and
        its products with two fixed vectors.
    """
    run = _build_fixed_run(name, topology, device)
    views_VBCHW, targets_B = next(iter(run.loader.epoch()))
    if run.previous is not None:  # as if the same batch had been the one before
        made_PBC = _sines(run.previous.logits_PBC[:, : len(targets_B)].numel(), 0).view(-1, len(targets_B), CLASSES)
        run.previous.store(views_VBCHW, targets_B, made_PBC)
        run.previous.rows = len(targets_B)
    terms = run.method(forward_all(run, views_VBCHW), targets_B, 1.0)
    parameters = [p for p in (*run.peers.parameters(), *run.method.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(terms["loss"], parameters, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])
    flat = flat.cpu().double()
    products = [float(flat @ _sines(len(flat), phase)) for phase in (0, 1)]
    return {
        "loss": [terms["loss"].item()],
        "loss_P": terms["loss_P"].tolist(),
        "gradient": [float(flat.norm()), *products],
    }


def _build_fixed_run(name: str, topology: str, device: torch.device) -> Run:
    """Return a run of resnet8 on made images, with fixed weights."""
    method = METHODS[name](**({"own_views": True} if topology == "twins" else {}))  # resnet8 has no drop path
    single = isinstance(method, TeacherConfig) and topology == "networks"
    config = Config(
        method,
        "resnet8",
        topology=topology,  # type: ignore[arg-type]
        peers=1 if single else min(PEERS, method.max_peers or PEERS),
        batch_size=BATCH,
        val_fraction=0.0,
        dtype=_widest(device),
        device=device.type,  # type: ignore[arg-type]
        execution="loop",
        cuda_graph=False,
    )
    teacher = None
    if isinstance(method, TeacherConfig):
        teacher = NetworkPeers("resnet8", 1, CLASSES, in_channels=1, image_size=8).export_member(0)
    run = build_run(config.resolved(), teacher, data=make_images())
    for phase, module in enumerate((run.peers, run.method, run.teacher, run.ema)):
        if module is not None:
            set_fixed_weights(module, 100 * phase)
    run.peers.train()
    run.method.train()
    return run


def _widest(device: torch.device) -> Literal["float32", "float64"]:
    return "float32" if device.type == "mps" else "float64"


def make_images() -> ImageSet:
    """Return a small set of gray images, 8 x 8, whose pixels follow a formula."""
    place = np.arange(IMAGES * 64).reshape(IMAGES, 8, 8, 1)
    pixels = (place * place * 7919 % 251).astype(np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    return ImageSet("python:check", pixels, labels, 255 - pixels, labels, tuple("abcd"), pad=1)


@torch.no_grad()
def set_fixed_weights(module: nn.Module, phase: int) -> None:
    """Set every parameter of a module: matrices to sines of the usual size, the rest near 0 (biases) or 1."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        values = _sines(parameter.numel(), phase + number).view(parameter.shape)
        if parameter.dim() > 1:
            values = values * math.sqrt(2.0 / parameter[0].numel())
        else:
            values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        parameter.copy_(values)


def _sines(count: int, phase: int) -> Tensor:
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 1.7 + phase)


def _compare_figures(name: str, topology: str, device: torch.device, stored: Figures | None) -> CheckRow:
    what = f"{name}, {topology}"
    if stored is None:
        return CheckRow(what, passed=False, outcome="no figures are stored")
    figures = compute_figures(name, topology, device)
    difference = max(relative_difference(figures[key], stored[key]) for key in stored)
    allowed = ALLOWED[torch.float32 if _widest(device) == "float32" else torch.float64]
    return CheckRow(what, difference <= allowed, f"differs by {difference:.1e} ({allowed:.0e} is allowed)")


def relative_difference(values: list[float], stored: list[float]) -> float:
    """Return the largest difference of two lists of numbers, in parts of the largest stored number.

    >>> relative_difference([1.0, 4.0], [1.0, 5.0]), relative_difference([float("nan")], [1.0])
    (0.2, inf)
    """
    differences = [abs(a - b) for a, b in zip(values, stored, strict=True)]
    largest = max(differences) / max(map(abs, stored), default=1.0)
    return largest if all(map(math.isfinite, differences)) else math.inf


def _train_two_steps(device: Device) -> CheckRow:
    """Train, checkpoint, evaluate and deploy a small run, in a folder that is deleted again."""
    with tempfile.TemporaryDirectory() as out:
        config = Config(
            OKDDipConfig(ramp_epochs=0.0),
            "resnet8",
            peers=PEERS,
            epochs=1,
            batch_size=BATCH,
            val_fraction=0.0,
            device=device,
            out=out,
        )
        result = train(config, data=make_images())
        loss = result.training.progress.sums["loss"].item() / IMAGES
        logits_BC = result.student(result.training.loader.sample_batch()[0])
        passed = math.isfinite(loss) and bool(logits_BC.isfinite().all())
        seconds = result.figures["seconds"]
        where = result.training.device
    return CheckRow("two steps of okddip", passed, f"mean loss {loss:.4f} on {where}, {seconds:.2f} s")


def _caught(what: str, check: Callable[[], CheckRow]) -> CheckRow:
    """Run a check; what it raises is its outcome."""
    try:
        return check()
    except Exception as error:
        sentence, _ = explain_failure(error)
        return CheckRow(
            what, passed=False, outcome=on_one_line(sentence or f"{type(error).__name__}: {first_line(error)}")
        )
