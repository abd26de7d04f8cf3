"""The figures of a published table as rows of text, and the notes below them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from codistill.reproduce.grid import Cell
from codistill.reproduce.plan import Plan
from codistill.reproduce.recipes.table_recipe import SCALES
from codistill.reproduce.statistics import format_difference, format_mean_std, format_passes, state_power
from codistill.reproduce.table_figures import Figure, to_measure
from codistill.utils import Rows

LEGEND = (
    "mean ± deviation over seeds (n=1: one run, no deviation); vs equal cost: last epoch against the baseline of equal "
    "training cost (as many members, or as many times the epochs as its name says), paired over seeds, ± 95 % "
    "t-interval, n.s. = not significant (Holm, over the table); passes: forwards and backwards of one plain network "
    "that a training step costs, so that unequal FLOPs show; ensembles: of all members, OKDDip's without its leader; "
    "FLOPs: matrix products and convolutions, forward and backward; peak MB: of the GPU, or of the whole process on a "
    "CPU"
)


def make_table_rows(plan: Plan, figures: list[Figure]) -> Rows:
    """Return the table's rows; the paper's numbers are included at full scale, and at short scale with a mark."""
    o, unit = plan.options, f"{plan.published['measure']} %"
    paper = {"full": f"paper, {unit}", "short": f"paper at full scale, not comparable, {unit}"}.get(o.scale)
    honest = o.protocol == "honest"
    rows = []
    for figure in figures:
        row = {"network": network_label(plan, figure.network), "method": _method_label(figure)}
        if paper is not None and plan.published["rows"]:
            row[paper] = format_published(figure.published)
        row[f"test, last epoch, {unit}"] = _format_figure(figure, figure.last)
        if not honest:
            row[f"best test epoch (chosen on the test set), {unit}"] = _format_figure(figure, figure.best)
        if o.scale == "full" and plan.published["rows"]:
            row["ours - paper" if honest else "ours (best) - paper"] = _format_gap(figure)
        row["last vs equal cost"] = format_difference(figure.versus)
        row[f"its ensemble, {unit}"] = _format_ensemble(plan, figure)
        row["n"] = str(len(figure.last))
        row["evaluated"] = figure.evaluated
        rows.append(row | cost_columns(figure.cell))
    return rows


def network_label(plan: Plan, network: str) -> str:
    """Return the network's name, and under --scale smoke also the network that was trained instead."""
    return f"resnet8 (for {network})" if plan.options.scale == "smoke" else network


def _format_ensemble(plan: Plan, figure: Figure) -> str:
    """Return the accuracy (or error) of the group's ensemble at the last epoch."""
    tests = [r["test"] for r in figure.cell.results.values()] if figure.cell is not None else []
    if figure.ref.metric != "top1" or figure.ref.source == "gain" or not all(len(run["top1"]) > 1 for run in tests):
        return "-"
    if not tests:
        return "-"
    return format_mean_std([to_measure(plan, figure.ref, run["ensemble_top1"]) for run in tests])


def _method_label(figure: Figure) -> str:
    """Return the method, and the measured network where a run yields several figures."""
    several = figure.cell is not None and len(figure.cell.cell_refs) > 1
    return f"{figure.method}, {figure.ref.subject}" if several else figure.method


def _format_figure(figure: Figure, values: dict[int, float]) -> str:
    if figure.cell is None:
        return "-"
    if not values:
        return "failed" if figure.cell.failures else "-"
    return format_mean_std([values[seed] for seed in sorted(values)])


def format_published(value: tuple[float, float | None] | None) -> str:
    """Return a published number, with its deviation if the paper prints one."""
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _format_gap(figure: Figure) -> str:
    """Return the difference to the paper's number."""
    if figure.published is None or not figure.compared:
        return "-"
    return f"{fmean(figure.compared.values()) - figure.published[0]:+.2f}"


def cost_columns(cell: Cell | None) -> dict[str, str]:
    """Return the costs of training and of deployment, mean over seeds; `-` where they were not measured."""
    results = list(cell.results.values()) if cell is not None else []
    costs = [result["cost"] for result in results if "cost" in result]
    figures = lambda name: [cost[name] for cost in costs if cost.get(name)]  # noqa: E731
    training = [
        c["training_flops_a_sample"] * c.get("samples_seen", 0) for c in costs if c.get("training_flops_a_sample")
    ]
    return {
        "training, passes": format_passes(results),
        "trained, M parameters": _format_mean([r["parameters_trained"] / 1e6 for r in results], 3),
        "training, TFLOPs": _format_mean([flops / 1e12 for flops in training], 2),
        "training, s": _format_mean([r["seconds"] for r in results], 0),
        "training, peak MB": _format_mean(figures("training_peak_mb"), 0),
        "deployed, M parameters": _format_mean([r["parameters_deployed"] / 1e6 for r in results], 3),
        "deployed, MFLOPs per image": _format_mean([flops / 1e6 for flops in figures("flops_an_image")], 2),
        "deployed, ms per image": _format_mean(figures("ms_an_image"), 2),
        "deployed, peak MB": _format_mean(figures("peak_mb"), 0),
    }


def _format_mean(values: list[Any], digits: int) -> str:
    return f"{fmean(values):,.{digits}f}" if values else "-"


def summarize_table(plan: Plan, figures: list[Figure]) -> list[str]:
    """Return the result of a table in plain words: who differs from the baseline of equal cost, and the seeds needed.

    Args:
        plan: The table.
        figures: Its figures, from `make_figures`.
    """
    known = [(figure, figure.versus) for figure in figures if figure.versus is not None]
    if not known:
        return ["No row has two seeds in common with a baseline of equal training cost, so none is compared."]
    lower_is_better = plan.published["measure"] == "error"
    several = len({figure.network for figure, _ in known}) > 1
    found: dict[str, list[str]] = {"better": [], "worse": [], "not significantly different": []}
    for figure, difference in known:
        name = f"{figure.network}: {_method_label(figure)}" if several else _method_label(figure)
        verdict = "better" if (difference.mean < 0) == lower_is_better else "worse"
        verdict = verdict if difference.significant else "not significantly different"
        found[verdict].append(f"{name} ({difference.mean:+.2f} ± {difference.half_width:.2f})")
    verdicts = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in found.items() if names)
    counts = sorted({difference.count for _, difference in known})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return [
        f"Against the baseline of equal training cost, in points over {seeds} seeds: {verdicts}.",
        state_power([difference.deviation for _, difference in known]),
    ]


def table_notes(plan: Plan) -> list[str]:
    """Return the notes below the table: sources, choices of the recipe, protocol, legend."""
    o, published = plan.options, plan.published
    source = f"{published['source']}; {published['note']}"
    notes = [f"Published numbers: {published['paper']}, {published['place']} ({source})."] if o.scale != "smoke" else []
    notes += [f"Chosen by this recipe: {guess}." for guess in plan.recipe.guesses]
    if o.scale != "full":
        why = "the paper's numbers are left out" if o.scale == "smoke" else "the paper's column is not comparable"
        notes.append(f"These results do not use the paper's setting ({SCALES[o.scale]}); {why}.")
    if o.protocol == "honest":
        notes.append("A tenth of the training set is held out for validation; the paper trains on all of it.")
    else:
        notes.append(
            "The best test epoch is chosen on the test set, as in OKDDip's code and ONE's script; the last is not."
        )
    notes.append(LEGEND + ".")
    return notes
