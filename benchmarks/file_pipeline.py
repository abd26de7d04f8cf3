"""Images per second read from files: codistill's loader against torchvision's transforms and torch's DataLoader.

    OMP_NUM_THREADS=1 python benchmarks/file_pipeline.py --workers 2                # JPEG, 500 x 375
    OMP_NUM_THREADS=1 python benchmarks/file_pipeline.py --workers 2 --format png

Writes a folder of images, then reads epochs of it alternately: ImageFolder + RandomResizedCrop + flip + normalization
in the workers, as torchvision's training reference does, against `FileLoader` with the same kinds of augmentation.
Prints the median of each and of the paired ratios (above 1: codistill is faster), and the CPU load.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from codistill.data import FileLoader, load_set
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.data.normalization import IMAGENET

CLASSES = 4


def write_folder(root: Path, count: int, kind: str, width: int, height: int) -> None:
    """Write images that take as long to decode as photographs: smooth gradients with noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        grain = rng.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        for part in ("train", "val"):
            if part == "train" or number < CLASSES:
                path = root / part / f"class{number % CLASSES}" / f"{number}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, **({"quality": 90} if kind == "jpg" else {}))


def plain_loader(root: Path, batch_size: int, workers: int, size: int) -> DataLoader:
    """Return the loader of torchvision and torch."""
    transforms = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET),
        ]
    )
    return DataLoader(
        ImageFolder(str(root / "train"), transforms), batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip


def rate(batches: Iterable, count: int) -> tuple[float, float]:
    """Read an epoch; return images per second, and CPU seconds of this process per second."""
    used, began = time.process_time(), time.perf_counter()
    seen = sum(len(labels) for _, labels in batches)
    assert seen == count
    spent = time.perf_counter() - began
    return count / spent, (time.process_time() - used) / spent


def main() -> int:
    """Measure both loaders alternately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=1500, type=int)
    parser.add_argument("--format", default="jpg", choices=("jpg", "png"))
    parser.add_argument("--width", default=500, type=int)
    parser.add_argument("--height", default=375, type=int)
    parser.add_argument("--size", default=224, type=int)
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--workers", default=2, type=int)
    parser.add_argument("--turns", default=5, type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root, options.images, options.format, options.width, options.height)
        data = load_set(f"folder:{root}", image_size=options.size, pipeline="files")
        assert data.from_files
        ours = FileLoader(
            data.x_train, data.y_train, *IMAGENET,   # pyrefly: ignore
            LoaderOptions(options.batch_size, Augmentation(flip=True, resized_crop=True)), workers=options.workers,
        )  # fmt: skip
        plain = plain_loader(root, options.batch_size, options.workers, options.size)
        pairs = []
        for turn in range(options.turns + 1):  # the first starts the workers and fills the file cache
            pair = rate(plain, options.images), rate(ours.epoch(turn), options.images)
            pairs += [pair] * bool(turn)
        del ours, plain
    theirs, ours_rate = (median(p[k][0] for p in pairs) for k in (0, 1))
    busy_theirs, busy_ours = (median(p[k][1] for p in pairs) for k in (0, 1))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{options.format} {options.width} x {options.height}, {options.workers} workers, {os.cpu_count()} CPUs, "
          f"{options.turns} turns of {options.images} images")  # fmt: skip
    print(f"torchvision + DataLoader: {theirs:.0f} images/s (main process busy {100 * busy_theirs:.0f} %)")
    print(f"codistill:                {ours_rate:.0f} images/s (main process busy {100 * busy_ours:.0f} %)")
    print(f"ratio, median of pairs:   {median(b[0] / a[0] for a, b in pairs):.3f} "
          f"(from {min(b[0] / a[0] for a, b in pairs):.3f} to {max(b[0] / a[0] for a, b in pairs):.3f})")  # fmt: skip
    print(f"CPU seconds of the workers: {children.ru_utime + children.ru_stime:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
