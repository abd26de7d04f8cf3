"""`--recipe` of `train` and `compare`: the options that are left open, chosen before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codistill.cli.console import err
from codistill.cli.options import Parsed
from codistill.config import CompareConfig
from codistill.reproduce import comparison_folder
from codistill.training import apply_recipe
from codistill.utils import environment_number


def options_with_recipe(parsed: Parsed) -> Any:
    """Return the options with what --recipe chooses, and say what that is; what goes on keeps its values.

    Raises:
        InputError: the images cannot be read.
    """
    chosen, sentence = apply_recipe(parsed.options, parsed.recipe, parsed.given, _earlier_config(parsed))
    if sentence is not None and environment_number("RANK", 0) == 0:
        err.print(sentence)
    return chosen


def _earlier_config(parsed: Parsed) -> Path | None:
    """Return the config.json of an earlier start of the same run or comparison, None where there is none."""
    config = parsed.options
    if isinstance(config, CompareConfig):
        return next(iter(sorted(comparison_folder(config).rglob("config.json"))), None)
    if config.resume is None:
        return None
    folder = Path(str(config.resolved().out if config.resume == "auto" else config.resume))
    return folder / "seed0" / "config.json" if parsed.seeds else folder / "config.json"
