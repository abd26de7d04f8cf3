"""Reads the run folders, grids and tables of a report, and groups their runs by what they trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill.config import Config
from codistill.reproduce.command_line import format_command
from codistill.reproduce.grid import Cell
from codistill.reproduce.statistics import comparison_rows, format_mean_std
from codistill.reproduce.table_figures import make_figures
from codistill.reproduce.table_folder import read_plan
from codistill.reproduce.table_rows import cost_columns, make_table_rows, network_label, table_notes
from codistill.utils import InputError, Rows, read_json, read_lines


@dataclass
class RunData:
    """The files of one run folder."""

    path: Path
    config: Config
    result: dict[str, Any] | None
    lines: list[dict[str, Any]]
    details: dict[str, Any]
    environment: dict[str, Any]

    @property
    def command(self) -> str:
        """The shell command that trains it again."""
        return format_command(self.config)


@dataclass
class Group:
    """The runs (seeds) of one row."""

    label: str
    runs: list[RunData]


@dataclass
class Section:
    """One section of the page: a table, and the groups of runs that it summarizes."""

    name: str
    title: str
    rows: Rows
    lower_is_better: bool
    notes: list[str]
    groups: list[Group]
    failures: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunData:
    """Read one run folder; files that an unfinished run has not written yet are empty."""
    return RunData(
        path,
        Config.from_file(path, without_code=True),
        read_json(path / "result.json"),
        read_lines(path / "metrics.jsonl"),
        read_json(path / "details.json") or {},
        read_json(path / "environment.json") or {},
    )


def collect_sections(paths: list[Path]) -> list[Section]:
    """Return one section per grid, and one for all single runs together.

    Raises:
        InputError: a folder does not exist or contains no runs.
    """
    sections, single = [], []
    for path in {path.resolve(): path for path in paths}.values():  # a path given twice counts once
        if not path.is_dir():
            raise InputError(f"report: {path} is no folder; name run folders, or the folder of a grid or of a table")
        if (path / "config.json").exists():
            single.append(read_run(path))
            continue
        found = [read_run(p.parent) for p in sorted(path.rglob("config.json"))]
        if not found:
            raise InputError(f"report: {path} holds no runs of codistill")
        grid_info = read_json(path / "grid.json", "kind")
        if grid_info is not None and grid_info.get("kind") == "reproduce":
            sections.append(_table_section(path, grid_info))
        elif grid_info is not None:
            sections.append(_comparison_section(path, grid_info))
        else:
            single += found
    return sections + ([_runs_section(single)] if single else [])


def _table_section(path: Path, grid_info: dict[str, Any]) -> Section:
    plan = read_plan(path, grid_info)
    groups = []
    several = len({cell.network for cell in plan.cells}) > 1
    for cell in plan.cells:
        runs = _read_runs(cell, path, plan.options.seeds)
        label = f"{network_label(plan, cell.network)}: {cell.method}" if several else cell.method
        groups += [Group(label, runs)] if runs else []
    lower = plan.published["measure"] == "error"
    name = plan.name if plan.options.scale == "full" else f"{plan.name}, {plan.options.scale} scale"
    rows, notes = make_table_rows(plan, make_figures(plan)), table_notes(plan)
    return Section(name, plan.title(), rows, lower, notes, groups, _read_failures(path))


def _comparison_section(path: Path, grid_info: dict[str, Any]) -> Section:
    cells, groups = [], []
    for row in grid_info["cells"]:
        cell = Cell(row["label"], Config(), row["baseline"])
        runs = _read_runs(cell, path, grid_info["seeds"])
        cell.results = {run.config.seed: run.result for run in runs if run.result is not None}
        cells.append(cell)
        groups += [Group(cell.label, runs)] if runs else []
    notes = ["Test set, last epoch, deployed member; differences are paired over seeds, ± 95 % t-interval."]
    return Section("Comparison", grid_info["title"], comparison_rows(cells), False, notes, groups, _read_failures(path))


def _runs_section(runs: list[RunData]) -> Section:
    """Return the section of single runs; those that differ in their seed only are one group."""
    groups: dict[str, Group] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.to_dict().items() if k not in Config.NOT_IDENTITY | {"seed"}})
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
            "test, last epoch, top-1 %": format_mean_std([r["student"]["top1"] for r in done]) if done else "-",
        }
        best = [r["best_test"]["top1"] for r in done if "best_test" in r]
        if any("best_test" in (run.result or {}) for run in runs):
            row["best test epoch (chosen on the test set), top-1 %"] = format_mean_std(best) if best else "-"
        cell = Cell(group.label, group.runs[0].config, results=dict(enumerate(done)))
        rows.append(row | {"n": str(len(done))} | cost_columns(cell))
    unfinished = [f"{run.path} is not complete" for run in runs if run.result is None]
    return Section(
        "Runs", "Single runs", rows, False, ["Mean ± deviation over the seeds given."], [*groups.values()], unfinished
    )


def _read_runs(cell: Cell, folder: Path, seeds: int) -> list[RunData]:
    paths = [cell.run_path(folder, seed) for seed in range(seeds)]
    return [read_run(path) for path in paths if (path / "config.json").exists()]


def _read_failures(path: Path) -> list[str]:
    return [f"{run}: {reason}" for run, reason in (read_json(path / "failures.json") or {}).items()]
