"""The charts of a report, as plain data for plotly.js: each trace names its group, so that a page can hide it.

A chart has views; the page shows the one that the reader selects. page.js draws them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any, cast

from codistill.reproduce.report.collect import Group, RunData, Section

Trace = dict[str, Any]
View = dict[str, Any]
Chart = dict[str, Any]

HOVER = "epoch %{x}: %{y:.2f}<extra>%{fullData.name}</extra>"


def make_charts(section: Section) -> list[Chart]:
    """Return the charts of the section; a chart without data is left out."""
    groups = section.groups
    seeds, pooled = "Mean over seeds.", "Test set, seeds pooled"
    known = [
        ("Learning curves", "Mean over seeds; band: ± one standard deviation.", _learning_views),
        ("Diversity and ensemble", "Of the peers that form the ensemble; mean over seeds.", _diversity_views),
        ("Accuracy against cost", "Deployed member, test set, last epoch; bars: ± one deviation.", _cost_views),
        ("Every member", seeds, _member_views),
        ("Weights of the members", "What the method reports of its members; epoch means over seeds.", _weight_views),
        ("Reliability", f"{pooled}; above the diagonal: underconfident, below: overconfident.", _reliability_views),
        ("Confusion", f"{pooled}, deployed member; each row is a true class, in %.", _confusion_views),
    ]
    charts = [
        _make_chart("Gain", "Over the baseline of equal cost, paired; bars: 95 % intervals.", [_gain_view(section)])
    ]
    charts += [_make_chart(title, note, views(groups)) for title, note, views in known]
    return [chart for chart in charts if chart["views"]]


def _make_chart(title: str, note: str, views: list[View]) -> Chart:
    return {"title": title, "note": note, "views": [view for view in views if view["traces"]]}


def escape_name(text: str) -> str:
    """Return text that plotly.js shows unchanged: it interprets HTML tags."""
    return html.escape(text, quote=False)


def _make_view(name: str, traces: list[Trace], x: str, y: str, **layout: Any) -> View:
    return {"name": name, "traces": traces, "x": x, "y": y, "layout": layout}


# ----------------------------------------------------------------------------------------------------------------------
# Curves over epochs

Pick = Callable[[Mapping[str, Any]], float | None]


def _evaluated_split(line: Mapping[str, Any]) -> str | None:
    """Return the split that an epoch's line has figures of, validation before test."""
    return next((split for split in ("val", "test") if split in line), None)


def _average_curve(group: Group, pick: Pick) -> tuple[list[int], list[float], list[float] | None]:
    """Return epochs, means over the seeds with a value there, and standard deviations (None for one seed)."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for line in run.lines:
            value = pick(line)
            if value is not None and math.isfinite(value):  # a run that diverged ends its curve
                values.setdefault(line["epoch"] + 1, []).append(value)
    epochs = sorted(values)
    means = [fmean(values[e]) for e in epochs]
    several = any(len(values[e]) > 1 for e in epochs)
    return epochs, means, [stdev(values[e]) if len(values[e]) > 1 else 0.0 for e in epochs] if several else None


def _curve_traces(groups: list[Group], pick: Pick, band: bool = True) -> list[Trace]:
    traces: list[Trace] = []
    for group in groups:
        epochs, means, spread = _average_curve(group, pick)
        if not epochs:
            continue
        if spread is not None and band:
            y = [m + s for m, s in zip(means, spread)] + [m - s for m, s in reversed([*zip(means, spread)])]
            edge = {"x": epochs + epochs[::-1], "y": _round(y), "fill": "toself", "line": {"width": 0}, "band": True}
            traces.append({"type": "scatter", "mode": "lines", "hoverinfo": "skip", "group": group.label, **edge})
        mode = "lines" if len(epochs) > 1 else "markers"
        line = {"type": "scatter", "mode": mode, "x": epochs, "y": _round(means), "hovertemplate": HOVER}
        traces.append({**line, "name": escape_name(group.label), "group": group.label})
    return traces


def _round(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _student_figure(name: str) -> Pick:
    """Return a function that reads a figure of the deployed student from an epoch's line."""

    def pick(line: Mapping[str, Any]) -> float | None:
        split = _evaluated_split(line)
        return None if split is None else line[f"{split}_student"][name]

    return pick


def _group_figure(name: str) -> Pick:
    """Return a function that reads a figure of the group from an epoch's line; a single member has none."""

    def pick(line: Mapping[str, Any]) -> float | None:
        split = _evaluated_split(line)
        return None if split is None or len(line[split]["top1"]) < 2 else line[split].get(name)

    return pick


def _ensemble_gain(line: Mapping[str, Any]) -> float | None:
    split = _evaluated_split(line)
    if split is None or len(line[split]["top1"]) < 2:
        return None
    return line[split]["ensemble_top1"] - fmean(line[split]["top1"])


