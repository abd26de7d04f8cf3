"""Statistics over the seeds of a grid: mean, deviation and paired differences; and the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

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
    from scipy.special import stdtrit  # scipy.stats has the same quantile, and imports a second longer

    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    count = len(differences)
    if count < 2:
        return None
    half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / math.sqrt(count)
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
