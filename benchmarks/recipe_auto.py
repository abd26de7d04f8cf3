"""Is `--recipe auto` as good as 300 epochs at a learning rate of 0.1? The runs and the table of docs/howto/recipe.md.

    OMP_NUM_THREADS=1 python benchmarks/recipe_auto.py run --data-dir data --minutes 60   # train what has no record yet
    python benchmarks/recipe_auto.py page                                                 # redraw the tables

`run` needs, in the folder that --data-dir names, Fashion-MNIST in torchvision's layout and CIFAR-100 as cifar100.npz;
digits come with scikit-learn. All images are tiny and no test set is read: each seed draws its own training images from
a training set, and is judged on others of the same set. A finished run becomes a line of docs/recipe/records.jsonl and
is not trained again.
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
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "recipe" / "records.jsonl"
PAGE = ROOT / "docs" / "howto" / "recipe.md"
DATA = {"digits": "digits, 8 x 8", "fashion14": "Fashion-MNIST, 14 x 14", "cifar16": "CIFAR-100, 10 classes, 16 x 16"}
SIZES = (100, 300, 900)
SEEDS = (0, 1, 2)
JUDGED = {"digits": 897, "fashion14": 2000, "cifar16": 2000}
"""Images that accuracy is measured on, the same for all seeds; never trained on."""
MODEL = "resnet8"
AUTO, PAPER = "auto", "paper"
SMALLER_BATCH = ("auto, batch 64", "paper, batch 64")
SMALLER_DATA = ("fashion14", "cifar16")
"""Sets whose largest size is trained in batches of 64, too."""
SCRATCH, TUNED = "from scratch, auto", "fine-tuned, auto"
TUNE_CELL = "fine-tune"
TUNE_CLASSES, TUNE_IMAGES = 50, 500
"""Classes 50 to 99 of CIFAR-100 are fine-tuned on, with so many training images."""


@dataclass(frozen=True)
class Job:
    """One run: a data set, a number of training images, a recipe and a seed."""

    data: str
    images: int
    row: str
    seed: int


def jobs() -> Iterator[Job]:
    """Yield every run, the smallest sets first."""
    for images in SIZES:
        for seed in SEEDS:
            yield from (Job(data, images, row, seed) for data in DATA for row in (AUTO, PAPER))
        if images == SIZES[-1]:
            for seed in SEEDS:
                yield from (Job(data, images, row, seed) for data in SMALLER_DATA for row in SMALLER_BATCH)
        if images == SIZES[1]:
            for seed in SEEDS:
                yield from (Job(TUNE_CELL, TUNE_IMAGES, row, seed) for row in (SCRATCH, TUNED))


# ---------------------------------------------------------------------------------------------------------------- runs


@cache
def _pixels(data: str, folder: Path) -> tuple[Any, Any]:
    """Return the images `N x H x W x C` and labels of a training set in a fixed random order."""
    import numpy as np

    if data == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = np.minimum(np.asarray(pixels).reshape(-1, 8, 8, 1) * 16, 255).astype(np.uint8)
    elif data == "fashion14":
        from torchvision.datasets import FashionMNIST

        part = FashionMNIST(str(folder), train=True, download=False)
        images, labels = _halve(part.data.numpy()[..., None]), part.targets.numpy()
    else:
        with np.load(folder / "cifar100.npz") as archive:
            images, labels = _halve(archive["x_train"]), archive["y_train"]
        kept = (
            labels < 10 if data == "cifar16" else labels < TUNE_CLASSES if data == "first" else labels >= TUNE_CLASSES
        )
        images, labels = images[kept], labels[kept] - (TUNE_CLASSES if data == TUNE_CELL else 0)
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], np.asarray(labels, dtype=np.int64)[order]


def _halve(images: Any) -> Any:
    """Return images `N x H x W x C` of half the side: the rounded mean of every 2 x 2 pixels."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // 2, 2, width // 2, 2, channels).astype("uint16").sum((2, 4))
    return ((blocks + 2) // 4).astype("uint8")


def draw_images(data: str, images: int, seed: int, folder: Path) -> Any:
    """Return the seed's own draw of training images, balanced over classes, and the images to judge on as test part."""
    import numpy as np

    from codistill import ImageSet

    x, y = _pixels(data, folder)
    judged = JUDGED.get(data, 2000)
    classes = np.unique(y)
    rng = np.random.default_rng(seed)
    pool = np.arange(judged, len(y))
    each = images // len(classes)
    chosen = np.concatenate([rng.permutation(pool[y[pool] == label])[:each] for label in classes])
    pad = max(1, x.shape[1] // 8)
    names = tuple(str(label) for label in classes)
    flip = data != "digits"
    return ImageSet(f"python:{data}", x[chosen], y[chosen], x[:judged], y[:judged], names, pad=pad, flip=flip)


def train_run(job: Job, folder: Path) -> dict[str, Any]:
    """Train one run and return its record; weights are not kept."""
    from codistill import Config, train
    from codistill.config import choose_recipe

    with tempfile.TemporaryDirectory() as out:
        config = Config(
            "independent",
            MODEL,
            topology="networks",
            peers=1,
            weights=str(pretrain(folder)) if job.row == TUNED else None,
            val_fraction=0.0,
            seed=job.seed,
            out=out,
            eval_every_epochs=10**6,
            checkpoint_every_epochs=10**6,
        )
        given: tuple[str, ...] = ()
        if job.row in SMALLER_BATCH:
            config.batch_size, given = 64, ("batch_size",)
        auto, _ = choose_recipe(config, job.images, given)
        papers_own = (*given, "epochs", "lr", "weight_decay", "schedule", "warmup_epochs")
        paper, _ = choose_recipe(config, job.images, papers_own)
        began = time.process_time()
        result = train(
            paper if job.row.startswith(PAPER) else auto, data=draw_images(job.data, job.images, job.seed, folder)
        )
        config, steps = result.training.config, len(result.training.loader)
        return {
            **{"data": job.data, "images": job.images, "row": job.row, "seed": job.seed},
            "top1": round(result.figures["student"]["top1"], 4),
            "nll": round(result.figures["student"]["nll"], 4),
            "updates": config.epochs * steps,
            **{name: getattr(config, name) for name in ("epochs", "batch_size", "lr", "weight_decay")},
            "cpu_seconds": round(time.process_time() - began, 1),
        }


def pretrain(folder: Path) -> Path:
    """Train the network that is fine-tuned on the first 50 classes of CIFAR-100 (once), and return its weights."""
    import torch

    from codistill import Config, train
    from codistill.config import choose_recipe

    path = Path(tempfile.gettempdir()) / "recipe_auto_pretrained.pt"
    if not path.exists():
        images = 200 * TUNE_CLASSES
        with tempfile.TemporaryDirectory() as out:
            config = Config("independent", MODEL, topology="networks", peers=1, val_fraction=0.0, seed=7, out=out)
            config, _ = choose_recipe(config, images, given=("epochs",))
            config.epochs, config.eval_every_epochs, config.checkpoint_every_epochs = 30, 10**6, 10**6
            torch.save(train(config, data=draw_images("first", images, 7, folder)).student.state_dict(), path)
    return path


def run(folder: Path, minutes: float) -> None:
    """Train what has no record yet; no run is started once the minutes are over."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * minutes
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["data"], r["images"], r["row"], r["seed"]) for r in read_records()}
    for job in jobs():
        if (job.data, job.images, job.row, job.seed) in done:
            continue
        if time.monotonic() > end:
            return
        record = train_run(job, folder)
        with open(RECORDS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, separators=(",", ":")) + "\n")
        print(f"{job}: {record['top1']:.2f} %, {record['cpu_seconds']} s of CPU time", flush=True)


def read_records() -> list[dict[str, Any]]:
    """Return all records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


# ---------------------------------------------------------------------------------------------------------------- page


def compare_rows(
    records: list[dict[str, Any]], data: str, images: int, ours: str, theirs: str
) -> dict[str, str] | None:
    """Return the row of the table that compares two recipes on the seeds that both have; None for fewer than two."""
    from codistill.reproduce.statistics import paired_difference

    both = [
        {r["seed"]: r for r in records if (r["data"], r["images"], r["row"]) == (data, images, row)}
        for row in (ours, theirs)
    ]
    seeds = sorted(both[0].keys() & both[1].keys())
    if len(seeds) < 2:
        return None
    first, second = ([part[seed] for seed in seeds] for part in both)
    difference = paired_difference(*({seed: part[seed]["top1"] for seed in seeds} for part in both))
    assert difference is not None
    mean, half = difference.mean, difference.half_width
    return {
        "data": DATA.get(data, "CIFAR-100, the other 50 classes, 16 x 16"),
        "images": str(images),
        ours: f"{fmean(r['top1'] for r in first):.1f}",
        theirs: f"{fmean(r['top1'] for r in second):.1f}",
        "difference, points": f"{mean:+.1f} ± {half:.1f}",
        "n": str(len(seeds)),
        "no worse": "yes" if mean + half >= 0 else "no",
        "updates": f"{first[0]['updates']:,} : {second[0]['updates']:,}",
    }


def write_page() -> None:
    """Put the tables in their places in the page."""
    from codistill.utils.tables import markdown

    records = read_records()
    acceptance = [compare_rows(records, data, images, AUTO, PAPER) for data in DATA for images in SIZES]
    smaller = [compare_rows(records, data, SIZES[-1], *SMALLER_BATCH) for data in SMALLER_DATA]
    tuning = [compare_rows(records, TUNE_CELL, TUNE_IMAGES, TUNED, SCRATCH)]
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in {"acceptance": acceptance, "smaller": smaller, "tuning": tuning}.items():
        kept = [row for row in rows if row is not None]
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise SystemExit(f"{PAGE} lacks the marks <!-- {name} --> and <!-- /{name} -->")
        table = markdown(kept) if kept else "Not measured yet.\n"
        text = f"{before}{begin}{table}{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> int:
    """Train, or redraw the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "page"))
    parser.add_argument("--data-dir", default="data", type=Path, help="folder of Fashion-MNIST and cifar100.npz")
    parser.add_argument("--minutes", default=math.inf, type=float, help="start no run after so many minutes")
    options = parser.parse_args()
    if options.action == "run":
        run(options.data_dir, options.minutes)
    else:
        write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
