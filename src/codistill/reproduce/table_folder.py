"""The folder of a published table: the check of its contents, and the files that are written into it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.config import ReproduceConfig
from codistill.reproduce.grid import Executor, list_failures, read_results
from codistill.reproduce.plan import Plan, make_plan
from codistill.reproduce.table_rows import table_notes
from codistill.reproduce.workers import find_submitit
from codistill.runs import GridInfo, read_record, write_record
from codistill.utils import (
    InputError,
    MachineError,
    Rows,
    comma_separated,
    latex,
    markdown_page,
    pick_device,
    write_text,
)


def write_table(plan: Plan, rows: Rows, summary: Sequence[str]) -> None:
    """Write the table as Markdown, CSV, LaTeX and JSON.

    Args:
        plan: The table.
        rows: Its rows.
        summary: Sentences above the table.
    """
    folder, notes = plan.folder, table_notes(plan)
    failures = list_failures([*plan.cells])
    lines = (*notes, *(f"Failed: {line}" for line in failures))
    texts = {
        "table.md": markdown_page((plan.title(), *summary), rows, lines),
        "table.csv": comma_separated(rows),
        "table.tex": latex(rows, plan.title()),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    write_record(folder / "table.json", {"title": plan.title(), "rows": rows, "notes": notes, "failures": failures})


def read_plan(folder: Path, grid_info: GridInfo) -> Plan:
    """Return the plan of a table's folder, with the results in it.

    Args:
        folder: The folder.
        grid_info: The contents of its grid.json.

    Raises:
        InputError: grid.json names no published table, or options that do not exist.
    """
    options = _read_options(folder, grid_info)
    options.out = str(folder)
    try:
        plan = make_plan(grid_info.get("table", ""), options)
    except InputError as error:
        raise InputError(f"{folder / 'grid.json'} cannot be used ({error})") from None
    read_results([*plan.cells], range(plan.options.seeds), folder)
    return plan


def read_whole_plan(plan: Plan) -> Plan:
    """Return the plan of a table with the runs of earlier calls in the same folder, which other options selected.

    Args:
        plan: The plan of this call, trained.

    Raises:
        InputError: the folder's grid.json was damaged meanwhile.
    """
    whole = read_plan(plan.folder, read_record(plan.folder / "grid.json", GridInfo) or {"kind": "reproduce"})
    asked = {cell.label: cell.failures for cell in plan.cells}
    for cell in whole.cells:
        cell.failures.update(asked.get(cell.label, {}))
    whole.cells = [cell for cell in whole.cells if cell.label in asked or cell.results]
    return whole


def _read_options(folder: Path, grid_info: GridInfo) -> ReproduceConfig:
    try:
        return ReproduceConfig.from_dict(grid_info.get("options", {}))
    except InputError as error:
        raise InputError(f"{folder / 'grid.json'} is damaged ({str(error).removeprefix('--config: ')})") from None


def prepare_table_folder(plan: Plan) -> None:
    """Write grid.json, after a check that the folder is new or was made with the same table, scale and protocol.

    Raises:
        InputError: the folder contains something else, or a config cannot be used.
    """
    path, options = plan.folder / "grid.json", dataclasses.asdict(plan.options)
    if options["scale"] == "smoke":  # which trains one network if none is named, so that an empty list is not "all"
        options["network"] = options["network"] or tuple(dict.fromkeys(cell.network for cell in plan.cells))
    grid_info = read_record(path, GridInfo)
    if grid_info is not None:
        _check_same_table(plan, options, grid_info)
        _merge_options(options, dataclasses.asdict(_read_options(plan.folder, grid_info)))
    elif plan.folder.exists() and any(plan.folder.iterdir()):
        raise InputError(f"--out {plan.folder} exists and is no grid of codistill; name a new or empty folder")
    for cell in plan.cells:
        cell.run_config(plan.folder, 0, [*plan.cells])  # raises if it cannot be used
    write_record(path, {"kind": "reproduce", "table": plan.name, "options": options})


def _check_same_table(plan: Plan, options: dict[str, Any], grid_info: GridInfo) -> None:
    if grid_info.get("table") != plan.name:
        raise InputError(f"--out {plan.folder} holds {grid_info.get('table', 'another grid')}; name another folder")
    as_json = json.loads(json.dumps(options))
    for key in sorted(as_json.keys() - ReproduceConfig.NOT_IDENTITY):
        before = grid_info.get("options", {}).get(key)
        if before != as_json[key]:
            flag = f"--{key.replace('_', '-')}"
            raise InputError(
                f"--out {plan.folder} was made with {flag} {before}, not {as_json[key]}; name another folder"
            )


def _merge_options(options: dict[str, Any], before: dict[str, Any]) -> None:
    """Extend `options` so that they cover all runs in the folder, also those of earlier calls."""
    for key in ("network", "method"):  # empty means all
        options[key] = list(dict.fromkeys((*before[key], *options[key]))) if before[key] and options[key] else []
    options["seeds"] = max(options["seeds"], before["seeds"])
    options["baselines"] = options["baselines"] or before["baselines"]


def check_machine(plan: Plan) -> None:
    """Refuse what every run of an unfinished table would, before anything is written or started.

    Raises:
        InputError: this machine lacks the device or submitit, or the data set cannot be read.
    """
    from codistill.data import load_set

    if plan.options.submit != "none":
        find_submitit(plan.options.submit)
        return
    places = (cell.run_path(plan.folder, seed) for cell in plan.cells for seed in range(plan.options.seeds))
    if all((place / "result.json").exists() for place in places):
        return
    pick_device(plan.options.device)
    config = plan.cells[0].config
    load_set(config.data, config.data_dir, config.image_size, config.data_pipeline)


def make_executor(plan: Plan) -> Executor | None:
    """Return the executor for --submit; None for processes of this machine.

    Raises:
        InputError: submitit is not installed, or does not accept an option.
    """
    if plan.options.submit == "none":
        if plan.options.submit_option:
            raise InputError("--submit-option is for submitit; add --submit slurm or --submit local")
        return None
    from codistill.reproduce.workers import Submitit

    return Submitit(plan.folder / "submitit", plan.options.submit, plan.options.submit_option)


def raise_failures(plan: Plan) -> None:
    """Raise if runs failed, with each reason once.

    Raises:
        MachineError: see above.
    """
    runs_by_reason: dict[str, list[str]] = {}
    for cell in plan.cells:
        for seed, reason in sorted(cell.failures.items()):
            runs_by_reason.setdefault(reason, []).append(f"{cell.label}, seed {seed}")
    if runs_by_reason:
        count = sum(map(len, runs_by_reason.values()))
        more = lambda runs: f" and {len(runs) - 1} more" if len(runs) > 1 else ""  # noqa: E731
        reasons = "; ".join(f"{runs[0]}{more(runs)}: {reason}" for reason, runs in runs_by_reason.items())
        raise MachineError(
            f"{count} runs failed (the same command tries them again; failures.json lists them): {reasons}"
        )
