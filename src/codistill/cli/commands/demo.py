"""`codistill demo`: the comparison that `make demo` runs."""

from __future__ import annotations

import dataclasses

from codistill.cli.compare import compare
from codistill.cli.options import DemoOptions, Parsed
from codistill.reproduce.recipes.demo import METHODS, demo


def run(parsed: Parsed) -> int:
    """Compare the demo's methods with baselines of equal cost."""
    options: DemoOptions = parsed.options
    config = dataclasses.replace(
        demo(options.data),
        data_dir=options.data_dir,
        out=options.out or f"demo/{options.data}",
        seeds=options.seeds,
        workers=options.workers,
    )
    return compare(METHODS, config)
