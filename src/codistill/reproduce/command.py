"""`codistill reproduce TABLE`: train a published table's cells, and print and keep the table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.config import InputError, MachineError, ReproduceConfig
from codistill.console import err, out, print_rows, progress_bar
from codistill.json_files import read_json
from codistill.recipes.tables import SCALES
from codistill.reproduce.entries import entries_of
from codistill.reproduce.formats import Rows, comma_separated, latex, markdown
from codistill.reproduce.grid import Cell, Executor, read_results, run_grid
from codistill.reproduce.plan import Plan, make_plan
from codistill.reproduce.render import notes_of, rows_of
from codistill.reproduce.shell import command_line
from codistill.run import write_atomically, write_json

_FIRST = ("network", "method", "n")  # columns that the terminal shows beside the figures
_FREE = {
    "network",
    "method",
    "seeds",
    "workers",
    "submit",
    "submit_option",
    "print_commands",
    "out",
    "baselines",
    "device",
    "data_dir",
}


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


def keep(plan: Plan, rows: Rows) -> None:
    """Write the table in every form, and what a report needs to draw it."""
    folder, notes = plan.folder, notes_of(plan)
    failures = failures_of(plan.cells)
    lists = "\n".join(f"- {line}" for line in (*notes, *(f"Failed: {line}" for line in failures)))
    texts = {
        "table.md": f"{plan.title()}\n\n{markdown(rows)}\n{lists}\n",
        "table.csv": comma_separated(rows),
        "table.tex": latex(rows, plan.title()),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda stream, text=text: stream.write(text.encode()))
    write_json(folder / "table.json", {"title": plan.title(), "rows": rows, "notes": notes, "failures": failures})


def failures_of(cells: Sequence[Cell]) -> list[str]:
    """Return one line a run that has no result."""
    return [f"{cell.label}, seed {seed}: {why}" for cell in cells for seed, why in sorted(cell.failures.items())]


def plan_of_folder(folder: Path, held: dict[str, Any]) -> Plan:
    """Return the plan that a grid's folder was made by, with the results it holds."""
    fields = {f.name for f in dataclasses.fields(ReproduceConfig)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in held["options"].items() if k in fields}
    options = ReproduceConfig()
    for key, value in values.items():
        setattr(options, key, value)
    options.out = str(folder)
    plan = make_plan(held["table"], options)
    read_results([*plan.cells], plan.options.seeds, folder)
    return plan


def _check_folder(plan: Plan) -> None:
    """Refuse a folder that holds another table, scale or protocol; write down what this one holds."""
    path, options = plan.folder / "grid.json", dataclasses.asdict(plan.options)
    if options["scale"] == "smoke":  # which takes one network where none is named, so that none does not mean all
        options["network"] = options["network"] or tuple(dict.fromkeys(cell.network for cell in plan.cells))
    held = read_json(path, "kind")
    if held is not None:
        if held.get("table") != plan.name:
            raise InputError(f"--out {plan.folder} holds {held.get('table', 'another grid')}; name another folder")
        plain = json.loads(json.dumps(options))
        for key in sorted(plain.keys() - _FREE):
            if held["options"].get(key) != plain[key]:
                flag = key.replace("_", "-")
                raise InputError(
                    f"--out {plan.folder} was made with --{flag} {held['options'].get(key)}, not {plain[key]}; "
                    "name another folder"
                )
        _widen(options, held["options"])
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise InputError(f"--out {plan.folder} exists and is no grid of codistill; name a new or empty folder")
    for cell in plan.cells:
        cell.run_config(plan.folder, 0, [*plan.cells])  # a config that cannot be used fails here
    write_json(path, {"kind": "reproduce", "table": plan.name, "options": options})


def _widen(options: dict[str, Any], held: dict[str, Any]) -> None:
    """Let what is written down cover all that the folder holds, whatever part of it this call asks for."""
    for key in ("network", "method"):
        options[key] = list(dict.fromkeys((*held[key], *options[key]))) if held[key] and options[key] else []
    options["seeds"] = max(options["seeds"], held["seeds"])
    options["baselines"] = options["baselines"] or held["baselines"]


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


def _executor(plan: Plan) -> Executor | None:
    if plan.options.submit == "none":
        if plan.options.submit_option:
            raise InputError("--submit-option is for submitit; add --submit slurm or --submit local")
        return None
    from codistill.reproduce.workers import Submitit

    return Submitit(plan.folder / "submitit", plan.options.submit, plan.options.submit_option)


def _short(row: dict[str, str]) -> dict[str, str]:
    """Return the columns for the terminal; all of them are in the files."""
    figures = {k: v for k, v in row.items() if k not in _FIRST and k != "judged"}
    left = {"peers": f"{row['network']} {row['method']}", "n": row["n"]}
    return left | {
        k: v for k, v in figures.items() if not k.startswith(("training, peak", "deployed, peak", "deployed, ms"))
    }


def _raise_failures(cells: Sequence[Cell]) -> None:
    """Raise with every reason once, and what it struck."""
    struck: dict[str, list[str]] = {}
    for cell in cells:
        for seed, why in sorted(cell.failures.items()):
            struck.setdefault(why, []).append(f"{cell.label}, seed {seed}")
    if struck:
        count = sum(map(len, struck.values()))
        more = lambda runs: f" and {len(runs) - 1} more" if len(runs) > 1 else ""  # noqa: E731
        reasons = "; ".join(f"{runs[0]}{more(runs)}: {why}" for why, runs in struck.items())
        raise MachineError(
            f"{count} runs failed (the same command tries them again; failures.json lists them): {reasons}"
        )
