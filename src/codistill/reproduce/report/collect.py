"""Reads run folders, grids and tables, and sorts their runs into the groups that a report shows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill.config.config import Config
from codistill.reproduce.command_line import command_line
from codistill.reproduce.grid import Cell
from codistill.reproduce.statistics import mean_std, table_rows
from codistill.reproduce.table_entries import entries_of
from codistill.reproduce.table_folder import plan_of_folder
from codistill.reproduce.table_rows import cost_columns, network_of, notes_of, rows_of
from codistill.utils.errors import InputError
from codistill.utils.files import read_json, read_lines
from codistill.utils.tables import Rows


@dataclass
class Run:
    """One run folder, as it stands."""

    path: Path
    config: Config
    result: dict[str, Any] | None
    lines: list[dict[str, Any]]
    details: dict[str, Any]
    environment: dict[str, Any]

    @property
    def command(self) -> str:
        """The shell line that trains it again."""
        return command_line(self.config)


@dataclass
class Group:
    """The seeds of one row."""

    label: str
    runs: list[Run]


@dataclass
class Section:
    """One part of the page: a table, and the groups behind it."""

    name: str
    title: str
    rows: Rows
    lower_is_better: bool
    notes: list[str]
    groups: list[Group]
    failures: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Read one run folder; what a run under way has not written yet is empty."""
    return Run(
        path,
        Config.from_file(path),
        read_json(path / "result.json"),
        read_lines(path / "metrics.jsonl"),
        read_json(path / "details.json") or {},
        read_json(path / "environment.json") or {},
    )


def collect(paths: list[Path]) -> list[Section]:
    """Return a section for every grid, and one for all single runs together.

    Raises:
        InputError: a folder is missing or holds no runs.
    """
    sections, single = [], []
    for path in {path.resolve(): path for path in paths}.values():  # each once, however often it is named
        if not path.is_dir():
            raise InputError(f"report: {path} is no folder; name run folders, or the folder of a grid or of a table")
        if (path / "config.json").exists():
            single.append(read_run(path))
            continue
        found = [read_run(p.parent) for p in sorted(path.rglob("config.json"))]
        if not found:
            raise InputError(f"report: {path} holds no runs of codistill")
        held = read_json(path / "grid.json", "kind")
        if held is not None and held.get("kind") == "reproduce":
            sections.append(_of_table(path, held))
        elif held is not None:
            sections.append(_of_comparison(path, held))
        else:
            single += found
    return sections + ([_of_runs(single)] if single else [])


def _of_table(path: Path, held: dict[str, Any]) -> Section:
    plan = plan_of_folder(path, held)
    groups = []
    several = len({cell.network for cell in plan.cells}) > 1
    for cell in plan.cells:
        runs = _runs(cell, path, plan.options.seeds)
        label = f"{network_of(plan, cell.network)}: {cell.method}" if several else cell.method
        groups += [Group(label, runs)] if runs else []
    lower = plan.published["measure"] == "error"
    name = plan.name if plan.options.scale == "full" else f"{plan.name}, {plan.options.scale} scale"
    return Section(name, plan.title(), rows_of(plan, entries_of(plan)), lower, notes_of(plan), groups, _failures(path))


def _of_comparison(path: Path, held: dict[str, Any]) -> Section:
    cells, groups = [], []
    for row in held["cells"]:
        cell = Cell(row["label"], Config(), row["baseline"])
        runs = _runs(cell, path, held["seeds"])
        cell.results = {run.config.seed: run.result for run in runs if run.result is not None}
        cells.append(cell)
        groups += [Group(cell.label, runs)] if runs else []
    notes = ["Test set, last epoch, of the member deployed; differences are paired over seeds, ± 95 % t-interval."]
    return Section("Comparison", held["title"], table_rows(cells), False, notes, groups, _failures(path))


def _of_runs(runs: list[Run]) -> Section:
    """Group runs that differ in their seed alone."""
    groups: dict[str, Group] = {}
    for run in runs:
        values = run.config.to_dict()
        key = json.dumps(
            {name: values[name] for name in values.keys() - Config.NOT_IDENTITY - {"seed"}}, sort_keys=True
        )
        folder = run.path.resolve()
        label = (
            folder.parent.name
            if folder.name.startswith("seed")
            else folder.name.removesuffix(f"-seed{run.config.seed}")
        )
        groups.setdefault(key, Group(label, [])).runs.append(run)
    rows = []
    for group in groups.values():
        done = [run.result for run in group.runs if run.result is not None]
        row = {
            "run": group.label,
            "test, last epoch, top-1 %": mean_std([r["student"]["top1"] for r in done]) if done else "-",
        }
        best = [r["best_test"]["top1"] for r in done if "best_test" in r]
        if any("best_test" in (run.result or {}) for run in runs):
            row["best test epoch (chosen on the test set), top-1 %"] = mean_std(best) if best else "-"
        cell = Cell(group.label, group.runs[0].config, results=dict(enumerate(done)))
        rows.append(row | {"n": str(len(done))} | cost_columns(cell))
    unfinished = [f"{run.path} is not complete" for run in runs if run.result is None]
    return Section(
        "Runs", "Single runs", rows, False, ["Mean ± deviation over the seeds given."], [*groups.values()], unfinished
    )


def _runs(cell: Cell, folder: Path, seeds: int) -> list[Run]:
    places = [cell.place(folder, seed) for seed in range(seeds)]
    return [read_run(place) for place in places if (place / "config.json").exists()]


def _failures(path: Path) -> list[str]:
    return [f"{run}: {why}" for run, why in (read_json(path / "failures.json") or {}).items()]
