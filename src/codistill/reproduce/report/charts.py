"""The charts of a report, as plain data for plotly.js: traces that carry their group, so that a page can toggle them.

A chart has views; the page shows one at a time and lets the reader choose. Nothing here draws.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from codistill.reproduce.report.collect import Group, Run, Section

Trace = dict[str, Any]
View = dict[str, Any]
Chart = dict[str, Any]

HOVER = "epoch %{x}: %{y:.2f}<extra>%{fullData.name}</extra>"


def charts_of(section: Section) -> list[Chart]:
    """Return the charts that the section's runs have figures for."""
    groups = section.groups
    seeds, pooled = "Mean over seeds.", "Test set, seeds pooled"
    known = [
        ("Learning curves", "Mean over seeds, band: one deviation to either side.", _learning),
        ("Diversity and ensemble", "Of the peers whose ensemble is judged; mean over seeds.", _diversity),
        ("Accuracy against cost", "The member deployed, test set, last epoch; bars: one deviation.", _cost),
        ("Every member", seeds, _members),
        ("Who is listened to", "Weights that the method gives its members, epoch means over seeds.", _weights),
        ("Reliability", f"{pooled}; above the diagonal: too modest, below: too sure.", _reliability),
        ("Confusion", f"{pooled}, the member deployed; a row is a true class, in %.", _confusion),
    ]
    charts = [_chart(title, note, views(groups)) for title, note, views in known]
    return [chart for chart in charts if chart["views"]]


def _chart(title: str, note: str, views: list[View]) -> Chart:
    return {"title": title, "note": note, "views": [view for view in views if view["traces"]]}


def plain(text: str) -> str:
    """Return text that plotly.js shows as it is: it would read tags."""
    return html.escape(text, quote=False)


def _view(name: str, traces: list[Trace], x: str, y: str, **layout: Any) -> View:
    return {"name": name, "traces": traces, "x": x, "y": y, "layout": layout}


# ----------------------------------------------------------------------------------------------------------------------
# Curves over epochs

Pick = Callable[[dict[str, Any]], float | None]


def _part(line: dict[str, Any]) -> str | None:
    return next((part for part in ("val", "test") if part in line), None)


