"""What a run tells its surroundings: a reporter to listen with, and the run in a few lines."""

from __future__ import annotations

import warnings
from typing import Any

from codistill.config import MethodConfig
from codistill.mesh_peers import MeshPeers, imbalance
from codistill.setup import Training, deployed_name, numbers_trained_and_deployed


class Reporter:
    """What a run tells its surroundings; this one keeps silent."""

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Hear that the run starts (or goes on) at epoch `start`; `notes` describe it."""

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Hear of a log point: `loss` is the epoch's mean so far."""

    def epoch(self, line: dict[str, Any]) -> None:
        """Hear that an epoch is over; `line` is what metrics.jsonl holds of it."""

    def end(self, result: dict[str, Any]) -> None:
        """Hear that the run is complete."""


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
