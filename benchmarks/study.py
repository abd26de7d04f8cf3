"""When do peers help? The runs and the page of docs/study.md.

    OMP_NUM_THREADS=1 python benchmarks/study.py run --data-dir data --minutes 120     # train what has no record yet
    python benchmarks/study.py page                                                    # redraw tables and plots

`run` needs Fashion-MNIST in torchvision's layout in the folder that --data-dir names; digits come with scikit-learn. It
trains one run after the other, in the order of ROUNDS. A finished run becomes a line of docs/study/CELL.jsonl and is
not trained again. `page` reads these files alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "study"
PAGE = ROOT / "docs" / "study.md"
PLOTS = RECORDS
PEERS = 4
LEAST_SEEDS = 5
"""A comparison with fewer is not reported."""
WORTH_HAVING = 0.5
"""Points; an interval within is no difference worth having."""
INDEPENDENT, LONG = "independent", "long"
METHODS = ("okddip", "pcl", "kdcl", "dml")


@dataclass(frozen=True)
class Cell:
    """A data set, a number of training images a class, a network and a schedule."""

    name: str
    data: str
    images: int
    """Training images a class."""
    model: str
    epochs: int
    batch_size: int
    title: str


CELLS = {
    cell.name: cell
    for cell in (
        Cell("digits-10", "digits", 10, "resnet8", 60, 25, "digits, 10 a class, resnet8"),
        Cell("fashion-10", "fashion14", 10, "resnet8", 60, 25, "Fashion-MNIST 14 x 14, 10 a class, resnet8"),
        Cell("fashion-50", "fashion14", 50, "resnet8", 24, 25, "Fashion-MNIST 14 x 14, 50 a class, resnet8"),
        Cell("fashion-200", "fashion14", 200, "resnet8", 12, 50, "Fashion-MNIST 14 x 14, 200 a class, resnet8"),
        Cell("digits-10-resnet20", "digits", 10, "resnet20", 60, 25, "digits, 10 a class, resnet20"),
    )
}

FEW = (INDEPENDENT, LONG, "okddip", "pcl")
# (cell, rows, first seed, last seed), in order of priority; within a round all rows of a seed come before the next seed
ROUNDS: tuple[tuple[str, tuple[str, ...], int, int], ...] = (
    ("digits-10", FEW, 100, 119),
    ("fashion-10", FEW, 100, 111),
    ("fashion-50", FEW, 100, 107),
    ("fashion-200", FEW, 100, 104),
    ("digits-10", ("kdcl", "dml"), 100, 119),
    ("fashion-10", ("kdcl", "dml"), 100, 111),
    ("fashion-50", FEW, 108, 111),
    ("fashion-10", FEW, 112, 119),
    ("digits-10-resnet20", FEW, 100, 109),
    ("fashion-50", ("kdcl", "dml"), 100, 111),
    ("fashion-200", FEW, 105, 109),
    ("fashion-10", ("kdcl", "dml"), 112, 119),
    ("fashion-200", ("kdcl", "dml"), 100, 109),
)


def jobs() -> Iterator[tuple[Cell, str, int]]:
    """Yield every run of the study in the order in which it is trained."""
    for name, rows, first, last in ROUNDS:
        for seed in range(first, last + 1):
            for row in rows:
                yield CELLS[name], row, seed


# ---------------------------------------------------------------------------------------------------------------- runs


@cache
def _pixels(data: str, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return training images and labels, test images and labels, as uint8 and int64 arrays."""
    import numpy as np

    if data == "digits":  # the same 797 test images as `--data digits`
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = np.minimum(np.asarray(pixels).reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
        order = np.random.default_rng(1797).permutation(len(labels))
        images, labels = images[order], np.asarray(labels, dtype=np.int64)[order]
        return images[:1000], labels[:1000], images[1000:], labels[1000:]
    from torchvision.datasets import FashionMNIST

    parts = [FashionMNIST(str(folder), train=train, download=False) for train in (True, False)]
    x, x_test = (_halve(part.data.numpy()) for part in parts)
    return x, parts[0].targets.numpy(), x_test, parts[1].targets.numpy()


def _halve(images: Any) -> Any:
    """Return images `N x H x W` of half the side: the rounded mean of every 2 x 2 pixels."""
    count, height, width = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2).astype("uint16").sum((2, 4))
    return ((blocks + 2) // 4).astype("uint8")


def draw_images(cell: Cell, seed: int, folder: Path) -> Any:
    """Return the seed's own draw of training images, `cell.images` a class, with the whole test set."""
    import numpy as np

    from codistill import ImageSet

    x, y, x_test, y_test = _pixels(cell.data, folder)
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(y == label))[: cell.images] for label in np.unique(y)])
    return ImageSet.from_dataset(
        list(zip(x[chosen], y[chosen].tolist())),
        list(zip(x_test, y_test.tolist())),
        classes=[str(label) for label in np.unique(y)],
        flip=cell.data != "digits",
        name=cell.data,
    )


