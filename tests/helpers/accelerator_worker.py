"""What tests/test_accelerator.py runs in a process of its own: runs on the CPU and on a simulated device, side by side.

accelerator_worker.py FOLDER CASE...: prints a JSON object a case, one a line.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import helpers.accelerator  # noqa: F401 (before codistill)
from codistill.config.config import Config
from codistill.config.methods import KDConfig
from codistill.data import ImageSet, Loader
from codistill.deploy import predict
from codistill.methods import Method
from codistill.models import resolve
from codistill.peers.base import Peers
from codistill.training import build, load, loop, summary
from codistill.training.run import Run
from codistill.utils.device import NO_FLOAT64
from helpers.accelerator import DEVICE, OnDevice, Simulated
from helpers.accelerator_cases import CASES

PICK_DEVICE = build.pick_device


class KilledError(Exception):
    """Stands for a kill."""


def images() -> ImageSet:
    """Return 60 images to train and validate with, and two batches of them to test."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 5
    pixels = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    return ImageSet("noise", pixels, labels, np.tile(pixels, (5, 1, 1, 1)), np.tile(labels, 5), tuple("abcde"))


def image_folder(folder: Path) -> str:
    """Write the images as files."""
    data = images()
    for part, pixels, labels in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        for number, (image, label) in enumerate(zip(pixels, labels)):
            path = folder / part / data.classes[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    return f"folder:{folder}"


def run(options: dict, out: Path) -> loop.Result:
    """Train from Python, as a user would."""
    own = {"model": ("resnet8",), "peers": 3, "epochs": 2, "batch_size": 16, "val_fraction": 0.2, "dtype": "float64"}
    config = Config(**own | {"out": str(out)} | options)
    from_files = options.get("data_pipeline") == "files"
    if from_files:
        config.data = image_folder(out.parent / "images")
    teacher = resolve("resnet8")(5, 1) if isinstance(config.method, KDConfig) else None
    return loop.train(config, teacher=teacher, data=None if from_files else images())


class Watched:
    """Counts how often the host waits in steps, between the steps of an epoch, and in evaluations."""

    def __init__(self, mode: Simulated, interrupted_at: int | None = None) -> None:
        self.mode, self.interrupted_at = mode, interrupted_at
        self.steps: list[int] = []
        self.between: list[int] = []
        self.evaluations: list[tuple[int, int]] = []
        """Batches and waits."""
        self.last = (-1, 0)
        self.train_step, self.evaluate_peers = loop.train_step, loop.evaluate_peers

    def step(self, t: Run, *rest: Any) -> Any:
        """Do a step of training."""
        if len(self.steps) == self.interrupted_at:
            raise KilledError
        began = self.mode.waits.total()
        if self.last[0] == t.progress.epoch:
            self.between.append(began - self.last[1])
        terms = self.train_step(t, *rest)
        self.last = t.progress.epoch, self.mode.waits.total()
        self.steps.append(self.last[1] - began)
        return terms

    def evaluate(self, peers: Peers, method: Method, loader: Loader, *rest: Any, **options: Any) -> Any:
        """Run an evaluation."""
        began = self.mode.waits.total()
        metrics = self.evaluate_peers(peers, method, loader, *rest, **options)
        self.evaluations.append((len(loader), self.mode.waits.total() - began))
        return metrics


def run_there(options: dict, out: Path, resumed: bool, float64: bool) -> tuple[Any, Any]:
    """Train on the simulated device; where it is to be `resumed`, in two parts."""
    result = watched = None
    with Simulated(float64) as mode:
        for part in [4, None] if resumed else [None]:
            watched = Watched(mode, part)
            loop.train_step, loop.evaluate_peers = watched.step, watched.evaluate
            summary.evaluate_peers = watched.evaluate
            try:
                result = run(options | ({"resume": "auto"} if resumed else {}), out)
            except KilledError:
                pass
            finally:
                loop.train_step, loop.evaluate_peers = (
                    watched.train_step,
                    watched.evaluate_peers,
                )
                summary.evaluate_peers = watched.evaluate_peers
    return result, watched


def compared(name: str, options: dict, folder: Path) -> dict[str, Any]:
    """Run a case on both and say what differs."""
    options = {"method": "okddip"} | options
    torch.manual_seed(5)
    here = run(options, folder / "cpu")
    torch.manual_seed(5)
    if "no float64" in name:
        NO_FLOAT64.add(DEVICE.type)
    for module in (loop, build, predict):
        module.pick_device = lambda _name: DEVICE
    try:
        there, watched = run_there(options, folder / "there", "resumed" in name, "no float64" not in name)
        with Simulated("no float64" not in name):
            ours = there.peers.state_dict()
            if "no float64" in name:  # what a CPU has kept in float64 can be judged there all the same
                load.load_run(folder / "cpu", data=images())
            predictor = predict.load_predictor(folder / "there", allow_import=True)
            some = images().x_test[:8].transpose(0, 3, 1, 2)
            guesses = predictor.probabilities(some)
    finally:
        for module in (loop, build, predict):
            module.pick_device = PICK_DEVICE
        NO_FLOAT64.discard(DEVICE.type)
    expected = predict.load_predictor(folder / "cpu", allow_import=True).probabilities(some)
    theirs = here.peers.state_dict()
    assert all(isinstance(x, OnDevice) for x in ours.values())
    # Sums in float32 and in float64 round differently, and so do derivatives through steps.
    allowed = 1e-4 if "no float64" in name else 1e-12 if name == "l_mcl, learned" else 0.0
    return {
        "allowed": allowed,
        "gap": max((ours[name].raw - theirs[name]).abs().max().item() for name in theirs),
        "figures": here.figures["test"] == there.figures["test"]
        and here.figures["student"] == there.figures["student"],
        "guesses": float(abs(guesses - expected).max()),
        "execution": there.training.execution,
        "steps": watched.steps,
        "between": watched.between,
        "evaluations": watched.evaluations,
    }


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        try:
            found = compared(name, CASES[name], folder / name.replace(", ", "-").replace(" ", "-"))
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"case": name} | found), flush=True)


main(Path(sys.argv[1]), sys.argv[2:])
