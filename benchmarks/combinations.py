"""Train with random combinations of options, and check what holds for every run.

    OMP_NUM_THREADS=1 python benchmarks/combinations.py --first 0 --cases 300
    OMP_NUM_THREADS=1 python benchmarks/combinations.py --data folder --minutes 10

A case is a method with up to four options of a run and some of its own, on some dozens of small images. The config is
refused with a sentence, or all of this holds:

- the same command again gives the same weights, lines of metrics and figures, to the last bit;
- so does a run that is interrupted once or twice at random steps and resumed;
- `evaluate` of the run folder gives the run's own test figures, and the exported student the trained member's outputs;
- in float64 stacked peers end within 1e-8 of a loop, where both are possible and --execution is among the options;
- of a folder of images, the student's accuracy on its test files by `predict` is that of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from codistill.config.config import Config
from codistill.config.methods import METHODS, method_config
from codistill.deploy.export import export_student
from codistill.deploy.predict import load_predictor
from codistill.training import evaluate_run, load_run, test_loader
from codistill.training.loop import Result, train
from codistill.training.reporter import Reporter
from codistill.utils import InputError

OPTIONS: dict[str, list[Any]] = {
    **{"execution": ["loop", "stacked", "auto"], "accumulate": [2, 3], "dtype": ["bfloat16", "float64"]},
    **{"mixup": [0.3], "cutmix": [1.0], "label_smoothing": [0.1], "freeze": [("conv1",), ("conv1", "layer1")]},
    **{"deploy": ["ema", "swa", "ensemble", "1"], "sam_rho": [0.05], "skip_nonfinite": [2], "val_fraction": [0.0, 0.3]},
    **{"optimizer": ["adamw"], "schedule": ["cosine"], "warmup_epochs": [0.7], "checkpoint_activations": [True]},
    **{"checkpoint_every_steps": [1, 2], "checkpoint_every_epochs": [2], "keep_checkpoints": [1]},
    **{"auto_augment": ["randaugment", "trivialaugment"], "random_erasing": [0.5], "cutout": [3], "flip": [False]},
    **{"augment": [False], "balanced_sampling": [True], "sampler": ["pairs:2"], "protocol": ["paper"]},
    **{"head_lr_scale": [3.0], "eval_every_epochs": [2], "topology": ["networks", "branches"], "nesterov": [False]},
    **{"channels_last": [False], "batch_size": [7, 20], "peers": [2, 3, 4], "branch_at": [("layer2",)]},
    **{"model": [("resnet8", "wrn16_2", "resnet8"), ("densenet40_12",)], "milestones": [(1, 2)], "momentum": [0.5]},
}
OF_FOLDERS: dict[str, list[Any]] = {
    **{"data_pipeline": ["files", "resident"], "data_workers": [0, 1, 2], "channels": [1, 3], "image_size": [12, 20]},
    **{"normalize": ["imagenet"], "train_per_class": [5], "bits": [8]},
}
OF_METHODS: dict[str, dict[str, list[Any]]] = {
    "okddip": {
        "ablation": ["random", "entropy", "mean", "symmetric", "no_leader"],
        "divergence": ["dkd", "dist", "js"],
    },
    "dml": {"update": ["joint", "alternating"], "variant": ["authors", "okddip_code"], "target": ["mean"]},
    "kdcl": {"target": ["naive", "linear", "general"], "own_views": [False], "granularity": ["batch"]},
    "codistillation": {
        "interval": [1, 3],
        "partition": ["disjoint"],
        "burn_in_epochs": [0.0],
        "interval_unit": ["epochs"],
    },
    "hssakd": {"exits": [0, 1, 2], "rotations": [False]},
    "l_mcl": {"match": ["learned"], "match_interval": [2], "exits": [1]},
    "ffsd": {"feature_terms": [False], "leader": [False]},
    "okdph": {"interval": [1, 3], "variant": ["authors"], "shares": ["dirichlet"], "interval_unit": ["epochs"]},
    **{"pcl": {"own_views": [False]}, "switokd": {"students": [2]}, "mcl": {"logit_weight": [1.0]}},
    "cosub": {"loss": ["ce"], "own_views": [True]},
}


class StopAt(Reporter):
    """Ends a run at a step, as a signal would."""

    def __init__(self, epoch: int, step: int) -> None:
        self.place = epoch, step

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Interrupt the run where it is at the place."""
        if (epoch, step) == self.place:
            raise KeyboardInterrupt