def train_run(cell: Cell, row: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one run and return its record; weights are not kept."""
    from codistill import Config, train

    long = row == LONG
    with tempfile.TemporaryDirectory() as out:
        config = Config(
            INDEPENDENT if long else row,
            cell.model,
            topology="networks",
            peers=1 if long else PEERS,
            epochs=cell.epochs * PEERS if long else cell.epochs,
            batch_size=cell.batch_size,
            lr=0.05,
            val_fraction=0.0,
            execution="auto" if long or row == "dml" else "stacked",  # dml updates one member at a time
            seed=seed,
            out=out,
            eval_every_epochs=10**6,
            checkpoint_every_epochs=10**6,
        )
        began = time.process_time()
        train(config, data=draw_images(cell, seed, folder))
        seconds = time.process_time() - began
        files = {
            name: json.loads((Path(out) / f"{name}.json").read_text())
            for name in ("config", "data", "result", "environment")
        }
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    files["config"]["out"] = None
    every = max(1, len(lines) // 4)
    kept = [line for line in lines if line["epoch"] % every == 0 or line is lines[-1]]
    environment = files.pop("environment")
    machine = {key: environment[key] for key in ("git_commit", "torch", "machine")}
    record = {"cell": cell.name, "row": row, "seed": seed, "cpu_seconds": round(seconds, 1), **machine, **files}
    record["metrics"] = kept
    return round_floats(record)


def round_floats(value: Any) -> Any:
    """Return the value with its floating-point numbers cut to 6 digits."""
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run(folder: Path, minutes: float) -> None:
    """Train what has no record yet; no run is started once the minutes are over."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * minutes
    RECORDS.mkdir(parents=True, exist_ok=True)
    done = {(r["cell"], r["row"], r["seed"]) for r in read_records()}
    for cell, row, seed in jobs():
        if (cell.name, row, seed) in done:
            continue
        if time.monotonic() > end:
            return
        record = train_run(cell, row, seed, folder)
        with open(RECORDS / f"{cell.name}.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, separators=(",", ":")) + "\n")
        print(f"{cell.name} {row} seed {seed}: {record['result']['student']['top1']:.2f} %, "
              f"{record['cpu_seconds']} s of CPU time", flush=True)  # fmt: skip


def read_records() -> list[dict[str, Any]]:
    """Return all records, in the order of the cells."""
    paths = [RECORDS / f"{name}.jsonl" for name in CELLS]
    return [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------- page

Records = dict[tuple[str, str], dict[int, dict[str, Any]]]
"""By (cell, row) and seed."""
COLORS = {"okddip": "#1f77b4", "pcl": "#d95f02", "kdcl": "#7570b3", "dml": "#1b9e77"}


@dataclass
class Comparison:
    """A method's gain in one cell: the primary comparison and what goes with it."""

    cell: Cell
    method: str
    gains: list[float]
    """Test accuracy of the deployed member minus that of the independent member with the same number, by seed."""
    mean: float
    half: float
    """Half width of the 95 % t-interval."""
    p: float
    corrected: float = 1.0

    @property
    def answer(self) -> str:
        """Say what the declaration lets the figures say."""
        if self.corrected < 0.05:
            return "**helps**" if self.mean > 0 else "**hurts**"
        within = abs(self.mean) + self.half <= WORTH_HAVING
        return "no difference worth having" if within else "undecided"


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % t-interval."""
    from scipy.stats import t

    count = len(values)
    return fmean(values), float(t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)


def deployed(record: dict[str, Any]) -> int:
    """Return the number of the deployed member."""
    return int(record["result"]["deployed"].removeprefix("member "))


def paired(ours: dict[int, dict], theirs: dict[int, dict], value: Callable[[dict, dict], float]) -> list[float]:
    """Return `value(our record, their record)` for every seed that both have."""
    return [value(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def gain(ours: dict[str, Any], independent: dict[str, Any]) -> float:
    """Return the primary comparison's difference for one seed, in points."""
    member = deployed(ours)
    return ours["result"]["test"]["top1"][member] - independent["result"]["test"]["top1"][member]


def compare(records: Records) -> list[Comparison]:
    """Return the primary comparisons that have enough seeds, with Holm's correction for all that were declared."""
    from scipy.stats import ttest_1samp

    found = []
    for cell in CELLS.values():
        for method in METHODS:
            gains = paired(records.get((cell.name, method), {}), records.get((cell.name, INDEPENDENT), {}), gain)
            if len(gains) >= LEAST_SEEDS:
                found.append(Comparison(cell, method, gains, *interval(gains), float(ttest_1samp(gains, 0).pvalue)))
    declared = len({(cell.name, row) for cell, row, _ in jobs() if row in METHODS})
    largest = 0.0
    for rank, comparison in enumerate(sorted(found, key=lambda c: c.p)):
        largest = max(largest, min(1.0, (declared - rank) * comparison.p))
        comparison.corrected = largest
    return found


def markdown(rows: list[dict[str, str]], left: int = 1) -> str:
    """Return rows as a table, whose first `left` columns are aligned to the left."""
    names = list(rows[0])
    rule = ["---"] * left + ["--:"] * (len(names) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, rule, *(list(row.values()) for row in rows)))


def say(values: list[float], digits: int = 2) -> str:
    """Write a mean difference and its interval."""
    if len(values) < LEAST_SEEDS:
        return "-"
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def progress_table(records: Records) -> str:
    """Return how many of the declared seeds have run; the others have not run yet."""
    rows = []
    for cell in CELLS.values():
        line, minutes = {"cell": cell.name}, 0.0
        for row in (INDEPENDENT, LONG, *METHODS):
            declared = sum(1 for c, r, _ in jobs() if (c.name, r) == (cell.name, row))
            done = records.get((cell.name, row), {})
            line[row] = f"{len(done)} of {declared}" if declared else "-"
            minutes += sum(r["cpu_seconds"] for r in done.values()) / 60
        rows.append({**line, "CPU minutes": f"{minutes:.0f}"})
    return markdown(rows)


def say_p(p: float) -> str:
    """Write a p-value."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def primary_table(found: list[Comparison]) -> str:
    """Return the primary comparisons."""
    return markdown(
        [
            {
                "cell": c.cell.name,
                "method": c.method,
                "answer": c.answer,
                "gain, points": f"{c.mean:+.2f} ± {c.half:.2f}",
                "n": str(len(c.gains)),
                "p": say_p(c.p),
                "p, corrected": say_p(c.corrected),
                "deviation over seeds": f"{stdev(c.gains):.2f}",
            }
            for c in found
        ],
        3,
    )


def secondary_table(records: Records) -> str:
    """Return differences without a claim: all members, the long row, the ensemble, calibration."""

    def members(ours: dict, theirs: dict) -> float:
        return fmean(ours["result"]["test"]["top1"]) - fmean(theirs["result"]["test"]["top1"])

    def student(ours: dict, theirs: dict) -> float:
        return ours["result"]["student"]["top1"] - theirs["result"]["student"]["top1"]

    def to_ensemble(ours: dict, theirs: dict) -> float:
        return ours["result"]["student"]["top1"] - theirs["result"]["test"]["ensemble_top1"]

    def ece(ours: dict, theirs: dict) -> float:
        return ours["result"]["student"]["ece"] - theirs["result"]["test"]["ece"][deployed(ours)]

    def ece_to_long(ours: dict, theirs: dict) -> float:
        return ours["result"]["student"]["ece"] - theirs["result"]["student"]["ece"]

    rows = []
    for cell in CELLS.values():
        alone, long = (records.get((cell.name, row), {}) for row in (INDEPENDENT, LONG))
        for row in (INDEPENDENT, LONG, *METHODS):
            ours = records.get((cell.name, row), {})
            if len(ours) < LEAST_SEEDS:
                continue
            several = row != LONG
            other = row != INDEPENDENT
            rows.append(
                {
                    "cell": cell.name,
                    "row": row,
                    "all members vs independent": say(paired(ours, alone, members)) if several and other else "-",
                    "deployed vs long": say(paired(ours, long, student)) if several else "-",
                    "deployed vs independent ensemble": say(paired(ours, alone, to_ensemble)),
                    "ECE vs independent": say(paired(ours, alone, ece), 3) if other else "-",
                    "ECE vs long": say(paired(ours, long, ece_to_long), 3) if several else "-",
                }
            )
    return markdown(rows, 2)


def level_table(records: Records) -> str:
    """Return accuracy, ensemble, calibration, diversity and cost of every row, as means over its seeds."""
    rows = []
    for cell in CELLS.values():
        for row in (INDEPENDENT, LONG, *METHODS):
            results = [r["result"] for r in records.get((cell.name, row), {}).values()]
            if len(results) < LEAST_SEEDS:
                continue
            tests, costs = [r["test"] for r in results], [r["cost"] for r in results]
            several = row != LONG
            flops = fmean(c["training_flops_a_sample"] * c["samples_seen"] for c in costs)
            seconds = fmean(r["cpu_seconds"] for r in records[cell.name, row].values())
            top1 = [r["student"]["top1"] for r in results]
            rows.append(
                {
                    "cell": cell.name,
                    "row": row,
                    "n": str(len(results)),
                    "deployed, top-1 %": f"{fmean(top1):.2f} ± {stdev(top1):.2f}",
                    "ensemble %": f"{fmean(t['ensemble_top1'] for t in tests):.2f}" if several else "-",
                    "ECE": f"{fmean(r['student']['ece'] for r in results):.3f}",
                    "diversity": f"{fmean(t['diversity'] for t in tests):.3f}" if several else "-",
                    "training, GFLOPs": f"{flops / 1e9:,.0f}",
                    "CPU s": f"{seconds:.1f}",
                }
            )
    return markdown(rows, 2)


def draw_plot(
    points: list[tuple[float, Comparison]], x_ticks: list[tuple[float, str]], x_title: str, title: str
) -> str:
    """Return an SVG of gains with their intervals: (place from 0 to 1, comparison) each."""
    width, height, left, right, top, bottom = 760, 360, 60, 20, 56, 50
    lowest = min(0.0, *(c.mean - c.half for _, c in points))
    highest = max(0.0, *(c.mean + c.half for _, c in points))
    lowest, highest = math.floor(lowest), math.ceil(highest)

    def x_of(place: float) -> float:
        return left + place * (width - left - right)

    def y_of(value: float) -> float:
        return top + (highest - value) / (highest - lowest) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="15">{title}</text>',
    ]
    for k, method in enumerate(m for m in METHODS if any(c.method == m for _, c in points)):
        parts.append(f'<circle cx="{left + 8 + 90 * k}" cy="38" r="5" fill="{COLORS[method]}"/>')
        parts.append(f'<text x="{left + 18 + 90 * k}" y="42">{method}</text>')
    for value in range(lowest, highest + 1):
        y, color = y_of(value), "#000" if value == 0 else "#ddd"
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:+d}</text>')
    for place, text in x_ticks:
        parts.append(f'<text x="{x_of(place):.1f}" y="{height - bottom + 20}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{x_title}</text>')
    parts.append(
        f'<text transform="translate(16 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "gain, points</text>"
    )
    for place, c in points:
        x, color = x_of(place), COLORS[c.method]
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(c.mean - c.half):.1f}" y2="{y_of(c.mean + c.half):.1f}" '
            f'stroke="{color}" stroke-width="2"/>'
        )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y_of(c.mean):.1f}" r="5" fill="{color}"><title>{c.cell.title}, {c.method}: '
            f"{c.mean:+.2f} ± {c.half:.2f}</title></circle>"
        )
    return "\n".join([*parts, "</svg>", ""])


def write_plots(found: list[Comparison], records: Records) -> None:
    """Write the plots of gains against cells and against diversity."""
    cells = [cell for cell in CELLS.values() if any(c.cell is cell for c in found)]
    places = {cell.name: (k + 0.5) / len(cells) for k, cell in enumerate(cells)}
    beside = {method: (k - 1.5) * 0.14 / len(cells) for k, method in enumerate(METHODS)}
    points = [(places[c.cell.name] + beside[c.method], c) for c in found]
    ticks = [(places[cell.name], cell.name) for cell in cells]
    title = "Gain of the deployed member, 95 % intervals"
    (PLOTS / "gain.svg").write_text(draw_plot(points, ticks, "cell: data set and images a class", title))
    diversity = [
        fmean(r["result"]["test"]["diversity"] for r in records[c.cell.name, c.method].values()) for c in found
    ]
    most = 0.05 * math.ceil(max(diversity) * 1.05 / 0.05)
    points = [(value / most, c) for value, c in zip(diversity, found)]
    ticks = [(k / 5, f"{most * k / 5:.2f}") for k in range(6)]
    title = "Gain against the diversity of the method's members"
    (PLOTS / "diversity.svg").write_text(draw_plot(points, ticks, "mean L2 distance of softmaxes", title))


def write_page() -> None:
    """Put the tables in their places in docs/study.md and draw the plots."""
    records: Records = {}
    for record in read_records():
        records.setdefault((record["cell"], record["row"]), {})[record["seed"]] = record
    found = compare(records)
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "primary": primary_table(found),
        "secondary": secondary_table(records),
        "levels": level_table(records),
        "progress": progress_table(records),
    }
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise SystemExit(f"{PAGE} lacks the marks <!-- {name} --> and <!-- /{name} -->")
        text = f"{before}{begin}{table}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")
    write_plots(found, records)


def main() -> int:
    """Run the study or redraw its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "page"))
    parser.add_argument("--data-dir", default="data", type=Path, help="folder of Fashion-MNIST in torchvision's layout")
    parser.add_argument("--minutes", default=math.inf, type=float, help="start no run after so many minutes")
    options = parser.parse_args()
    if options.action == "run":
        run(options.data_dir, options.minutes)
    else:
        write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