def _curve(group: Group, pick: Pick) -> tuple[list[int], list[float], list[float] | None]:
    """Return epochs, means over the seeds that have a figure there, and deviations (None for one seed)."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for line in run.lines:
            value = pick(line)
            if value is not None:
                values.setdefault(line["epoch"] + 1, []).append(value)
    epochs = sorted(values)
    means = [fmean(values[e]) for e in epochs]
    several = any(len(values[e]) > 1 for e in epochs)
    return epochs, means, [stdev(values[e]) if len(values[e]) > 1 else 0.0 for e in epochs] if several else None


def _lines(groups: list[Group], pick: Pick, band: bool = True) -> list[Trace]:
    traces: list[Trace] = []
    for group in groups:
        epochs, means, spread = _curve(group, pick)
        if not epochs:
            continue
        if spread is not None and band:
            y = [m + s for m, s in zip(means, spread)] + [m - s for m, s in reversed([*zip(means, spread)])]
            edge = {"x": epochs + epochs[::-1], "y": _short(y), "fill": "toself", "line": {"width": 0}, "band": True}
            traces.append({"type": "scatter", "mode": "lines", "hoverinfo": "skip", "group": group.label, **edge})
        mode = "lines" if len(epochs) > 1 else "markers"
        line = {"type": "scatter", "mode": mode, "x": epochs, "y": _short(means), "hovertemplate": HOVER}
        traces.append({**line, "name": plain(group.label), "group": group.label})
    return traces


def _short(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _student(line: dict[str, Any]) -> float | None:
    part = _part(line)
    return None if part is None else line[f"{part}_student"]["top1"]


def _of_part(name: str) -> Pick:
    """Return a picker of a figure of the whole group; one member alone has none."""

    def pick(line: dict[str, Any]) -> float | None:
        part = _part(line)
        return None if part is None or len(line[part]["top1"]) < 2 else line[part].get(name)

    return pick


def _ensemble_gain(line: dict[str, Any]) -> float | None:
    part = _part(line)
    if part is None or len(line[part]["top1"]) < 2:
        return None
    return line[part]["ensemble_top1"] - fmean(line[part]["top1"])


def _learning(groups: list[Group]) -> list[View]:
    tests = any(_part(line) == "test" for group in groups for run in group.runs for line in run.lines)
    part, epoch = ("test" if tests else "validation"), "epoch"
    return [
        _view("member deployed", _lines(groups, _student), epoch, f"{part} top-1, %"),
        _view("ensemble", _lines(groups, _of_part("ensemble_top1")), epoch, f"{part} top-1, %"),
        _view("training loss", _lines(groups, lambda line: line["train"]["loss"]), epoch, "loss, summed over members"),
        _view("calibration error", _lines(groups, _ece), epoch, f"{part} ECE, 15 bins"),
        _view("weight of distillation", _lines(groups, lambda line: line["weight"], band=False), epoch, "weight"),
    ]


def _ece(line: dict[str, Any]) -> float | None:
    part = _part(line)
    return None if part is None else line[f"{part}_student"]["ece"]


def _diversity(groups: list[Group]) -> list[View]:
    names = {
        "distance": ("diversity", "mean L2 distance of softmaxes"),
        "disagreement": ("disagreement", "part of images on which a pair disagrees"),
        "correlation of errors": ("error_correlation", "mean correlation of being wrong"),
    }
    views = [_view(name, _lines(groups, _of_part(key)), "epoch", axis) for name, (key, axis) in names.items()]
    return [
        *views,
        _view("gain of the ensemble", _lines(groups, _ensemble_gain), "epoch", "points over the mean member"),
    ]


def _members(groups: list[Group]) -> list[View]:
    views = []
    for group in groups:
        count = max((len(line["train"]["top1"]) for run in group.runs for line in run.lines), default=0)
        picks: list[tuple[str, Pick]] = [(f"member {p}", _member(p)) for p in range(count)] if count > 1 else []
        picks += [("ensemble", _of_part("ensemble_top1"))] if count > 1 else []
        picks += [(f"mean teacher {p}", _member(p, "_ema")) for p in range(count) if _has_ema(group)]
        traces = []
        for name, pick in picks:
            for trace in _lines([group], pick, band=False):
                dash = "dash" if name == "ensemble" else "dot" if "teacher" in name else "solid"
                traces.append(trace | {"name": name, "group": None, "dash": dash})
        views.append(_view(group.label, traces, "epoch", "top-1, %"))
    return views


def _member(index: int, kind: str = "") -> Pick:
    def pick(line: dict[str, Any]) -> float | None:
        part = _part(line)
        return None if part is None or part + kind not in line else line[part + kind]["top1"][index]

    return pick


def _has_ema(group: Group) -> bool:
    return any(f"{_part(line)}_ema" in line for run in group.runs for line in run.lines)


def _weights(groups: list[Group]) -> list[View]:
    """Return a heat map over epochs for each group whose method weighs its members."""
    views = []
    for group in groups:
        for name in sorted({key for run in group.runs for line in run.lines for key in line.get("method", {})}):
            sums: dict[int, list[list[float]]] = {}
            labels: list[str] = []
            for run in group.runs:
                for line in run.lines:
                    if name in line.get("method", {}):
                        labels, values = _flat(line["method"][name])
                        sums.setdefault(line["epoch"] + 1, []).append(values)
            epochs = sorted(sums)
            z = [[round(fmean(v[i] for v in sums[e]), 4) for e in epochs] for i in range(len(labels))]
            about = {
                "hovertemplate": "epoch %{x}, %{y}: %{z:.3f}<extra></extra>",
                "colorbar": {"title": {"text": "weight"}},
            }
            trace = {"type": "heatmap", "x": epochs, "y": labels, "z": z, "heat": True, **about}
            views.append(_view(f"{group.label}, {name}", [trace], "epoch", "", yaxis={"autorange": "reversed"}))
    return sorted(views, key=lambda view: not view["name"].endswith("attention"))


def _flat(weights: list[Any]) -> tuple[list[str], list[float]]:
    if weights and isinstance(weights[0], list):
        pairs = [(f"peer {a} to {b}", value) for a, row in enumerate(weights) for b, value in enumerate(row)]
    else:
        pairs = [(f"member {p}", value) for p, value in enumerate(weights)]
    return [name for name, _ in pairs], [value for _, value in pairs]


# ----------------------------------------------------------------------------------------------------------------------
# Figures of finished runs


def _cost(groups: list[Group]) -> list[View]:
    axes: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "training, TFLOPs": lambda r: _training_flops(r),
        "training, seconds": lambda r: r["seconds"],
        "trained, M parameters": lambda r: r["parameters_trained"] / 1e6,
        "deployed, MFLOPs an image": lambda r: r.get("cost", {}).get("flops_an_image", 0) / 1e6 or None,
    }
    views = []
    for name, pick in axes.items():
        traces = []
        for group in groups:
            done = [(run.result, pick(run.result)) for run in group.runs if run.result is not None]
            pairs = [(x, r["student"]["top1"]) for r, x in done if x is not None]
            if not pairs:
                continue
            tops = [y for _, y in pairs]
            error = {"type": "data", "array": [round(stdev(tops), 3)], "visible": True} if len(tops) > 1 else None
            point = {"x": [round(fmean(x for x, _ in pairs), 4)], "y": [round(fmean(tops), 3)], "error_y": error}
            hover = f"%{{y:.2f}} % at %{{x:.4g}}, n = {len(tops)}<extra>%{{fullData.name}}</extra>"
            kind = {"type": "scatter", "mode": "markers", "marker": {"size": 11}, "hovertemplate": hover}
            traces.append({**kind, **point, "name": plain(group.label), "group": group.label})
        views.append(_view(name, traces, name, "test top-1, %", xaxis={"rangemode": "tozero"}))
    return views


def _training_flops(result: dict[str, Any]) -> float | None:
    cost = result.get("cost", {})
    a_sample = cost.get("training_flops_a_sample")
    return a_sample * cost["samples_seen"] / 1e12 if a_sample else None


def _reliability(groups: list[Group]) -> list[View]:
    views = []
    for name, key in (("member deployed", "reliability"), ("ensemble", "ensemble_reliability")):
        traces = []
        for group in groups:
            bins = _pooled(group.runs, key)
            if bins:
                xs, ys, counts = ([round(b[i], 4) for b in bins] for i in range(3))
                hover = "confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata} images<extra>%{fullData.name}</extra>"
                line = {"type": "scatter", "mode": "lines+markers", "x": xs, "y": ys, "customdata": counts}
                traces.append({**line, "hovertemplate": hover, "name": plain(group.label), "group": group.label})
        if traces:
            diagonal: Trace = {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip"}
            traces.insert(0, diagonal | {"group": None, "guide": True, "showlegend": False})
        square = {"xaxis": {"range": [0, 1]}, "yaxis": {"range": [0, 1.02]}}
        views.append(_view(name, traces, "confidence", "accuracy", **square))
    return views


def _pooled(runs: list[Run], key: str) -> list[tuple[float, float, int]]:
    """Return (confidence, accuracy, images) of each bin over all seeds; a bin is found by its confidence."""
    sums: dict[int, list[float]] = {}
    for run in runs:
        for b in run.details.get(key, []):
            place = min(int(b["confidence"] * 15 + 1e-9), 14)
            total = sums.setdefault(place, [0.0, 0.0, 0.0])
            for i, value in enumerate((b["samples"] * b["confidence"], b["samples"] * b["accuracy"], b["samples"])):
                total[i] += value
    return [(c / n, a / n, int(n)) for _, (c, a, n) in sorted(sums.items())]


def _confusion(groups: list[Group]) -> list[View]:
    views = []
    for group in groups:
        tables = [run.details["confusion"] for run in group.runs if "confusion" in run.details]
        if not tables:
            continue
        classes = [plain(str(c)) for c in next(r.details["classes"] for r in group.runs if "confusion" in r.details)]
        total = [[sum(table[i][j] for table in tables) for j in range(len(classes))] for i in range(len(classes))]
        z = [[round(100 * value / max(sum(row), 1), 1) for value in row] for row in total]
        hover = "true %{y}, taken for %{x}: %{z} %<extra></extra>"
        trace = {"type": "heatmap", "x": classes, "y": classes, "z": z, "heat": True, "hovertemplate": hover}
        axis = {"type": "category"}
        layout = {"xaxis": axis, "yaxis": axis | {"autorange": "reversed"}}
        about = trace | {"zmin": 0, "zmax": 100, "colorbar": {"title": {"text": "%"}}}
        views.append(_view(group.label, [about], "taken for", "true class", **layout))
    return views
