"""Statistics over the seeds of a grid: mean, deviation and paired differences; and the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from codistill.reproduce.grid import Cell
from codistill.utils import Rows


def format_mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Return `mean ± deviation` (of the sample, n - 1); one value is written without a deviation, marked `n=1`."""
    if not values:
        return "failed"
    if not all(map(math.isfinite, values)):
        return "not finite"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (n=1)"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


@dataclass
class Difference:
    """A mean difference paired over seeds."""

    mean: float
    half_width: float
    """Of the 95 % t-interval."""
    count: int
    """Number of pairs."""
    deviation: float
    """Standard deviation of the differences."""
    p_value: float
    """Of the two-sided paired t-test."""
    corrected_p: float | None = None
    """Holm's p-value among all differences of its table."""

    @property
    def significant(self) -> bool:
        """Whether the (corrected) p-value is below 0.05."""
        return (self.p_value if self.corrected_p is None else self.corrected_p) < 0.05


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Return the mean difference over the common seeds with its 95 % t-interval.

    None for fewer than 2 seeds, and where a value is not finite: the run of that seed diverged.

    >>> d = paired_difference({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    >>> round(d.mean, 3), round(d.half_width, 3), d.count, round(d.p_value, 4)
    (2.0, 2.484, 3, 0.0742)
    """
    from scipy.special import stdtr, stdtrit  # scipy.stats has the same functions, and imports a second longer

    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return None
    mean, deviation = fmean(differences), stdev(differences)
    error = deviation / math.sqrt(count)
    half_width = float(stdtrit(count - 1, 0.975)) * error
    p_value = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, half_width, count, deviation, p_value)


def correct_holm(differences: Iterable[Difference | None]) -> None:
    """Fill in the corrected p-values of all differences of one table (Holm, 1979: step-down, all comparisons at once).

    >>> table = [Difference(1, 0.5, 9, 1, p) for p in (0.01, 0.04, 0.03)]
    >>> correct_holm(table)
    >>> [d.corrected_p for d in table]
    [0.03, 0.06, 0.06]
    """
    ordered = sorted((d for d in differences if d is not None), key=lambda d: d.p_value)
    highest = 0.0
    for rank, difference in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * difference.p_value))
        difference.corrected_p = highest


def seeds_needed(deviation: float, half_width: float) -> int:
    """Return the least number of seeds whose 95 % t-interval has at most this half width, given the deviation.

    >>> seeds_needed(1.5, 1.0), seeds_needed(1.5, 0.5)
    (12, 38)
    """
    from scipy.special import stdtrit

    count = 2
    while float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count) > half_width:
        count += 1
    return count


def format_difference(difference: Difference | None) -> str:
    """Return a difference with its interval, marked n.s. where it is not significant."""
    if difference is None:
        return "-"
    mark = "" if difference.significant else " (n.s.)"
    return f"{difference.mean:+.2f} ± {difference.half_width:.2f}{mark}"


def accuracy_by_seed(cell: Cell) -> dict[int, float]:
    """Return the test accuracy of the deployed member at the last epoch, by seed."""
    return {seed: r["student"]["top1"] for seed, r in cell.results.items()}


def differences_to_baselines(cells: list[Cell]) -> dict[str, Difference | None]:
    """Return every row's paired difference to its baseline, by label, corrected for all rows of the table.

    The deployed member is compared with the baseline's member of the same number, which began with the same weights:
    okddip deploys its last member. Where the baseline has no such member, its deployed one is taken. An average of a
    member's weights is compared with the baseline's average of the same member.
    """
    by_label = {cell.label: cell for cell in cells}
    found = {}
    for cell in cells:
        baseline = by_label.get(cell.baseline or "")
        if baseline is not None:
            ours = accuracy_by_seed(cell)
            found[cell.label] = paired_difference(ours, _same_member_by_seed(cell, baseline))
    correct_holm(found.values())
    return found


def _same_member_by_seed(cell: Cell, baseline: Cell) -> dict[int, float]:
    """Return the baseline's accuracy of the member that began as the deployed one did, by seed."""
    accuracies = accuracy_by_seed(baseline)
    for seed, result in cell.results.items():
        kind, _, number = result.get("deployed", "").rpartition(" ")
        part = {"member": "test", "EMA of member": "test_ema", "SWA of member": "test_swa"}.get(kind, "")
        members = baseline.results.get(seed, {}).get(part, {}).get("top1", [])
        if number.isdigit() and int(number) < len(members):
            accuracies[seed] = members[int(number)]
    return accuracies


def summarize_comparison(cells: list[Cell], peers: int) -> list[str]:
    """Return the result of a comparison in plain words: a sentence per method, and how many seeds would be needed.

    Args:
        cells: The rows; costs are multiples of the first one's, which is one plain network.
        peers: Taken for the multiple of training where FLOPs were not measured.
    """
    sentences, by_label = [], {cell.label: cell for cell in cells}
    differences = differences_to_baselines(cells)
    for label, difference in differences.items():
        if difference is None:
            continue
        method, _, topology = label.partition(" ")
        other = "one plain network" if by_label[label].baseline == "one plain network" else "the same network"
        if difference.significant:
            direction = "better" if difference.mean > 0 else "worse"
            amount = f"{abs(difference.mean):.1f} ± {difference.half_width:.1f} points"
            result = f"is {amount} {direction} than {other} trained without exchange"
        else:
            interval = f"{difference.mean:+.1f} ± {difference.half_width:.1f} points"
            result = f"does not differ significantly from {other} trained without exchange ({interval})"
        subject = label if label.startswith("one network") else f"the {method} student ({topology})"
        subject = f"Over {difference.count} seeds {subject}"
        training = _median_ratio(by_label[label], cells[0], _training_flops) or peers
        deployment = _median_ratio(by_label[label], cells[0], _deployment_flops) or 1
        costs = f"{training:.2g} x the training and {deployment:.2g} x the deployment cost"
        sentences.append(f"{subject} {result}, at {costs}.")
    deviations = [d.deviation for d in differences.values() if d is not None]
    if deviations:
        sentences.append(
            "What else the same cost buys: a longer training of one network, an average of its weights, a larger "
            "network, or an ensemble where several networks can be deployed."
        )
        sentences.append(state_power(deviations))
    return sentences


def state_power(deviations: Sequence[float]) -> str:
    """Return how many seeds an interval of one point, and of half a point, needs.

    Args:
        deviations: Standard deviations of the paired differences of a table; the largest counts.
    """
    worst = max(deviations)
    return (
        f"With the largest deviation seen ({worst:.2f} points), an interval of ± 1 point needs "
        f"{seeds_needed(worst, 1.0)} seeds, one of ± 0.5 needs {seeds_needed(worst, 0.5)}."
    )


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


def format_passes(results: Iterable[dict[str, Any]]) -> str:
    """Return what a training step costs in passes (forward and backward) of a plain network, mean over seeds.

    >>> format_passes([{"cost": {"training_passes": 2.0}}, {"cost": {"training_passes": 2.1}}])
    '2.05'
    """
    passes = [p for result in results if (p := result.get("cost", {}).get("training_passes"))]
    return f"{fmean(passes):.2f}" if passes else "-"


def comparison_rows(cells: list[Cell]) -> Rows:
    """Return one dictionary per cell: the columns of the table, as text."""
    differences = differences_to_baselines(cells)
    top5 = any("top5" in r["test"] for cell in cells for r in cell.results.values())
    rows = []
    for cell in cells:
        tests = [r["test"] for r in cell.results.values()]
        students = [r["student"] for r in cell.results.values()]
        several = any(len(test["top1"]) > 1 for test in tests)
        accuracy = accuracy_by_seed(cell)
        row = {"peers": cell.label, "n": str(len(tests)), "top-1 %": format_mean_std(list(accuracy.values()))}
        row["passes"] = format_passes(cell.results.values())
        if top5:
            row["top-5 %"] = format_mean_std([s["top5"] for s in students if "top5" in s])
        row["vs equal cost"] = format_difference(differences.get(cell.label))
        row["ensemble %"] = format_mean_std([test["ensemble_top1"] for test in tests]) if several else "-"
        row["diversity"] = format_mean_std([test["diversity"] for test in tests], 3) if several else "-"
        row["ECE"] = format_mean_std([s["ece"] for s in students], 3)
        any_result = next(iter(cell.results.values()), None)
        row["parameters trained"] = f"{any_result['parameters_trained']:,}" if any_result else "-"
        row["deployed"] = f"{any_result['parameters_deployed']:,}" if any_result else "-"
        row["s per run"] = f"{fmean(r['seconds'] for r in cell.results.values()):.1f}" if any_result else "-"
        rows.append(row)
    return rows
