"""Reads the run folders, grids and tables of a report, and groups their runs by what they trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codistill.config import Config
from codistill.reproduce.command_line import format_command
from codistill.reproduce.grid import Cell
from codistill.reproduce.statistics import (
    Difference,
    comparison_rows,
    differences_to_baselines,
    format_mean_std,
)
from codistill.reproduce.table_figures import make_figures
from codistill.reproduce.table_folder import read_plan
from codistill.reproduce.table_rows import cost_columns, make_table_rows, network_label, summarize_table, table_notes
from codistill.runs import Details, Environment, EpochLine, GridInfo, RunResult, read_epoch_lines, read_record
from codistill.utils import InputError, Rows, is_user_code


@dataclass
class RunData:
    """The files of one run folder."""

    path: Path
    config: Config
    result: RunResult | None
    lines: list[EpochLine]
    details: Details
    environment: Environment

    @property
    def command(self) -> str:
        """The shell command that trains it again."""
        return format_command(self.config)

    @property
    def imported_names(self) -> list[str]:
        """The networks and the method that are code of neither codistill nor a library."""
        names = [name for name in self.config.network_names() if is_user_code(name)]
        return names + ([self.config.method.import_name] if self.config.method.import_name else [])


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
    gains: dict[str, Difference] = field(default_factory=dict)
    """Paired differences to the baselines of equal cost, by group."""
    summary: list[str] = field(default_factory=list)
    """The result in sentences, above the table."""


def read_run(path: Path) -> RunData:
    """Read one run folder; files that an unfinished run has not written yet are empty.

    Raises:
        InputError: it is no run folder, or a file in it is damaged or another program's.
    """
    return RunData(
        path,
        Config.from_file(path, without_code=True),
        read_record(path / "result.json", RunResult),
        read_epoch_lines(path / "metrics.jsonl"),
        read_record(path / "details.json", Details) or {},
        read_record(path / "environment.json", Environment) or {},
    )


def collect_sections(paths: list[Path]) -> list[Section]:
    """Return one section per grid, and one for all single runs together; every run is in one section.

    Raises:
        InputError: a folder does not exist or contains no runs.
    """
    sections: list[Section] = []
    single: dict[Path, RunData] = {}
    for path in {path.resolve(): path for path in paths}.values():  # a path given twice counts once
        if not path.is_dir():
            raise InputError(f"report: {path} is no folder; name run folders, or the folder of a grid or of a table")
        folders = [config.parent for config in sorted(path.rglob("config.json"))]
        if path in folders:
            try:
                single[path.resolve()] = read_run(path)
                continue
            except InputError:
                if folders == [path]:
                    raise  # else the file may be another program's: the runs below are shown, and it is told
        section = _read_section(path)
        if section is not None and section.groups:
            sections.append(section)
            continue
        found = read_runs(folders) if section is None else []
        if not found:
            raise InputError(f"report: {path} holds no runs of codistill")
        single |= {run.path.resolve(): run for run in found}
    in_grids = {run.path.resolve() for section in sections for group in section.groups for run in group.runs}
    alone = [run for path, run in single.items() if path not in in_grids]
    return sections + ([_runs_section(alone)] if alone else [])


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the run folders found below a folder; those that cannot be read are left out, with a warning."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            warnings.warn(f"{folder} is left out: {error}", stacklevel=2)
    return runs


def _read_section(path: Path) -> Section | None:
    """Return the section of a grid's folder; None where there is no grid, or where its grid.json cannot be used."""
    try:
        grid_info = read_record(path / "grid.json", GridInfo)
        if grid_info is None:
            return None
        return (_table_section if grid_info["kind"] == "reproduce" else _comparison_section)(path, grid_info)
    except InputError as error:
        warnings.warn(f"the runs in {path} are shown as single runs: {error}", stacklevel=2)
        return None


def _table_section(path: Path, grid_info: GridInfo) -> Section:
    plan = read_plan(path, grid_info)
    groups = []
    several = len({cell.network for cell in plan.cells}) > 1
    for cell in plan.cells:
        runs = _read_runs(cell, path, range(plan.options.seeds))
        label = f"{network_label(plan, cell.network)}: {cell.method}" if several else cell.method
        groups += [Group(label, runs)] if runs else []
    lower = plan.published["measure"] == "error"
    name = plan.name if plan.options.scale == "full" else f"{plan.name}, {plan.options.scale} scale"
    figures, notes = make_figures(plan), table_notes(plan)
    rows, summary = make_table_rows(plan, figures), summarize_table(plan, figures)
    return Section(name, plan.title(), rows, lower, notes, groups, _read_failures(path), summary=summary)


def _comparison_section(path: Path, grid_info: GridInfo) -> Section:
    cells, groups = [], []
    first_seed = grid_info.get("first_seed", 0)
    seeds = range(first_seed, first_seed + grid_info.get("seeds", 0))
    for row in grid_info.get("cells", []):
        cell = Cell(row["label"], Config(), row["baseline"])
        runs = _read_runs(cell, path, seeds)
        cell.results = {run.config.seed: {**run.result} for run in runs if run.result is not None}
        cells.append(cell)
        groups += [Group(cell.label, runs)] if runs else []
    notes = [
        "Test set, last epoch, deployed member; differences are paired over seeds with the independent member that "
        "began with the same weights, ± 95 % t-interval, n.s. = not significant (Holm's correction over the table).",
    ]
    title, rows = grid_info.get("title", ""), comparison_rows(cells)
    gains = {label: d for label, d in differences_to_baselines(cells).items() if d is not None}
    failures, summary = _read_failures(path), grid_info.get("summary", [])
    return Section("Comparison", title, rows, False, notes, groups, failures, gains, summary)


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
    repeated = [line for group in groups.values() for line in _keep_one_run_per_seed(group)]
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
        cell = Cell(group.label, group.runs[0].config, results={n: {**result} for n, result in enumerate(done)})
        rows.append(row | {"n": str(len(done))} | cost_columns(cell))
    kept = [run for group in groups.values() for run in group.runs]
    unfinished = [f"{run.path} is not complete" for run in kept if run.result is None]
    notes = ["Mean ± deviation over the seeds given.", *repeated]
    return Section("Runs", "Single runs", rows, False, notes, [*groups.values()], unfinished)


def _keep_one_run_per_seed(group: Group) -> list[str]:
    """Leave out runs that repeat the seed of another of the group, complete ones last; return a note about each."""
    kept: dict[int, RunData] = {}
    notes = []
    for run in sorted(group.runs, key=lambda run: run.result is None):
        first = kept.setdefault(run.config.seed, run)
        if first is not run:
            notes.append(f"{run.path} is left out: it repeats seed {run.config.seed} of {first.path}.")
    group.runs = [run for run in group.runs if kept[run.config.seed] is run]
    return notes


def _read_runs(cell: Cell, folder: Path, seeds: Sequence[int]) -> list[RunData]:
    paths = [cell.run_path(folder, seed) for seed in cell.list_seeds(folder, seeds)]
    return read_runs([path for path in paths if (path / "config.json").exists()])


def _read_failures(path: Path) -> list[str]:
    try:
        failures = read_record(path / "failures.json", dict[str, str]) or {}
    except InputError as error:
        return [str(error)]
    return [f"{run}: {reason}" for run, reason in failures.items()]
