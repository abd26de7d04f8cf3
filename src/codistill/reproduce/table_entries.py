"""From results to the figures of a published table: each place, over seeds, against the paper and its baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from codistill.reproduce.plan import Plan, TableCell
from codistill.reproduce.recipes.table_recipe import CellRef
from codistill.reproduce.statistics import Difference, paired_difference
from codistill.utils.files import read_lines

BySeed = dict[int, float]


@dataclass
class Entry:
    """One figure of the table."""

    network: str
    method: str
    place: CellRef
    judged: str
    """Whose figure it is, in words."""
    published: tuple[float, float | None] | None
    last: BySeed = field(default_factory=dict)
    """The test set at the last epoch, by seed."""
    best: BySeed = field(default_factory=dict)
    """The best test epoch, by seed; protocol paper alone."""
    versus: Difference | None = None
    """Last epoch against the baseline of equal cost, paired over seeds."""
    cell: TableCell | None = None
    """None where the number is published only."""

    @property
    def compared(self) -> BySeed:
        """What stands against the paper's number: the best epoch where there is one, for that is what papers print."""
        return self.best or self.last


def entries_of(plan: Plan) -> list[Entry]:
    """Return the table's entries in its order; numbers that are published only come last in their network."""
    folder, honest = plan.folder, plan.options.protocol == "honest"
    entries = []
    for cell in plan.cells:
        for place in cell.places:
            figure = place.figure if honest or place.reported is None else place.reported
            entry = Entry(cell.network, cell.method, place, _words(figure, cell), _published(plan, place), cell=cell)
            if figure != "gain":
                for seed, result in cell.results.items():
                    entry.last[seed] = _measure(plan, place, _of_result(figure, place.metric, result))
                    lines = [] if honest else read_lines(cell.place(folder, seed) / "metrics.jsonl")
                    curve = [_of_line(figure, place.metric, line) for line in lines if "test" in line]
                    if curve and place.metric != "parameters":
                        entry.best[seed] = _measure(plan, place, max(curve))
            entries.append(entry)
    _compare(plan, entries)
    return entries + _published_only(plan)


def _of_result(figure: str, metric: str, result: dict[str, Any]) -> float:
    if metric == "parameters":
        return result["parameters_trained"] / 1e6
    return _pick(figure, metric, result["test"], result["student"])


def _of_line(figure: str, metric: str, line: dict[str, Any]) -> float:
    return _pick(figure, metric, line["test"], line["test_student"]) if metric != "parameters" else 0.0


def _pick(figure: str, metric: str, members: dict[str, Any], student: dict[str, float]) -> float:
    """Return one figure; on ten classes or fewer the top 5 is not kept, and stands at 100."""
    if metric == "top5" and "top5" not in members:
        return 100.0
    if figure == "student":
        return student[metric]
    if figure == "members":
        return fmean(members[metric])
    return members[f"ensemble_{metric}"] if figure == "ensemble" else members[metric][int(figure)]


def _measure(plan: Plan, place: CellRef, value: float) -> float:
    error = plan.published["measure"] == "error" and place.metric != "parameters"
    return 100 - value if error else value


def _words(figure: str, cell: TableCell) -> str:
    if figure == "student":
        return "ensemble" if cell.config.deploy == "ensemble" else "deployed member"
    words = {"members": "mean of all members", "ensemble": "ensemble", "gain": "sum of the gains over the baseline"}
    return words.get(figure) or f"member {figure}"


def _published(plan: Plan, place: CellRef) -> tuple[float, float | None] | None:
    value = plan.published["rows"].get(place.row, {}).get(place.column)
    return None if value is None else (value[0], value[1])


def _compare(plan: Plan, entries: list[Entry]) -> None:
    """Fill in the gains, and every entry's paired difference to its baseline."""
    by_key = {(e.network, e.method, e.place.subject): e for e in entries}
    for entry in entries:
        baseline = plan.recipe.equal_cost.get(entry.method, "")
        if entry.place.figure == "gain":
            parts = [e for e in entries if e.cell is entry.cell and e is not entry]
            pairs = [(e, by_key.get((e.network, baseline, e.place.subject))) for e in parts]
            entry.last, entry.best = _gain(pairs, lambda e: e.last), _gain(pairs, lambda e: e.best)
            continue
        base = by_key.get((entry.network, baseline, entry.place.subject))
        if base is not None and entry.place.metric != "parameters":
            entry.versus = paired_difference(entry.last, base.last)


def _gain(pairs: list[tuple[Entry, Entry | None]], values: Callable[[Entry], BySeed]) -> BySeed:
    if any(base is None for _, base in pairs):
        return {}
    both = [(values(ours), values(base)) for ours, base in pairs if base is not None]
    seeds = set.intersection(*(ours.keys() & base.keys() for ours, base in both)) if both else set()
    return {seed: sum(ours[seed] - base[seed] for ours, base in both) for seed in sorted(seeds)}


def _published_only(plan: Plan) -> list[Entry]:
    """Return the numbers of methods that are not trained here (FFL-S), for the networks of the plan."""
    if plan.options.scale == "smoke" or plan.options.method:
        return []
    networks = list(dict.fromkeys(cell.network for cell in plan.cells))
    trained = {*plan.recipe.methods}
    found = []
    for network in networks:
        for method, value in plan.published["rows"].get(network, {}).items():
            if method not in trained and ":" not in method:
                place = CellRef(network, method, network)
                found.append(Entry(network, method, place, "published only", (value[0], value[1])))
    return found
