"""The plot of gains in plain characters."""

import math

from codistill.reproduce.gain_plot import draw_gains
from codistill.reproduce.report.charts import make_charts
from codistill.reproduce.report.collect import Section
from codistill.reproduce.statistics import Difference


def difference(mean: float, half_width: float, p_value: float = 0.01) -> Difference:
    return Difference(mean, half_width, 12, 1.0, p_value)


def test_every_interval_stands_where_the_axis_says():
    lines = draw_gains({"a": difference(1.0, 0.5), "bb": difference(-1.0, 0.25, 0.5)}, 70)
    ticks, (first, second) = lines[1], lines[2:]
    assert first.startswith("a   ")
    assert second.startswith("bb  ")
    zero = ticks.index(" 0 ") + 1
    assert first[zero] == second[zero] == "|"
    assert first[ticks.index(" 1 ") + 1] == "o"
    assert second[ticks.index("-1 ") + 1] == "o"
    assert first.endswith(" *")
    assert not second.endswith("*")
    assert first.index("o") - first.index("[") == 2 * (second.index("o") - second.index("["))
    assert all(len(line) <= 72 for line in lines[1:])


def test_what_is_not_finite_is_left_out_and_long_names_are_cut():
    assert draw_gains({"a": None, "b": difference(math.nan, 1.0)}) == []
    lines = draw_gains({"a method with a name of many words": difference(0.0, 0.0, 1.0)})
    assert len(lines) == 3
    assert "..." in lines[2]
    assert "o" in lines[2]
    assert all(len(line) <= 80 for line in lines)


def test_the_report_shows_the_gains_that_are_finite():
    gains = {"okddip": difference(1.2, 0.9), "kdcl": difference(math.nan, 1.0)}
    section = Section("Comparison", "title", [{"peers": "okddip"}], False, [], [], gains=gains)
    (chart,) = make_charts(section)
    (trace,) = chart["views"][0]["traces"]
    assert (chart["title"], trace["x"], trace["y"], trace["error_y"]["array"]) == ("Gain", ["okddip"], [1.2], [0.9])
