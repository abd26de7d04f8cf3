"""`codistill compare` and `make demo`: methods side by side with baselines of equal cost."""

from __future__ import annotations

import time

from codistill.cli.console import err, out, print_rows, progress_bar
from codistill.config import CompareConfig
from codistill.reproduce import (
    check_comparison_folder,
    check_options,
    comparison_folder,
    comparison_rows,
    comparison_sentences,
    comparison_title,
    describe_comparison,
    list_failures,
    plan_comparison,
    run_grid,
    write_comparison,
)
from codistill.utils import MachineError

LEGEND = (
    "top-1: the deployed member, mean ± deviation; vs equal cost: paired over seeds, ± 95 % t-interval, n.s. = no "
    "significant difference; ECE: expected calibration error, 15 bins; diversity: mean L2 distance of softmaxes."
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
    check_comparison_folder(cells, config.seeds, folder)
    start = time.perf_counter()
    for line in describe_comparison(cells, config, folder):
        err.print(line, style="dim")
    with progress_bar(err) as bar:
        task = bar.add_task(f"{len(cells)} rows x {config.seeds} seeds, epochs", total=None, note="")
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        run_grid(cells, config.seeds, folder, config.workers, show)
    rows = comparison_rows(cells)
    print_rows(rows, comparison_title(config))
    out.print(LEGEND)
    for sentence in comparison_sentences(cells):
        out.print(sentence)
    out.print(f"{time.perf_counter() - start:.0f} s in total; runs and table in {folder}")
    write_comparison(cells, config, folder, rows)
    failures = list_failures(cells)
    if failures:
        raise MachineError("some runs failed: " + "; ".join(failures))
    return 0
