"""Statistics over the seeds of a grid: mean, deviation and paired differences; and the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from codistill.reproduce.grid import Cell
from codistill.utils import Rows


def format_mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Return `mean ± deviation` (of the sample, n - 1); one value is written without a deviation, marked `n=1`."""
    if not values:
        return "failed"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (n=1)"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


Difference = tuple[float, float, int]
"""Mean, half width of its 95 % t-interval, n."""


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Return (mean difference, half width of its 95 % t-interval, n) over the common seeds; None for fewer than 2."""
    from scipy.stats import t as student_t

    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    count = len(differences)
    if count < 2:
        return None
    half = float(student_t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return fmean(differences), half, count


def format_difference(difference: Difference | None) -> str:
    """Return a difference with its interval, marked n.s. where the interval includes zero."""
    if difference is None:
        return "-"
    mean, half, _ = difference
    mark = "" if abs(mean) > half else " (n.s.)"
    return f"{mean:+.2f} ± {half:.2f}{mark}"


def accuracy_by_seed(cell: Cell) -> dict[int, float]:
    """Return the test accuracy of the deployed member at the last epoch, by seed."""
    return {seed: r["student"]["top1"] for seed, r in cell.results.items()}


def comparison_sentences(cells: list[Cell]) -> list[str]:
    """Say in plain words what each method gained over its baseline of equal cost, and at which costs.

    Independent networks share nothing, so their deployed member is the same network trained alone. Costs are counted
    operations, as multiples of one plain network's.
    """
    by_label = {cell.label: cell for cell in cells}
    sentences = []
    for cell in cells:
        baseline = by_label.get(cell.baseline or "")
        difference = paired_difference(accuracy_by_seed(cell), accuracy_by_seed(baseline)) if baseline else None
        if difference is None:
            continue
        mean, half, count = difference
        name = cell.config.method.name
        against = "the same network alone" if cell.config.topology == "networks" else "the same branch without exchange"
        better = f"{abs(mean):.1f} ± {half:.1f} points {'better' if mean > 0 else 'worse'} than {against}"
        start = f"Over {count} seeds the {name} student is {better}"
        if abs(mean) <= half:
            start = (
                f"Over {count} seeds the {name} student shows no significant difference to {against} "
                f"({mean:+.1f} ± {half:.1f} points)"
            )
        sentences.append(start + _costs_in_words(cell, cells[0]) + ".")
    if sentences:
        sentences.append(
            "What else the same cost buys: a longer training of one network, an average of its weights, a larger "
            "network, or an ensemble, where several networks can be deployed."
        )
    return sentences


def _costs_in_words(cell: Cell, plain: Cell) -> str:
    """Return the costs of a row as multiples of one plain network's, empty where they were not measured."""
    training, deployment = (_median_ratio(cell, plain, cost) for cost in (_training_flops, _deployment_flops))
    if training is None or deployment is None:
        return ""
    return f", at {training:.2g} x the training and {deployment:.2g} x the deployment cost of one plain network"


def _median_ratio(cell: Cell, plain: Cell, cost: Callable[[dict[str, Any]], float | None]) -> float | None:
    """Return the ratio of two rows' costs, None where one was not measured."""
    ours, theirs = ([c for r in row.results.values() if (c := cost(r)) is not None] for row in (cell, plain))
    return median(ours) / median(theirs) if ours and theirs else None


def _training_flops(result: dict[str, Any]) -> float | None:
    cost = result.get("cost", {})
    flops = cost.get("training_flops_a_sample")
    return flops * cost["samples_seen"] if flops else None


def _deployment_flops(result: dict[str, Any]) -> float | None:
    return result.get("cost", {}).get("flops_an_image")


def comparison_rows(cells: list[Cell]) -> Rows:
    """Return one dictionary per cell: the columns of the table, as text."""
    by_label = {cell.label: cell for cell in cells}
    top5 = any("top5" in r["test"] for cell in cells for r in cell.results.values())
    rows = []
    for cell in cells:
        tests = [r["test"] for r in cell.results.values()]
        students = [r["student"] for r in cell.results.values()]
        several = any(len(test["top1"]) > 1 for test in tests)
        accuracy = accuracy_by_seed(cell)
        row = {"peers": cell.label, "n": str(len(tests)), "top-1 %": format_mean_std(list(accuracy.values()))}
        if top5:
            row["top-5 %"] = format_mean_std([s["top5"] for s in students])
        baseline = by_label.get(cell.baseline or "")
        difference = paired_difference(accuracy, accuracy_by_seed(baseline)) if baseline else None
        row["vs equal cost"] = format_difference(difference)
        row["ensemble %"] = format_mean_std([test["ensemble_top1"] for test in tests]) if several else "-"
        row["diversity"] = format_mean_std([test["diversity"] for test in tests], 3) if several else "-"
        row["ECE"] = format_mean_std([s["ece"] for s in students], 3)
        any_result = next(iter(cell.results.values()), None)
        row["parameters trained"] = f"{any_result['parameters_trained']:,}" if any_result else "-"
        row["deployed"] = f"{any_result['parameters_deployed']:,}" if any_result else "-"
        row["s per run"] = f"{fmean(r['seconds'] for r in cell.results.values()):.1f}" if any_result else "-"
        rows.append(row)
    return rows
