"""`codistill reproduce TABLE`: train a published table's cells, print the table and write it to files."""

from __future__ import annotations

import time

from codistill.cli.console import err, out, print_rows, progress_bar
from codistill.config import ReproduceConfig
from codistill.reproduce import (
    Plan,
    check_machine,
    format_command,
    make_executor,
    make_figures,
    make_plan,
    make_table_rows,
    prepare_table_folder,
    raise_failures,
    read_whole_plan,
    run_grid,
    summarize_table,
    table_notes,
    write_table,
)


def reproduce(table: str, options: ReproduceConfig) -> int:
    """Train the runs that the table still needs, print it, and write it as Markdown, CSV, LaTeX and JSON.

    Raises:
        InputError: the options cannot be used; nothing has been trained then.
        MachineError: some runs failed; the others, and the table, are kept.
    """
    plan = make_plan(table, options)
    if options.print_commands:
        _print_commands(plan)
        return 0
    check_machine(plan)
    prepare_table_folder(plan)
    start = time.perf_counter()
    for line in plan.describe():
        err.print(line, style="dim")
    executor = make_executor(plan)
    with progress_bar(err) as bar:
        task = bar.add_task(f"{len(plan.cells)} cells x {options.seeds} seeds, epochs", total=None, note="")
        show = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
        run_grid([*plan.cells], range(options.seeds), plan.folder, options.workers, show, executor)
    whole = read_whole_plan(plan)
    figures = make_figures(whole)
    rows, summary = make_table_rows(whole, figures), summarize_table(whole, figures)
    write_table(whole, rows, summary)  # before printing, which may fail
    for sentence in summary:
        out.print(sentence)
    print_rows([_terminal_columns(row) for row in rows], whole.title())
    for note in table_notes(whole):
        out.print(note)
    out.print(f"{time.perf_counter() - start:.0f} s in total; runs and table in {plan.folder}")
    raise_failures(plan)
    return 0


def _print_commands(plan: Plan) -> None:
    """Print one shell command per run; a run's teacher comes before it."""
    for seed in range(plan.options.seeds):
        for cell in sorted(plan.cells, key=lambda c: c.teacher is not None):
            print(format_command(cell.run_options(plan.folder, seed, [*plan.cells])))


def _terminal_columns(row: dict[str, str]) -> dict[str, str]:
    """Return the columns that the terminal shows; the files have all of them."""
    hidden = ("training, peak", "deployed, peak", "deployed, ms")
    first = {"peers": f"{row['network']} {row['method']}", "n": row["n"]}
    skipped = ("network", "method", "n", "evaluated")
    return first | {k: v for k, v in row.items() if k not in skipped and not k.startswith(hidden)}
