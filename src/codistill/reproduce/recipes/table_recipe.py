"""The recipe of a published table, and its smaller scales. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from codistill.config import Config
from codistill.utils import InputError, suggest

IMAGENET = "folder:imagenet"
"""In recipes, the data set of the user: --data-dir names its folder."""

Scale = Literal["smoke", "short", "full"]
# Training images per class at scale `short`: about a fifth of the set; 200 for ImageNet, whose classes differ in size.
SHORT_IMAGES = {"cifar10": 1000, "cifar100": 100, IMAGENET: 200}
SCALES = {
    "smoke": "smoke: digits instead of the paper's images, resnet8 instead of its networks, 4 epochs of batch 48",
    "short": "short: a tenth of the paper's epochs and about a fifth of its training images",
    "full": "full: the paper's schedule and images",
}


@dataclass(frozen=True)
class CellRef:
    """A figure of a run, and its row and column in the published table."""

    row: str
    column: str
    subject: str
    """The measured network, named alike in all methods: a difference to a baseline compares equal subjects."""
    source: str = "student"
    """student (the deployed member), members (their mean), ensemble, gain, or a member's index."""
    reported: str | None = None
    """The source that the paper's own code reports, if it differs; used with --protocol paper."""
    metric: Literal["top1", "top5", "parameters"] = "top1"


@dataclass(frozen=True)
class TableRecipe:
    """One published table: its cells, and the config of each."""

    config: Callable[[str, str], Config]
    """(network, method) -> the run's config, at full scale."""
    networks: tuple[str, ...]
    methods: tuple[str, ...]
    cell_refs: Callable[[str, str], tuple[CellRef, ...]]
    equal_cost: Mapping[str, str] = field(default_factory=dict)
    """Method -> its baseline of equal training cost; baselines that the paper does not list are added to the table."""
    teachers: Mapping[str, str] = field(default_factory=dict)
    """Method -> the cell of the same network whose run is its teacher."""
    guesses: tuple[str, ...] = ()
    """Choices of the recipe: what the sources do not state, and where it deviates from them."""

    def select_cells(self, networks: tuple[str, ...], methods: tuple[str, ...], table: str) -> list[tuple[str, str]]:
        """Return the selected (network, method) pairs; an empty selection means all.

        Raises:
            InputError: the table has no such network or method.
        """
        known = (*self.methods, *(b for b in self.equal_cost.values() if b not in self.methods))
        for flag, names, choices in (("--network", networks, self.networks), ("--method", methods, known)):
            for name in names:
                if name not in choices:
                    raise InputError(f'{flag}: {table} has no "{name}"{suggest(name, choices)}')
        return [
            (n, m) for n in dict.fromkeys(networks or self.networks) for m in dict.fromkeys(methods or self.methods)
        ]


def with_imagenet_schedule(config: Config) -> Config:
    """Return the config with the common ImageNet schedule, for papers that state none; branches are the last stage."""
    fork = ("layer4",) if config.topology == "branches" else ()
    schedule = {"epochs": 90, "milestones": (30, 60), "batch_size": 256, "weight_decay": 1e-4}
    return dataclasses.replace(config, image_size=224, branch_at=fork, **schedule)


def scale_config(config: Config, scale: Scale) -> Config:
    """Return the config at a scale of `SCALES`; ramps and milestones shrink with the epochs."""
    if scale == "full":
        return config
    if scale == "smoke":
        # Of batches of 48, the last one of an epoch has 35 images or more, whatever part of the digits is held back.
        # resnet8 has three stages, so forks in front of stages 3 and 4 move one stage down.
        forks = tuple(f"layer{int(f[-1]) - 1}" if "layer4" in config.branch_at else f for f in config.branch_at)
        small = {
            "data": "digits",
            "image_size": None,
            "model": ("resnet8",) * len(config.model),
            "branch_at": forks,
            "lr": 0.05,
            "sampler": "uniform" if config.sampler == "uniform" else "pairs:6",  # of 8 of the digits' 10 classes
        }
        return dataclasses.replace(config, **small, epochs=4, batch_size=48, milestones=None, warmup_epochs=0.0)
    tenth = max(config.epochs // 10, 2)
    milestones = config.milestones and tuple(max(m * tenth // config.epochs, 1) for m in config.milestones)
    return dataclasses.replace(
        config,
        epochs=tenth,
        milestones=milestones,
        warmup_epochs=config.warmup_epochs * tenth / config.epochs,
        train_per_class=SHORT_IMAGES[config.data],
    )
