"""Everything a run works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.data import ImageSet, Loader, Splits
from codistill.data.mixup import Mixer
from codistill.distributed.mesh import Mesh
from codistill.methods import Method
from codistill.peers.base import Peers
from codistill.peers.ema import MeanTeacher
from codistill.runs.checkpoint import restore_rng
from codistill.training import mesh_state
from codistill.training.nonfinite_guard import FiniteGuard
from codistill.utils.device import accumulation_dtype
from codistill.utils.errors import InputError


@dataclass
class Run:
    """Everything a run works with."""

    config: Config
    device: torch.device
    data: ImageSet
    splits: Splits
    loader: Loader
    peers: Peers
    method: Method
    optimizers: list[torch.optim.Optimizer]
    """One over everything, or one a member where the method alternates."""
    guard: FiniteGuard
    teacher: nn.Module | None = None
    ema: MeanTeacher | None = None
    execution: str = "loop"
    frozen: list[nn.Module] = field(default_factory=list)
    """Modules that stay as they are, running statistics included."""
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    """Figures of the best test epoch (protocol paper only)."""
    best_validation: dict[str, Any] | None = None
    """Figures of the best validation epoch, whose checkpoint is best.pt (where there is a validation part)."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    mesh: Mesh | None = None
    """The place among several processes, where there are."""

    @cached_property
    def mixer(self) -> Mixer:
        """Mixes training batches and makes their labels soft, as the config asks."""
        c = self.config
        return Mixer(self.peers.num_classes, c.seed, c.mixup, c.cutmix, c.label_smoothing)

    def state(self) -> dict[str, Any] | None:
        """Return all that a continuation needs, on whatever mesh; only the first rank gets it."""
        if self.mesh is not None:
            return mesh_state.gathered(self, self.mesh)
        return {
            "peers": self.peers.state_dict(),
            "method": self.method.state_dict(),
            "execution": self.execution,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizers": self._optimizer_states(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "best_validation": self.best_validation,
            "skipped": self.guard.skipped,
            "sums": self.sums,
        }

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """Return the optimisers' states in the one form that every execution and mesh reads: an entry a member."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return (
            states
            if self.peers.stacked_runner is None
            else [self.peers.stacked_runner.split_optimizer(s) for s in states]
        )

    def _own_form(self, held: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimiser's saved state as this execution has it.

        Raises:
            InputError: it is a stacked run's of schema 1, whose optimiser was not yet kept a member.
        """
        runner, count = self.peers.stacked_runner, [len(group["params"]) for group in optimizer.param_groups]
        same = [len(group["params"]) for group in held["param_groups"]] == count
        if runner is None and not same:
            raise InputError(
                "--resume: the checkpoint was written with --execution stacked by an early version; give it"
            )
        return held if same or runner is None else runner.join_optimizer(held)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned, on this mesh or another."""
        if self.mesh is not None:
            mesh_state.load(self, self.mesh, state)
            return
        self.peers.load_state_dict(state["peers"])
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(self._own_form(held, optimizer))
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.best, self.best_validation = state["best"], state.get("best_validation")
        self.guard.go_on(state.get("skipped", 0))
        wide = accumulation_dtype(self.device)
        held = {n: v.to(wide) if v.is_floating_point() else v for n, v in state["sums"].items()}
        self.sums = {name: value.to(self.device) for name, value in held.items()}
        restore_rng(state["rng"])
