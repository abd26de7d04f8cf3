"""Folders of generated image files."""

from pathlib import Path

import numpy as np
from PIL import Image

from codistill.cli.main import main

ODD = ["a|b", "<script>", "naïve `x`", 'say "hi": yes', "[link](x)"]


def train_on(folder, out, *more):
    """Train two small peers on a folder, through the command line."""
    options = {"--data": f"folder:{folder}", "--image-size": 16, "--model": "resnet8", "--peers": 2, "--epochs": 1,
               "--batch-size": 7, "--device": "cpu", "--data-workers": 0, "--out": out}  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair if pair[0] not in more]
    return main(["train", "dml", *words, *more])


def write_images(root, per_class=8, parts=("train", "val"), classes=("ant", "bee", "cat"), seed=0):
    """Write photographs of many sizes whose colour tells their class."""
    rng = np.random.default_rng(seed)
    for part in parts:
        for c, name in enumerate(classes):
            place = root / part / name
            place.mkdir(parents=True)
            for n in range(per_class):
                height, width = rng.integers(20, 44, 2)
                pixels = rng.integers(0, 120, (height, width, 3)).astype(np.uint8)
                pixels[..., c % 3] += 100
                Image.fromarray(pixels).save(place / f"{n}.png")
    return root


def write_folder(path: Path, names=ODD, count=6, size=16, gray=False):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(names):
            (path / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (size, size) if gray else (size, size, 3)
                pixels = (rng.integers(0, 60, shape) + 40 * label).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{i}.png")
    return f"folder:{path}"
