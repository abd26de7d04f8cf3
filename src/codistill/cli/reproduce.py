"""`codistill reproduce TABLE`: train a published table's cells, and print and keep the table."""

from __future__ import annotations

import time

from codistill.cli.console import err, out, print_rows, progress_bar
from codistill.config.config import ReproduceConfig
from codistill.reproduce.command_line import command_line
from codistill.reproduce.grid import run_grid
from codistill.reproduce.plan import Plan, make_plan
from codistill.reproduce.recipes.table_recipe import SCALES
from codistill.reproduce.table_entries import entries_of
from codistill.reproduce.table_folder import _check_folder, _executor, _raise_failures, keep
from codistill.reproduce.table_rows import notes_of, rows_of

_FIRST = ("network", "method", "n")  # columns that the terminal shows beside the figures


def reproduce(table: str, options: ReproduceConfig) -> int:
    """Train what the table lacks, print it, and keep it as Markdown, CSV, LaTeX and JSON in the grid's folder.

    Raises:
        InputError: the options cannot be used; nothing has been trained then.
        MachineError: some runs failed; the others, and the table, are kept.
    """
    plan = make_plan(table, options)
    if options.print_commands:
        print_commands(plan)
        return 0
    _check_folder(plan)
    began = time.perf_counter()
    _describe(plan)
    executor = _executor(plan)
    with progress_bar(err) as bar:
        task = bar.add_task(f"{len(plan.cells)} cells x {options.seeds} seeds, epochs", total=None, note="")
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        run_grid([*plan.cells], options.seeds, plan.folder, options.workers, show, executor)
    rows = rows_of(plan, entries_of(plan))
    print_rows([_short(row) for row in rows], plan.title())
    for note in notes_of(plan):
        out.print(note)
    keep(plan, rows)
    out.print(f"{time.perf_counter() - began:.0f} s in all; runs and table in {plan.folder}")
    _raise_failures(plan.cells)
    return 0


def print_commands(plan: Plan) -> None:
    """Print one shell line a run; a run's teacher stands above it."""
    for seed in range(plan.options.seeds):
        for cell in sorted(plan.cells, key=lambda c: c.teacher is not None):
            print(command_line(cell.run_options(plan.folder, seed, [*plan.cells])))


def _describe(plan: Plan) -> None:
    """Say what is going to be trained, before the first run is."""
    cells, o = plan.cells, plan.options
    err.print(f"{plan.title()}", style="dim")
    extra = [c.label for c in cells if c.method not in plan.recipe.methods]
    if extra:
        err.print(f"beside the paper's rows: {', '.join(extra)}", style="dim")
    if o.scale == "smoke" and not o.network and len(plan.recipe.networks) > 1:
        note = f"one network only ({cells[0].network}): at {SCALES['smoke'].split(':')[0]} scale all are resnet8"
        err.print(note, style="dim")


def _short(row: dict[str, str]) -> dict[str, str]:
    """Return the columns for the terminal; all of them are in the files."""
    figures = {k: v for k, v in row.items() if k not in _FIRST and k != "judged"}
    left = {"peers": f"{row['network']} {row['method']}", "n": row["n"]}
    return left | {
        k: v for k, v in figures.items() if not k.startswith(("training, peak", "deployed, peak", "deployed, ms"))
    }
