"""`codistill demo`: the comparison that `make demo` runs."""

from __future__ import annotations

import dataclasses

from codistill.cli.compare import compare
from codistill.cli.option_types import DemoOptions
from codistill.cli.options import Parsed
from codistill.reproduce import METHODS, demo


def run(parsed: Parsed) -> int:
    """Compare the demo's methods with baselines of equal cost."""
    options: DemoOptions = parsed.options
    recipe = demo(options.data)
    config = dataclasses.replace(
        recipe,
        data_dir=options.data_dir,
        out=options.out or f"demo/{options.data}",
        seeds=recipe.seeds if options.seeds is None else options.seeds,
        workers=options.workers,
    )
    return compare(METHODS, config)
