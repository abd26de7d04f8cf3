"""`--recipe`: which length, batches and learning rate a run gets where the command line leaves them open."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from codistill.config import RECIPE_OPTIONS, Config, choose_recipe
from codistill.training.loaders import load_images

AnyConfig = TypeVar("AnyConfig", bound=Config)


def apply_recipe(
    config: AnyConfig, recipe: str | None, given: Collection[str], earlier: Path | None = None
) -> tuple[AnyConfig, str | None]:
    """Return a config with what the recipe chooses, and a sentence about it; None where it chooses nothing.

    Without a recipe, images of one's own (folder:, npz:) get `auto` unless epochs or lr is given; all else gets
    `paper`, which is the config as it is. What was begun goes on with the values that it was begun with.

    Args:
        config: The options of a run.
        recipe: auto, paper, or None where it was not given.
        given: Names of the options that were given, which keep their values.
        earlier: The config.json of an earlier start of the same run; it need not exist.

    Raises:
        InputError: the images cannot be read.
    """
    own_images = config.data.startswith(("folder:", "npz:"))
    if recipe == "paper" or (recipe is None and (not own_images or {"epochs", "lr"} & {*given})):
        return config, None
    if earlier is not None and earlier.is_file():
        stored = Config.from_file(earlier, without_code=True)
        values = {name: getattr(stored, name) for name in RECIPE_OPTIONS if name not in given}
        kept = dataclasses.replace(config, **values)
        return kept, (
            f"{earlier.parent} goes on as it was begun: {kept.epochs} epochs, batch {kept.batch_size}, lr {kept.lr:g}"
        )
    return choose_recipe(config, count_training_images(config), given)


def count_training_images(config: Config) -> int:
    """Return the number of images that a run trains on; a folder is listed and not decoded.

    Raises:
        InputError: the images cannot be read, or the options contradict each other.
    """
    counted = dataclasses.replace(config, batch_size=1).resolved()
    if counted.data.startswith("folder:"):
        counted.data_pipeline = "files"
    _, splits = load_images(counted, None, None)
    return len(splits.train)
