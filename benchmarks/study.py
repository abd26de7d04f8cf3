"""When do peers help? The runs and the page of docs/study.md.

    OMP_NUM_THREADS=1 python benchmarks/study.py run --data-dir data --minutes 120     # train what has no record yet
    python benchmarks/study.py page                                                    # redraw tables and plots

`run` needs Fashion-MNIST in torchvision's layout in the folder that --data-dir names; digits come with scikit-learn. It
trains one run after the other, in the order of ROUNDS; every finished run becomes a line of docs/study/CELL.jsonl, and one
that has its line is not trained again. `page` reads these files alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "study"
PAGE = ROOT / "docs" / "study.md"
PEERS = 4
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


def main() -> int:
    """Run the study or redraw its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "page"))
    parser.add_argument("--data-dir", default="data", type=Path, help="folder of Fashion-MNIST in torchvision's layout")
    parser.add_argument("--minutes", default=math.inf, type=float, help="start no run after so many minutes")
    options = parser.parse_args()
    if options.action == "run":
        run(options.data_dir, options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
