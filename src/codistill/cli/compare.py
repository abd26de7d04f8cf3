"""`codistill compare` and `make demo`: methods side by side with baselines of equal cost."""

from __future__ import annotations

import dataclasses
import time

from codistill.cli.console import err, out, print_rows, progress_bar
from codistill.config import CompareConfig
from codistill.reproduce import (
    add_earlier_rows,
    check_comparison_folder,
    check_options,
    comparison_folder,
    comparison_rows,
    comparison_title,
    describe_comparison,
    differences_to_baselines,
    draw_gains,
    list_failures,
    plan_comparison,
    run_grid,
    summarize_comparison,
    write_comparison,
)
from codistill.utils import MachineError

LEGEND = (
    "top-1: the deployed member, mean ± deviation; vs equal cost: against the independent member with the same initial "
    "weights, among as many members, paired over seeds, ± 95 % t-interval, n.s. = not significant (Holm's correction "
    "over the table); passes: forwards and backwards of one plain network that a training step costs, so that unequal "
    "FLOPs show; ensemble and diversity: of all members, of okddip and ffsd without the leader; ECE: expected "
    "calibration error, 15 bins; diversity: mean L2 distance of softmaxes."
)


def compare(methods: list[str], config: CompareConfig) -> int:
    """Train every row and seed, print the table, and write it as Markdown and JSON into the grid's folder.

    Raises:
        InputError: the options cannot be used; nothing has been trained then.
        MachineError: some runs failed; the others, and the table, are kept.
    """
    check_options(config)
    folder = comparison_folder(config)
    cells = plan_comparison(methods, config)
    seeds = config.seed_range()
    check_comparison_folder(cells, seeds, folder)
    add_earlier_rows([], dataclasses.replace(config), folder)  # raises, before anything is trained
    start = time.perf_counter()
    for line in describe_comparison(cells, config, folder):
        err.print(line, style="dim")
    with progress_bar(err) as bar:
        task = bar.add_task(f"{len(cells)} rows x {config.seeds} seeds, epochs", total=None, note="")
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        run_grid(cells, seeds, folder, config.workers, show)
    cells = add_earlier_rows(cells, config, folder)
    rows = comparison_rows(cells)
    summary = summarize_comparison(cells, config.peers or 4)
    write_comparison(cells, config, folder, rows, summary)  # before printing, which may fail
    print_rows(rows, comparison_title(config))
    out.print(LEGEND)
    for line in draw_gains(differences_to_baselines(cells)):
        out.print(line, no_wrap=True)
    for sentence in summary:
        out.print(sentence)
    out.print(f"{time.perf_counter() - start:.0f} s in total; runs and table in {folder}")
    failures = list_failures(cells)
    if failures:
        raise MachineError("some runs failed: " + "; ".join(failures))
    return 0
