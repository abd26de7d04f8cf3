"""What a recipe of a published table consists of, and how it is made smaller. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from codistill.config.config import Config
from codistill.utils.errors import InputError, suggest

IMAGENET = "folder:imagenet"
"""Stands in recipes for the user's own copy: --data-dir says where it lies."""

Scale = Literal["smoke", "short", "full"]
# Training images a class that `short` keeps: about a fifth of the set, or what ImageNet's smallest class affords.
SHORT_IMAGES = {"cifar10": 1000, "cifar100": 100, IMAGENET: 200}
SCALES = {
    "smoke": "smoke: digits instead of the paper's images, resnet8 instead of its networks, 4 epochs of batch 64",
    "short": "short: a tenth of the paper's epochs and about a fifth of its training images",
    "full": "full: the paper's schedule and images",
}


@dataclass(frozen=True)
class CellRef:
    """A figure of a run, and where it stands in the published table."""

    row: str
    column: str
    subject: str
    """What is measured, by one name in all methods: differences to a baseline are taken for the same subject."""
    figure: str = "student"
    """student (the member deployed), members (their mean), ensemble, gain, or a member's number."""
    reported: str | None = None
    """What the paper's own code reports here, where that is something else; shown under --protocol paper."""
    metric: Literal["top1", "top5", "parameters"] = "top1"


@dataclass(frozen=True)
class TableRecipe:
    """One published table: its cells, and how each is trained."""

    config: Callable[[str, str], Config]
    """(network, method) -> the run's config, at full scale."""
    networks: tuple[str, ...]
    methods: tuple[str, ...]
    places: Callable[[str, str], tuple[CellRef, ...]]
    equal_cost: Mapping[str, str] = field(default_factory=dict)
    """Method -> the baseline that trains as much as it does; baselines that no paper lists are added to the table."""
    teachers: Mapping[str, str] = field(default_factory=dict)
    """Method -> the cell of the same network whose run is its teacher."""
    guesses: tuple[str, ...] = ()
    """What the sources leave open and the recipe had to choose."""

    def pick(self, networks: tuple[str, ...], methods: tuple[str, ...], table: str) -> list[tuple[str, str]]:
        """Return the (network, method) pairs asked for; nothing asked for means all.

        Raises:
            InputError: the table has no such network or method.
        """
        known = (*self.methods, *(b for b in self.equal_cost.values() if b not in self.methods))
        for flag, asked, there in (("--network", networks, self.networks), ("--method", methods, known)):
            for name in asked:
                if name not in there:
                    raise InputError(f'{flag}: {table} has no "{name}"{suggest(name, there)}')
        return [
            (n, m) for n in dict.fromkeys(networks or self.networks) for m in dict.fromkeys(methods or self.methods)
        ]


def on_imagenet(config: Config) -> Config:
    """Return the config with a usual ImageNet schedule, where no source states one; branches fork at the last stage."""
    fork = ("layer4",) if config.topology == "branches" else ()
    schedule = {"epochs": 90, "milestones": (30, 60), "batch_size": 256, "weight_decay": 1e-4}
    return dataclasses.replace(config, image_size=224, branch_at=fork, **schedule)


def scaled(config: Config, scale: Scale) -> Config:
    """Return the config made smaller as `SCALES` says; ramps and milestones shrink with the epochs."""
    if scale == "full":
        return config
    if scale == "smoke":
        # resnet8 has three stages, so forks in front of stages 3 and 4 move one stage down.
        forks = tuple(f"layer{int(f[-1]) - 1}" if "layer4" in config.branch_at else f for f in config.branch_at)
        small = {
            "data": "digits",
            "image_size": None,
            "model": ("resnet8",) * len(config.model),
            "branch_at": forks,
            "lr": 0.05,
        }
        return dataclasses.replace(config, **small, epochs=4, batch_size=64, milestones=None, warmup_epochs=0.0)
    tenth = max(config.epochs // 10, 2)
    milestones = config.milestones and tuple(max(m * tenth // config.epochs, 1) for m in config.milestones)
    return dataclasses.replace(
        config,
        epochs=tenth,
        milestones=milestones,
        warmup_epochs=config.warmup_epochs * tenth / config.epochs,
        train_per_class=SHORT_IMAGES[config.data],
    )