def _learning_views(groups: list[Group]) -> list[View]:
    tests = any(_evaluated_split(line) == "test" for group in groups for run in group.runs for line in run.lines)
    split = "test" if tests else "validation"
    curves: list[tuple[str, Pick, str]] = [
        ("deployed member", _student_figure("top1"), f"{split} top-1, %"),
        ("ensemble", _group_figure("ensemble_top1"), f"{split} top-1, %"),
        ("training loss", lambda line: line["train"]["loss"], "loss, summed over members"),
        ("calibration error", _student_figure("ece"), f"{split} ECE, 15 bins"),
    ]
    weight = _curve_traces(groups, lambda line: line["weight"], band=False)
    return [*_curve_views(groups, curves), _make_view("weight of distillation", weight, "epoch", "weight")]


def _diversity_views(groups: list[Group]) -> list[View]:
    curves: list[tuple[str, Pick, str]] = [
        ("distance", _group_figure("diversity"), "mean L2 distance of softmaxes"),
        ("disagreement", _group_figure("disagreement"), "fraction of images on which a pair disagrees"),
        ("correlation of errors", _group_figure("error_correlation"), "mean correlation of errors"),
        ("gain of the ensemble", _ensemble_gain, "points over the mean member"),
    ]
    return _curve_views(groups, curves)


def _curve_views(groups: list[Group], curves: list[tuple[str, Pick, str]]) -> list[View]:
    return [_make_view(name, _curve_traces(groups, pick), "epoch", axis) for name, pick, axis in curves]


def _member_views(groups: list[Group]) -> list[View]:
    views = []
    for group in groups:
        count = max((len(line["train"]["top1"]) for run in group.runs for line in run.lines), default=0)
        picks: list[tuple[str, Pick]] = [(f"member {p}", _member_top1(p)) for p in range(count)] if count > 1 else []
        picks += [("ensemble", _group_figure("ensemble_top1"))] if count > 1 else []
        for kind in ("_ema", "_swa"):
            words = _name_of_averages(group)
            picks += [(f"{words} {p}", _member_top1(p, kind)) for p in range(count) if _has_averages(group, kind)]
        traces = []
        for name, pick in picks:
            for trace in _curve_traces([group], pick, band=False):
                dash = (
                    "dash"
                    if name == "ensemble"
                    else "dot"
                    if name.startswith(("mean teacher", "EMA", "SWA"))
                    else "solid"
                )
                traces.append(trace | {"name": name, "group": None, "dash": dash})
        views.append(_make_view(group.label, traces, "epoch", "top-1, %"))
    return views


def _member_top1(index: int, kind: str = "") -> Pick:
    def pick(line: Mapping[str, Any]) -> float | None:
        split = _evaluated_split(line)
        top1 = line.get(f"{split}{kind}", {}).get("top1", [])
        return top1[index] if index < len(top1) else None

    return pick


def _has_averages(group: Group, kind: str) -> bool:
    return any(f"{_evaluated_split(line)}{kind}" in line for run in group.runs for line in run.lines)


def _name_of_averages(group: Group) -> str:
    config = group.runs[0].config
    return f"{config.deploy.upper()} of member" if config.keeps_average else "mean teacher"


def _weight_views(groups: list[Group]) -> list[View]:
    """Return a heat map over epochs for each group whose method weights its members."""
    views = []
    for group in groups:
        for name in sorted({key for run in group.runs for line in run.lines for key in line.get("method", {})}):
            sums: dict[int, list[list[float]]] = {}
            labels: list[str] = []
            for run in group.runs:
                for line in run.lines:
                    names, values = _flatten_weights(line.get("method", {}).get(name, []))
                    labels = labels or names
                    if values and names == labels and all(map(math.isfinite, values)):
                        sums.setdefault(line["epoch"] + 1, []).append(values)
            epochs = sorted(sums)
            z = [[round(fmean(v[i] for v in sums[e]), 4) for e in epochs] for i in range(len(labels))]
            options = {
                "hovertemplate": "epoch %{x}, %{y}: %{z:.3f}<extra></extra>",
                "colorbar": {"title": {"text": "mean"}},
            }
            trace = {"type": "heatmap", "x": epochs, "y": labels, "z": z, "heat": True, **options}
            views.append(_make_view(f"{group.label}, {name}", [trace], "epoch", "", yaxis={"autorange": "reversed"}))
    return sorted(views, key=lambda view: not view["name"].endswith("attention"))


def _flatten_weights(weights: list[Any]) -> tuple[list[str], list[float]]:
    if weights and isinstance(weights[0], list):
        pairs = [(f"peer {a} to {b}", value) for a, row in enumerate(weights) for b, value in enumerate(row)]
    else:
        pairs = [(f"member {p}", value) for p, value in enumerate(weights)]
    return [name for name, _ in pairs], [value for _, value in pairs]


# ----------------------------------------------------------------------------------------------------------------------
# Results of finished runs


def _gain_view(section: Section) -> View:
    traces: list[Trace] = []
    for label, gain in section.gains.items():
        if not (math.isfinite(gain.mean) and math.isfinite(gain.half_width)):
            continue
        bars = {"type": "data", "array": [round(gain.half_width, 3)], "visible": True}
        hover = f"%{{y:+.2f}} ± {gain.half_width:.2f}, n = {gain.count}<extra>%{{fullData.name}}</extra>"
        point = {"x": [escape_name(label)], "y": [round(gain.mean, 3)], "error_y": bars, "hovertemplate": hover}
        kind = {"type": "scatter", "mode": "markers", "marker": {"size": 11}, "name": escape_name(label)}
        traces.append({**kind, **point, "group": label})
    zero = {"yaxis": {"zeroline": True, "rangemode": "tozero"}, "xaxis": {"type": "category"}}
    return _make_view("deployed member", traces, "", "gain, points of test top-1", **zero)


