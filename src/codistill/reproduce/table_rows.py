"""The entries of a published table as rows of text."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from codistill.reproduce.grid import Cell
from codistill.reproduce.plan import Plan
from codistill.reproduce.recipes.table_recipe import SCALES
from codistill.reproduce.statistics import mean_std, say_difference
from codistill.reproduce.table_entries import Entry
from codistill.utils.tables import Rows

LEGEND = (
    "mean ± deviation over seeds (n=1: one run, no deviation); vs equal cost: last epoch against the baseline that "
    "trains as much, paired over seeds, ± 95 % t-interval, n.s. = no significant difference; FLOPs: matrix products "
    "and convolutions, forward and backward; peak MB: of the GPU, or of the whole process on a CPU"
)


def rows_of(plan: Plan, entries: list[Entry]) -> Rows:
    """Return the table's rows; the paper's numbers stand in them at full scale, and at short scale with a mark."""
    o, unit = plan.options, f"{plan.published['measure']} %"
    paper = {"full": f"paper, {unit}", "short": f"paper at full scale, not comparable, {unit}"}.get(o.scale)
    honest = o.protocol == "honest"
    rows = []
    for entry in entries:
        row = {"network": network_of(plan, entry.network), "method": _method(entry)}
        if paper is not None and plan.published["rows"]:
            row[paper] = say_published(entry.published)
        row[f"test, last epoch, {unit}"] = _mean(entry, entry.last)
        if not honest:
            row[f"best test epoch (chosen on the test set), {unit}"] = _mean(entry, entry.best)
        if o.scale == "full" and plan.published["rows"]:
            row["ours - paper" if honest else "ours (best) - paper"] = say_gap(entry)
        row["last vs equal cost"] = say_difference(entry.versus)
        row[f"its ensemble, {unit}"] = _ensemble(plan, entry)
        row["n"] = str(len(entry.last))
        row["judged"] = entry.judged
        rows.append(row | cost_columns(entry.cell))
    return rows


def network_of(plan: Plan, network: str) -> str:
    """Return the network's name, and under --scale smoke what really stood in for it."""
    return f"resnet8 (for {network})" if plan.options.scale == "smoke" else network


def _ensemble(plan: Plan, entry: Entry) -> str:
    """Return the group's ensemble at the last epoch; it is not what is deployed, unless the row says so."""
    tests = [r["test"] for r in entry.cell.results.values()] if entry.cell is not None else []
    if entry.place.metric != "top1" or entry.place.figure == "gain" or not all(len(run["top1"]) > 1 for run in tests):
        return "-"
    error = plan.published["measure"] == "error"
    return mean_std([100 - run["ensemble_top1"] if error else run["ensemble_top1"] for run in tests]) if tests else "-"


def _method(entry: Entry) -> str:
    """Return the method, and whose figure it is where a run has several."""
    several = entry.cell is not None and len(entry.cell.places) > 1
    return f"{entry.method}, {entry.place.subject}" if several else entry.method


def _mean(entry: Entry, values: dict[int, float]) -> str:
    if entry.cell is None:
        return "-"
    return mean_std([values[seed] for seed in sorted(values)]) if values else ("failed" if entry.cell.failures else "-")


def say_published(value: tuple[float, float | None] | None) -> str:
    """Write a published number; a deviation that the paper does not print is left out."""
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def say_gap(entry: Entry) -> str:
    """Write the difference to the paper's number."""
    if entry.published is None or not entry.compared:
        return "-"
    return f"{fmean(entry.compared.values()) - entry.published[0]:+.2f}"


def cost_columns(cell: Cell | None) -> dict[str, str]:
    """Return what training and deploying cost, mean over seeds; `-` where it was not measured."""
    results = list(cell.results.values()) if cell is not None else []
    costs = [result["cost"] for result in results if "cost" in result]
    training = [c["training_flops_a_sample"] * c["samples_seen"] for c in costs if c.get("training_flops_a_sample")]
    measured = [c for c in costs if "flops_an_image" in c]
    return {
        "trained, M parameters": _say([r["parameters_trained"] / 1e6 for r in results], 3),
        "training, TFLOPs": _say([flops / 1e12 for flops in training], 2),
        "training, s": _say([r["seconds"] for r in results], 0),
        "training, peak MB": _say([c["training_peak_mb"] for c in costs if c["training_peak_mb"]], 0),
        "deployed, M parameters": _say([r["parameters_deployed"] / 1e6 for r in results], 3),
        "deployed, MFLOPs an image": _say([c["flops_an_image"] / 1e6 for c in measured], 2),
        "deployed, ms an image": _say([c["ms_an_image"] for c in measured], 2),
        "deployed, peak MB": _say([c["peak_mb"] for c in measured if c["peak_mb"]], 0),
    }


def _say(values: list[Any], digits: int) -> str:
    return f"{fmean(values):,.{digits}f}" if values else "-"


def notes_of(plan: Plan) -> list[str]:
    """Return what a reader of the table must know."""
    o, published = plan.options, plan.published
    source = f"{published['source']}; {published['note']}"
    notes = [f"Published numbers: {published['paper']}, {published['place']} ({source})."] if o.scale != "smoke" else []
    notes += [f"Our choice where the sources are silent: {guess}." for guess in plan.recipe.guesses]
    if o.scale != "full":
        why = (
            "no number of the paper stands beside them"
            if o.scale == "smoke"
            else "the paper's column is not comparable"
        )
        notes.append(f"These are no results of the paper's setting ({SCALES[o.scale]}); {why}.")
    if o.protocol == "honest":
        notes.append("A tenth of the training set is kept for validation; the paper trains on all of it.")
    else:
        notes.append("The best test epoch is chosen on the test set, as the papers do; the last epoch is not.")
    notes.append(LEGEND + ".")
    return notes
