"""The recommended length, batches, learning rate and weight decay for images of one's own: `--recipe auto`.

The papers' 300 epochs at a learning rate of 0.1 were chosen for 50,000 images. docs/howto/recipe.md has what was
measured. Nothing here is a new option of a run: what is chosen becomes the plain values of its config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TypeVar

from codistill.config.config import Config

AnyConfig = TypeVar("AnyConfig", bound=Config)

RECIPE_OPTIONS = ("epochs", "batch_size", "lr", "schedule", "warmup_epochs", "weight_decay")
"""The options that the recipe chooses, each unless it is given."""
FULL_BATCH = 128
"""The papers' batch size, for which the learning rates below hold; others scale them with their square root."""
LEAST_STEPS = 6
"""Full batches that an epoch has at least; a smaller set gets smaller batches, down to `LEAST_BATCH`."""
LEAST_BATCH = 8
LEARNING_RATES = {"sgd": (0.1, 0.02), "adamw": (1e-3, 1e-4)}
"""From scratch, and for a pretrained network."""
WEIGHT_DECAYS = {"sgd": (1e-3, 1e-4), "adamw": (0.05, 0.05)}
LARGEST_SCALE = 2.0
"""Largest factor on the learning rate for a large batch."""
UPDATES = (70.0, 20.0)
"""Budget of updates, times the square root of the number of images: from scratch, and for a pretrained network."""
EPOCHS = ((30, 100), (10, 30))
"""Fewest and most epochs: from scratch, and for a pretrained network."""


def choose_recipe(config: AnyConfig, images: int, given: Collection[str] = ()) -> tuple[AnyConfig, str]:
    """Return a config with the recommended values, and a sentence on what was chosen and why.

    Args:
        config: The options of a run.
        images: Number of training images, without validation.
        given: Names of options that keep their values.

    >>> config, reason = choose_recipe(Config("okddip", "resnet8", "folder:photos"), images=540)
    >>> config.epochs, config.batch_size, config.lr, config.schedule
    (100, 64, 0.071, 'cosine')
    """
    pretrained = config.pretrained or config.weights is not None
    values = {name: getattr(config, name) for name in given if name in RECIPE_OPTIONS}
    batch = values.setdefault("batch_size", choose_batch_size(images))
    steps = math.ceil(images / batch)
    values.setdefault("epochs", choose_epochs(images, steps, pretrained=pretrained))
    scale = min(math.sqrt(batch / FULL_BATCH), LARGEST_SCALE) if config.lr_base_batch is None else 1.0
    values.setdefault("lr", float(f"{LEARNING_RATES[config.optimizer][pretrained] * scale:.2g}"))
    values.setdefault("weight_decay", WEIGHT_DECAYS[config.optimizer][pretrained])
    values.setdefault("schedule", "step" if "milestones" in given else "cosine")
    values.setdefault("warmup_epochs", float(max(1, round(values["epochs"] / 20))))
    chosen = dataclasses.replace(config, **values)
    return chosen, _describe(chosen, images, steps, given, pretrained=pretrained)


def choose_batch_size(images: int) -> int:
    """Return the largest power of two up to 128 with which an epoch has 6 full batches, or 8 where none has.

    >>> [choose_batch_size(images) for images in (5, 90, 300, 900, 50_000)]
    [5, 8, 32, 128, 128]
    """
    size = FULL_BATCH
    while size > LEAST_BATCH and size * LEAST_STEPS > images:
        size //= 2
    return max(min(size, images), 1)


def choose_epochs(images: int, steps: int, *, pretrained: bool) -> int:
    """Return the number of epochs whose updates are the budget for so many images, within bounds.

    Args:
        images: Number of training images.
        steps: Updates in an epoch.
        pretrained: Whether training starts from given weights.

    >>> [choose_epochs(n, -(-n // 128), pretrained=False) for n in (900, 50_000, 1_281_167)]
    [100, 40, 30]
    """
    fewest, most = EPOCHS[pretrained]
    return min(max(round(UPDATES[pretrained] * math.sqrt(images) / steps), fewest), most)


def _describe(config: Config, images: int, steps: int, given: Collection[str], *, pretrained: bool) -> str:
    """Return what was chosen and why, in one sentence."""
    words = {
        "epochs": f"{config.epochs} epochs",
        "batch_size": f"batch {config.batch_size}",
        "lr": f"lr {config.lr:g}",
        "schedule": f"{config.schedule} schedule",
        "warmup_epochs": f"{config.warmup_epochs:g} of them warm-up",
        "weight_decay": f"weight decay {config.weight_decay:g}",
    }
    order = ("epochs", "warmup_epochs", "batch_size", "lr", "weight_decay", "schedule")
    chosen = ", ".join(words[name] for name in order if name not in given) or "nothing, since all is given"
    start = "a pretrained network" if pretrained else "a network from scratch"
    return (
        f"--recipe auto: {chosen}; for {images:,} training images ({config.epochs * steps:,} updates), "
        f"{config.optimizer} and {start}. --recipe paper takes the papers' 300 epochs at 0.1"
    )