def write_images(folder: Path) -> str:
    """Write 160 digits of unequal sizes, gray and RGB, as PNG, JPEG and BMP; return the name of the data set."""
    digits, rng = load_digits(), np.random.default_rng(0)
    for n, (pixels, label) in enumerate(zip(digits.images[:160], digits.target)):
        path = (
            folder / ("train" if n < 60 else "test") / f"class {label % 4}" / f"{n:03}.{('png', 'jpg', 'bmp')[n % 3]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        size = int(rng.integers(10, 20)), int(rng.integers(10, 20))
        Image.fromarray((pixels * 15).astype(np.uint8)).resize(size).convert("RGB" if n % 2 else "L").save(path)
    return f"folder:{folder}"


def draw_case(number: int, of_folder: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the method, its options and those of the run."""
    rng = random.Random(number)
    name = rng.choice([n for n in METHODS if n != "kd"])  # which needs a teacher
    options = OPTIONS | (OF_FOLDERS if of_folder else {})
    chosen = {key: rng.choice(options[key]) for key in rng.sample([*options], rng.randint(1, 4))}
    own = {key: rng.choice(values) for key, values in OF_METHODS.get(name, {}).items() if rng.random() < 0.4}
    if name == "cosub":
        chosen |= {"topology": "twins", "model": ("timm:test_resnet,drop_path_rate=0.1",)}
        chosen.pop("peers", None)
        if chosen.get("dtype") == "bfloat16":  # torch's gradient of its convolutions on 1 x 1 maps is NaN at times
            del chosen["dtype"]
    return name, own, chosen


def check_same(one: Result, other: Result, what: str) -> None:
    """Check that two runs have the same weights, lines of metrics and figures."""
    ours, theirs = one.peers.state_dict(), other.peers.state_dict()
    differing = [name for name in ours | theirs if not torch.equal(ours[name], theirs[name])]
    assert not differing, f"{what}: weights differ, {differing[:3]}"
    lines = [[json.loads(line) for line in (r.folder / "metrics.jsonl").read_text().splitlines()] for r in (one, other)]
    plain = [
        [{k: v for k, v in line.items() if "second" not in k and "mb" not in k} for line in part] for part in lines
    ]
    assert str(plain[0]) == str(plain[1]), f"{what}: metrics differ"  # as text: NaN is NaN
    figures = [{k: v for k, v in r.figures.items() if k not in ("seconds", "cost")} for r in (one, other)]
    assert str(figures[0]) == str(figures[1]), f"{what}: figures differ, {figures}"


def check_case(number: int, data: str, folder: Path) -> str | None:
    """Train a case in every way; return why its config is refused, None if it is not.

    Raises:
        AssertionError: something does not hold.
    """
    name, own, options = draw_case(number, data != "digits")
    rng, method = random.Random(-1 - number), dataclasses.replace(method_config(name), **own)
    few = {"train_per_class": 3} if data == "digits" else {"image_size": 16}

    def config(out: str, **changed: Any) -> Config:
        values = {"model": ("resnet8",), "batch_size": 8, "epochs": 4, "lr": 0.02, **few, **options, **changed}
        return Config(method, data=data, out=str(folder / out), **values)

    try:
        whole = train(config("whole"))
    except InputError as refused:
        return str(refused)
    check_same(whole, train(config("again")), "the same command")
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(4), rng.randrange(len(whole.training.loader))
        with contextlib.suppress(KeyboardInterrupt):
            train(config("stopped", resume="auto", log_every_steps=1), StopAt(*place))
    check_same(whole, train(config("stopped", resume="auto")), "resumed")
    loaded = load_run(folder / "whole")
    figures = evaluate_run(loaded, test_loader(loaded))["members"]
    assert figures["top1"] == whole.figures["test"]["top1"], f"evaluate: {figures}"
    if options.get("deploy") != "ensemble":
        gap = export_student(loaded, folder / "student.safetensors")
        assert gap < 1e-3, f"export: {gap}"
        if data != "digits" and options.get("dtype") != "bfloat16":  # predict is float32
            files = sorted(Path(data.removeprefix("folder:"), "test").glob("*/*"))
            found = load_predictor(folder / "whole").predict(list(map(str, files)), top=1)
            hits = sum(row["top"][0]["class"] == file.parent.name for row, file in zip(found, files))
            assert abs(100 * hits / len(files) - whole.figures["student"]["top1"]) < 1e-3, f"predict: {hits} right"
    if "execution" in options and options.get("dtype") != "bfloat16":
        with contextlib.suppress(InputError):  # the peers cannot be stacked
            ways = [train(config(w, dtype="float64", execution=w)).peers.state_dict() for w in ("loop", "stacked")]
            gap = max(float((ways[0][key] - ways[1][key]).abs().max()) for key in ways[0])
            assert gap < 1e-8, f"stacked: {gap}"
    return None


def main() -> int:
    """Check the cases, print those that are refused or fail, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "folder"), default="digits")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10**6)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts, until = {"held": 0, "refused": 0, "failed": 0}, time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as scratch:
        data = write_images(Path(scratch, "images")) if args.data == "folder" else args.data
        for number in range(args.first, args.first + args.cases):
            if time.monotonic() > until:
                break
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                try:
                    refused, error = check_case(number, data, Path(folder)), None
                except Exception:
                    refused, error = None, traceback.format_exc()
            kind = "failed" if error else "refused" if refused else "held"
            counts[kind] += 1
            if kind != "held":
                print(number, kind, *draw_case(number, args.data == "folder"), error or refused, flush=True)
    print(f"{args.data}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
