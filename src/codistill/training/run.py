"""Everything that a run consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import Config
from codistill.data import ImageSet, Loader, Mixer, Splits
from codistill.distributed import Mesh, MeshPeers
from codistill.methods import Method
from codistill.peers import MeanTeacher, Peers
from codistill.training.nonfinite_guard import FiniteGuard
from codistill.training.previous_batch import PreviousBatch
from codistill.training.step_graph import StepGraph
from codistill.utils import accumulation_dtype


@dataclass
class Progress:
    """How far a run has come, and its figures so far."""

    epoch: int = 0
    """Epochs done; the number of the current epoch, counted from 0."""
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    """Seconds spent in training steps."""
    best: dict[str, Any] | None = None
    """Figures of the best test epoch (protocol paper only)."""
    best_validation: dict[str, Any] | None = None
    """Figures of the best validation epoch, whose checkpoint is best.pt (where there is a validation part)."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over this epoch's samples, on the device: `loss`, `hits_P`, `distill_P`, and what the method reports."""


@dataclass
class Run:
    """Everything that a run consists of; `build_run` makes one."""

    config: Config
    mesh: Mesh
    """The ranks that train it; a `SingleProcess` where there is one process."""
    data: ImageSet
    splits: Splits
    loader: Loader
    peers: Peers
    method: Method
    optimizers: list[torch.optim.Optimizer]
    """One over everything, or where the method alternates one per local member; none in a run loaded to evaluate."""
    guard: FiniteGuard
    teacher: nn.Module | None = None
    ema: MeanTeacher | None = None
    average: MeanTeacher | None = None
    """An average of the peers' weights that is deployed and teaches nobody (`--deploy ema` or `swa`)."""
    previous: PreviousBatch | None = None
    """The batch of the step before, where the method needs it."""
    execution: str = "loop"
    """How the peers run in training: `loop` or `stacked`."""
    frozen: list[nn.Module] = field(default_factory=list)
    """Modules that do not change, running statistics included."""
    graph: StepGraph | None = None
    """Runs forward and backward as a captured CUDA graph; None: eagerly."""
    notes: list[str] = field(default_factory=list)
    """What set-up changed in the config, in sentences."""
    progress: Progress = field(default_factory=Progress)

    def __repr__(self) -> str:
        """Return what is trained, and how far it has come, on one line."""
        c, images = self.config, " without images" if self.data.provenance.placeholder_reason else ""
        count = f"{self.peers.num_peers} {c.topology}" if self.peers.num_peers > 1 else "1 network"
        members = f"{count} of {' + '.join(c.model)}"
        return f"Run({c.method.name}, {members} on {c.data}{images}, epoch {self.progress.epoch} of {c.epochs})"

    @property
    def student(self) -> nn.Module:
        """The one plain network that the run deploys, in evaluation mode."""
        from codistill.training.student import deployed_network  # which imports this module

        return deployed_network(self)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.mesh.device

    @cached_property
    def mixer(self) -> Mixer:
        """Mixes training batches and makes their labels soft, as the config asks."""
        c = self.config
        return Mixer(self.peers.num_classes, c.seed, c.mixup, c.cutmix, c.label_smoothing)

    @property
    def modules_with_buffers(self) -> list[nn.Module]:
        """The peers, their mean teachers where the method has them, and the average that is deployed."""
        return [self.peers, *(m for m in (self.ema, self.average) if m is not None)]

    @property
    def evaluated_average(self) -> MeanTeacher | None:
        """The averages that are evaluated: those that are deployed, else mean teachers that could be."""
        return self.average or (self.ema if self.config.method.keeps_ema else None)

    @property
    def members_apart(self) -> bool:
        """Whether this rank has no outputs of other ranks' members in training, and so no figures of them."""
        return isinstance(self.peers, MeshPeers) and self.peers.members_apart

    def add_over_ranks(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks of a figure that each has for its samples (and its members, if apart)."""
        total = self.mesh.sum_along_data(x)
        return self.mesh.sum_along_peer(total) if self.members_apart else total

    @property
    def steps_done(self) -> int:
        """Number of steps done in all epochs."""
        return self.progress.epoch * len(self.loader) + self.progress.step


def zero_sums(run: Run) -> dict[str, Tensor]:
    """Return the sums with which an epoch begins."""
    zeros_P = torch.zeros(run.peers.num_peers, dtype=accumulation_dtype(run.device), device=run.device)
    return {"loss": zeros_P.sum(), "hits_P": zeros_P.clone(), "distill_P": zeros_P.clone()}