def _cost_views(groups: list[Group]) -> list[View]:
    axes: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
        "training, TFLOPs": _training_tflops,
        "training, seconds": lambda r: r["seconds"],
        "trained, M parameters": lambda r: r["parameters_trained"] / 1e6,
        "deployed, MFLOPs per image": lambda r: r.get("cost", {}).get("flops_an_image", 0) / 1e6 or None,
    }
    views = []
    for name, pick in axes.items():
        traces = []
        for group in groups:
            done = [(run.result, pick(run.result)) for run in group.runs if run.result is not None]
            pairs = [(x, r["student"]["top1"]) for r, x in done if x is not None and math.isfinite(x)]
            pairs = [(x, y) for x, y in pairs if math.isfinite(y)]
            if not pairs:
                continue
            tops = [y for _, y in pairs]
            error = {"type": "data", "array": [round(stdev(tops), 3)], "visible": True} if len(tops) > 1 else None
            point = {"x": [round(fmean(x for x, _ in pairs), 4)], "y": [round(fmean(tops), 3)], "error_y": error}
            hover = f"%{{y:.2f}} % at %{{x:.4g}}, n = {len(tops)}<extra>%{{fullData.name}}</extra>"
            kind = {"type": "scatter", "mode": "markers", "marker": {"size": 11}, "hovertemplate": hover}
            traces.append({**kind, **point, "name": escape_name(group.label), "group": group.label})
        views.append(_make_view(name, traces, name, "test top-1, %", xaxis={"rangemode": "tozero"}))
    return views


def _training_tflops(result: Mapping[str, Any]) -> float | None:
    cost = result.get("cost", {})
    flops = cost.get("training_flops_a_sample")
    return flops * cost.get("samples_seen", 0) / 1e12 or None if flops else None


def _reliability_views(groups: list[Group]) -> list[View]:
    views = []
    for name, key in (("deployed member", "reliability"), ("ensemble", "ensemble_reliability")):
        traces = []
        for group in groups:
            bins = _pool_bins(group.runs, key)
            if bins:
                xs, ys, counts = ([round(b[i], 4) for b in bins] for i in range(3))
                hover = "confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata} images<extra>%{fullData.name}</extra>"
                line = {"type": "scatter", "mode": "lines+markers", "x": xs, "y": ys, "customdata": counts}
                traces.append({**line, "hovertemplate": hover, "name": escape_name(group.label), "group": group.label})
        if traces:
            diagonal: Trace = {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip"}
            traces.insert(0, diagonal | {"group": None, "guide": True, "showlegend": False})
        square = {"xaxis": {"range": [0, 1]}, "yaxis": {"range": [0, 1.02]}}
        views.append(_make_view(name, traces, "confidence", "accuracy", **square))
    return views


def _pool_bins(runs: list[RunData], key: str) -> list[tuple[float, float, int]]:
    """Return (confidence, accuracy, images) of each bin over all seeds; a bin's index follows from its confidence."""
    sums: dict[int, list[float]] = {}
    for run in runs:
        for b in cast(Mapping[str, Any], run.details).get(key, []):
            if not (b["samples"] and math.isfinite(b["confidence"]) and math.isfinite(b["accuracy"])):
                continue
            index = min(max(int(b["confidence"] * 15 + 1e-9), 0), 14)
            total = sums.setdefault(index, [0.0, 0.0, 0.0])
            for i, value in enumerate((b["samples"] * b["confidence"], b["samples"] * b["accuracy"], b["samples"])):
                total[i] += value
    return [(c / n, a / n, int(n)) for _, (c, a, n) in sorted(sums.items())]


def _confusion_views(groups: list[Group]) -> list[View]:
    views = []
    for group in groups:
        known = [run.details for run in group.runs if run.details.get("confusion")]
        if not known:
            continue
        names = known[0]["classes"]
        tables = [details["confusion"] for details in known if details["classes"] == names]
        classes = [escape_name(str(name)) for name in names]
        total = [[sum(table[i][j] for table in tables) for j in range(len(classes))] for i in range(len(classes))]
        z = [[round(100 * value / max(sum(row), 1), 1) for value in row] for row in total]
        hover = "true %{y}, predicted %{x}: %{z} %<extra></extra>"
        trace = {"type": "heatmap", "x": classes, "y": classes, "z": z, "heat": True, "hovertemplate": hover}
        axis = {"type": "category"}
        layout = {"xaxis": axis, "yaxis": axis | {"autorange": "reversed"}}
        heatmap = trace | {"zmin": 0, "zmax": 100, "colorbar": {"title": {"text": "%"}}}
        views.append(_make_view(group.label, [heatmap], "predicted class", "true class", **layout))
    return views
