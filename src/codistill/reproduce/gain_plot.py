"""A plot in plain characters of what the rows of a comparison gain, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from codistill.reproduce.statistics import Difference

MAX_NAME = 26


def draw_gains(differences: Mapping[str, Difference | None], width: int = 78) -> list[str]:
    """Return the lines of a plot: an axis in points, and a 95 % interval with its mean for every row.

    Args:
        differences: Differences to the baseline of equal cost, by label; None and differences that are not finite are
            left out. Without any other there are no lines.
        width: Characters of a line, at least 50.

    Example:
        >>> for line in draw_gains({"okddip": Difference(1.2, 0.9, 12, 1.4, 0.01)}, 50):
        ...     print(line)
        Gain over the same network alone, points (95 % interval, * significant)
               -1        0        1         2        3
        okddip  .        |  [-------o--------]       . *
    """
    known = {
        label if len(label) <= MAX_NAME else label[: MAX_NAME - 3] + "...": difference
        for label, difference in differences.items()
        if difference is not None and math.isfinite(difference.mean) and math.isfinite(difference.half_width)
    }
    if not known:
        return []
    low = min(0.0, *(d.mean - d.half_width for d in known.values()))
    high = max(0.0, *(d.mean + d.half_width for d in known.values()))
    step = _tick_step(max(high - low, 0.2))
    first, last = math.floor(low / step), math.ceil(high / step)
    first, last = (first - 1, last) if first == 0 else (first, last)
    last = last + 1 if last == 0 else last
    names = max(map(len, known))
    columns = width - names - 6
    ticks = range(first, last + 1)

    def column(value: float) -> int:
        return round((value - first * step) / ((last - first) * step) * (columns - 1))

    head = [" "] * (columns + 8)
    for tick in ticks:
        text = f"{tick * step:.10g}"
        place = max(column(tick * step) + 4 - len(text) // 2, 0)
        head[place : place + len(text)] = text
    lines = [
        "Gain over the same network alone, points (95 % interval, * significant)",
        (" " * (names - 2) + "".join(head)).rstrip(),
    ]
    for label, d in known.items():
        row = ["." if c in {column(t * step) for t in ticks} else " " for c in range(columns)]
        row[column(0.0)] = "|"
        left, middle, right = (column(d.mean + side * d.half_width) for side in (-1, 0, 1))
        row[left : right + 1] = ["-"] * (right + 1 - left)
        row[left], row[right], row[middle] = "[", "]", "o"
        lines.append(f"{label:<{names}}  {''.join(row)} {'*' if d.significant else ''}".rstrip())
    return lines


def _tick_step(span: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides a span into 2 to 5 parts."""
    power = 10.0 ** math.floor(math.log10(span / 2))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
