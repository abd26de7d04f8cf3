"""`codistill train METHOD`: train one run, or one per seed."""

from __future__ import annotations

import dataclasses

from codistill.cli.console import RichReporter, members_table, out, show_progress
from codistill.cli.options import Parsed
from codistill.cli.recipe import options_with_recipe
from codistill.config import Config
from codistill.distributed import shutdown
from codistill.training import Result, describe_dry_run, train
from codistill.utils import set_progress_display


def run(parsed: Parsed) -> int:
    """Train the runs one after the other; the first rank of a mesh prints each run's test figures."""
    set_progress_display(show_progress)
    options = options_with_recipe(parsed)
    if parsed.dry_run:
        for line in describe_dry_run(options):
            out.print(line, highlight=False, markup=False)
        return 0
    for config in _configs_of_seeds(options, parsed.seeds):
        set_progress_display(show_progress)
        reporter = RichReporter()
        try:
            result = train(config, reporter)
        finally:
            reporter.stop()
        if result.training.mesh.rank == 0:
            _print_result(result)
    shutdown()
    return 0


def _configs_of_seeds(config: Config, seeds: int | None) -> list[Config]:
    """Return the config of every seed, in folders OUT/seed0, OUT/seed1, ...; without `--seeds` the config itself."""
    if seeds is None:
        return [config]
    base = config.resolved().out if config.out is None else config.out
    folder = str(base).removesuffix(f"-seed{config.seed}")
    return [dataclasses.replace(config, seed=s, out=f"{folder}/seed{s}") for s in range(seeds)]


def _print_result(result: Result) -> None:
    figures = result.figures
    title = f"test set, last epoch ({figures['epochs']} epochs, {figures['seconds']:.0f} s)"
    out.print(
        members_table(figures["test"], figures["deployed"], title, figures.get("test_swa", figures.get("test_ema")))
    )
    if "best_test" in figures:
        best = figures["best_test"]
        out.print(f"best test epoch ({best['epoch']}, chosen on the test set): {best['top1']:.2f} %")
    out.print(f"run folder: {result.folder}")
