"""The folder of a published table: what it may hold, and what is kept in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.config.config import ReproduceConfig
from codistill.reproduce.grid import Cell, Executor, read_results
from codistill.reproduce.plan import Plan, make_plan
from codistill.reproduce.table_rows import notes_of
from codistill.utils.errors import InputError, MachineError
from codistill.utils.files import read_json, write_atomically, write_json
from codistill.utils.tables import Rows, comma_separated, latex, markdown


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
        for key in sorted(plain.keys() - ReproduceConfig.NOT_IDENTITY):
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


def _executor(plan: Plan) -> Executor | None:
    if plan.options.submit == "none":
        if plan.options.submit_option:
            raise InputError("--submit-option is for submitit; add --submit slurm or --submit local")
        return None
    from codistill.reproduce.workers import Submitit

    return Submitit(plan.folder / "submitit", plan.options.submit, plan.options.submit_option)


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
