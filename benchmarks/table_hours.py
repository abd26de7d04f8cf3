"""How long the published tables take at full scale on one GPU: an estimate from FLOPs and one measured throughput.

    python benchmarks/table_hours.py            # 2 minutes on a CPU, 4 GB of memory; needs no data and no GPU

Every run of a table is built, its FLOPs a training sample are counted (forward and backward of all members and
teachers, as `result.json` counts them), and multiplied by images and epochs. The throughput is that of the one epoch
that was timed on a GPU: OKDDip, 4 ResNet-32, 100 classes, batch 128, with evaluation and checkpoint (see
benchmarks/RESULTS.md). Larger networks reach a higher share of a card's peak, and reading ImageNet's files may take
longer than training on them, so the hours can be wrong by a factor of two or more either way.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import cache

import numpy as np
import torch

from codistill.config import METHODS, Config, ReproduceConfig
from codistill.data import ImageSet
from codistill.evaluation import inner_step_flops, training_flops
from codistill.models import resolve
from codistill.reproduce.plan import make_plan
from codistill.reproduce.recipes import TABLES
from codistill.training.build import build_run
from codistill.training.step import forward_all

SECONDS_AN_EPOCH = {"bfloat16": 2.57, "float32": 3.52}
"""Measured on one NVIDIA H200, median of 5 epochs of 50,000 images (benchmarks/RESULTS.md)."""
TIMED = Config(method=METHODS["okddip"](), model=("resnet32",), data="cifar100", peers=4, topology="networks")
SETS = {"cifar10": (32, 10, 50_000), "cifar100": (32, 100, 50_000), "imagenet": (224, 1000, 1_281_167)}
"""Image size, classes and training images."""


@cache
def images_like(name: str) -> ImageSet:
    """Return random images in the shape of a data set, one a class."""
    size, classes, _ = SETS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (classes, size, size, 3), dtype=np.uint8)
    labels = np.arange(classes)
    names = tuple(map(str, range(classes)))
    return ImageSet("random", pixels, labels, pixels, labels, names, mean=(0.5,) * 3, std=(0.25,) * 3)


def flops_of_run(config: Config, name: str) -> float:
    """Return the training FLOPs of a run of a config on all images of a data set."""
    size, classes, images = SETS[name]
    config = dataclasses.replace(
        config, data="python:random", data_dir=None, data_pipeline="auto", val_fraction=0.0, weights=None,
        image_size=None, batch_size=2, execution="loop", device="cpu", dtype="float32", out="unused",
        train_per_class=None, sampler="uniform",
    )  # fmt: skip
    config = config.resolved()
    data = images_like(name)
    teacher = None
    if config.method.name == "kd":
        teacher = resolve(config.model[0])(num_classes=classes, in_channels=3)
    run = build_run(config, teacher, data=data, load_weights=False)
    zeros_VBCHW = torch.zeros(run.method.num_views, 2, 3, size, size)
    labels_B = torch.zeros(2, dtype=torch.int64)
    flops = training_flops(run.peers, run.method, lambda views: forward_all(run, views), zeros_VBCHW, labels_B)
    if run.method.inner_interval:
        inner = inner_step_flops(run.method, run.peers, zeros_VBCHW, labels_B, run.optimizers[0])
        flops += inner / run.method.inner_interval
    return flops * images * config.epochs


def main() -> None:
    """Print a row a table."""
    rate = {d: flops_of_run(TIMED, "cifar100") / TIMED.epochs / s for d, s in SECONDS_AN_EPOCH.items()}
    rows = []
    for table in sys.argv[1:] or TABLES:
        plan = make_plan(table, ReproduceConfig(scale="full", seeds=1, protocol="paper", data_dir="imagenet"))
        totals = []
        for cell in plan.cells:
            name = cell.config.data if cell.config.data in SETS else "imagenet"
            totals.append(flops_of_run(cell.config, name))
            print(f"{table}: {cell.label}: {totals[-1]:.3g}", file=sys.stderr, flush=True)
        folder = "imagenet" if "imagenet" in plan.published["data"].lower() else "data"
        command = f"codistill reproduce {table} --protocol paper --seeds 1 --dtype bfloat16 --data-dir {folder}"
        hours = " | ".join(f"{sum(totals) / rate[dtype] / 3600:,.1f}" for dtype in rate)
        rows.append(f"| `{command}` | {len(totals)} | {sum(totals) / 1e15:,.0f} | {hours} |")
    print("| command | runs | training, PFLOPs | hours, bfloat16 | hours, float32 |\n|---|--:|--:|--:|--:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
