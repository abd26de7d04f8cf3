"""The figures of a published table: each over seeds, with the paper's number and the difference to its baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from codistill.reproduce.plan import Plan, TableCell
from codistill.reproduce.recipes.table_recipe import CellRef
from codistill.reproduce.statistics import Difference, correct_holm, paired_difference
from codistill.runs import read_epoch_lines

BySeed = dict[int, float]


@dataclass
class Figure:
    """One figure of the table."""

    network: str
    method: str
    ref: CellRef
    evaluated: str
    """What the figure is measured on: the deployed member, the ensemble ..."""
    published: tuple[float, float | None] | None
    last: BySeed = field(default_factory=dict)
    """The value on the test set at the last epoch, by seed."""
    best: BySeed = field(default_factory=dict)
    """The value of the best test epoch, by seed; with protocol paper only."""
    versus: Difference | None = None
    """Difference of the last epoch to the baseline of equal cost, paired over seeds."""
    cell: TableCell | None = None
    """None for a method that is published but not trained here."""

    @property
    def compared(self) -> BySeed:
        """The values to compare with the paper's number: the best epoch if there is one, as OKDDip's code prints."""
        return self.best or self.last


def make_figures(plan: Plan) -> list[Figure]:
    """Return the table's figures in its order, and after them the numbers that are published only."""
    folder, honest = plan.folder, plan.options.protocol == "honest"
    figures = []
    for cell in plan.cells:
        for ref in cell.cell_refs:
            source = ref.source if honest or ref.reported is None else ref.reported
            evaluated = _describe_source(source, cell)
            figure = Figure(cell.network, cell.method, ref, evaluated, _published_value(plan, ref), cell=cell)
            if source != "gain":
                for seed, result in cell.results.items():
                    value = _result_value(source, ref.metric, result)
                    if value is None:
                        continue
                    figure.last[seed] = to_measure(plan, ref, value)
                    lines = [] if honest else read_epoch_lines(cell.run_path(folder, seed) / "metrics.jsonl")
                    values = [_epoch_value(source, ref.metric, line) for line in lines if "test" in line]
                    curve = [value for value in values if value is not None and math.isfinite(value)]
                    if curve and ref.metric != "parameters":
                        figure.best[seed] = to_measure(plan, ref, max(curve))
            figures.append(figure)
    _fill_differences(plan, figures)
    return figures + _published_only(plan)


def _result_value(source: str, metric: str, result: Mapping[str, Any]) -> float | None:
    if metric == "parameters":
        return result["parameters_trained"] / 1e6
    return _select_value(source, metric, result["test"], result["student"])


def _epoch_value(source: str, metric: str, line: Mapping[str, Any]) -> float | None:
    return None if metric == "parameters" else _select_value(source, metric, line["test"], line["test_student"])


def _select_value(source: str, metric: str, members: Mapping[str, Any], student: Mapping[str, float]) -> float | None:
    """Return one metric of one source; None where it was not measured: top-5 with ten classes or fewer."""
    if metric not in members:
        return None
    if source == "student":
        return student.get(metric)
    if source == "members":
        return fmean(members[metric])
    if source == "ensemble":
        return members.get(f"ensemble_{metric}")
    return members[metric][int(source)] if int(source) < len(members[metric]) else None


def to_measure(plan: Plan, ref: CellRef, value: float) -> float:
    """Return an accuracy in percent as the table has it: an error where the table lists errors."""
    error = plan.published["measure"] == "error" and ref.metric != "parameters"
    return 100 - value if error else value


def _describe_source(source: str, cell: TableCell) -> str:
    if source == "student":
        return "ensemble" if cell.config.deploy == "ensemble" else "deployed member"
    names = {"members": "mean of all members", "ensemble": "ensemble", "gain": "sum of the gains over the baseline"}
    return names.get(source) or f"member {source}"


def _published_value(plan: Plan, ref: CellRef) -> tuple[float, float | None] | None:
    value = plan.published["rows"].get(ref.row, {}).get(ref.column)
    return None if value is None else (value[0], value[1])


def _fill_differences(plan: Plan, figures: list[Figure]) -> None:
    """Fill in the gains, and every figure's paired difference to its baseline."""
    by_key = {(f.network, f.method, f.ref.subject): f for f in figures}
    for figure in figures:
        baseline = plan.recipe.equal_cost.get(figure.method, "")
        if figure.ref.source == "gain":
            parts = [f for f in figures if f.cell is figure.cell and f is not figure]
            pairs = [(f, by_key.get((f.network, baseline, f.ref.subject))) for f in parts]
            figure.last, figure.best = _gain_by_seed(pairs, lambda f: f.last), _gain_by_seed(pairs, lambda f: f.best)
            continue
        base = by_key.get((figure.network, baseline, figure.ref.subject))
        if base is not None and figure.ref.metric != "parameters":
            figure.versus = paired_difference(figure.last, base.last)
    correct_holm(figure.versus for figure in figures)


def _gain_by_seed(pairs: list[tuple[Figure, Figure | None]], values: Callable[[Figure], BySeed]) -> BySeed:
    """Return the sum of the differences to the baselines, for the seeds that all figures have."""
    complete = [(values(ours), values(base)) for ours, base in pairs if base is not None]
    if len(complete) < len(pairs) or not complete:
        return {}
    seeds = set.intersection(*(ours.keys() & base.keys() for ours, base in complete))
    return {seed: sum(ours[seed] - base[seed] for ours, base in complete) for seed in sorted(seeds)}


def _published_only(plan: Plan) -> list[Figure]:
    """Return the published numbers of methods that are not trained here (FFL-S), for the networks of the plan."""
    if plan.options.scale == "smoke" or plan.options.method:
        return []
    networks = list(dict.fromkeys(cell.network for cell in plan.cells))
    return [
        Figure(network, method, CellRef(network, method, network), "published only", (value[0], value[1]))
        for network in networks
        for method, value in plan.published["rows"].get(network, {}).items()
        if method not in plan.recipe.methods and ":" not in method
    ]
