"""Compare two checkouts of codistill by short runs on one machine: both must compute the same to the last bit.

    python benchmarks/reference_runs.py OLD_CHECKOUT NEW_CHECKOUT --out references

Every run goes through the command line of each checkout (`PYTHONPATH=CHECKOUT/src python -m codistill ...`), so that
only the options and the files of a run folder have to be the same in both. Compared are

    metrics.jsonl       byte by byte (it holds no times)
    last.pt             every tensor and number: weights, mean teachers, the method's own state, the optimizers; not
                        the random states, the schema, the seconds, nor how the peers were executed
    *.safetensors       every exported tensor
    result.json         all but `seconds` and, under `cost`, what is measured: times and memory
    details.json        all
    evaluate.json, predict.json     what these commands print with --json

It prints one line per run and ends with 1 if anything differs; the runs of NEW that differ are kept. The results of
OLD are stored in --out, by commit, and used again; those of a checkout with changes that are not committed never are.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

Step = str | Callable[[Path], None]
"""A command of codistill, or a function that changes the run's folder between two of them."""

DIGITS = "--data digits --train-per-class 12"
SMALL = f"--model resnet8 {DIGITS} --batch-size 24 --epochs 2 --lr 0.05 --device cpu --execution loop --out run"
COMPARED = ("metrics.jsonl", "result.json", "details.json", "last.pt")
MEASURED = ("training_peak_mb", "peak_mb", "ms_an_image", "ms_an_image_of_64")
NOT_COMPARED: dict[str, set[tuple[str, ...]]] = {
    "details.json": {("schema",)},
    "last.pt": {("rng",), ("schema",), ("seconds",), ("execution",)},
    "result.json": {("schema",), ("seconds",), *[("cost", name) for name in MEASURED]},
}
# Evaluation is fused where these two operators of torch are found.
WITHOUT_FUSING = """
import runpy
import sys
import torch

class Operators:
    def __getattr__(self, name, found=torch.ops.mkldnn):
        if name.startswith("_convolution_pointwise"):
            raise AttributeError(name)
        return getattr(found, name)

torch.ops.mkldnn = Operators()
del sys.path[0]
sys.argv[0] = "codistill"
runpy.run_module("codistill", run_name="__main__", alter_sys=True)
"""


def write_images(folder: Path) -> None:
    """Write 32 x 32 images, of which so many are for the test that their evaluation is fused (2,048 at least)."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 160), ("test", 2080)):
        labels = np.arange(count) % 4
        noise = rng.integers(0, 128, (count, 32, 32, 3))
        arrays |= {f"x_{part}": (noise + 40 * labels[:, None, None, None]).astype(np.uint8), f"y_{part}": labels}
    np.savez(folder / "images.npz", **arrays)


def write_pictures(folder: Path) -> None:
    """Write PNG files of several shapes, one folder per class."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 16), ("test", 8)):
        for label in range(3):
            place = folder / "pictures" / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                shape = ((20, 28, 3), (24, 24, 3), (31, 18, 3))[number % 3]
                pixels = rng.integers(0, 128, shape) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02}.png")


def go_back(folder: Path) -> None:
    """Restore a finished run's folder to the state in which its second newest checkpoint was written."""
    run = folder / "run"
    (run / "result.json").unlink()
    (run / "details.json").unlink()
    os.replace(run / "last-1.pt", run / "last.pt")


@dataclass(frozen=True)
class Run:
    """One short run: its steps in order, and the number of processes that train."""

    steps: tuple[Step, ...]
    processes: int = 1


def short(method: str, options: str = "", *after: Step, processes: int = 1) -> Run:
    """Return a run of a method on few digits; options given here stand after the common ones."""
    return Run((f"train {method} {SMALL} {options}", *after), processes)


EXPORT = "export run --out student.safetensors"
MID_EPOCH = "--checkpoint-every-steps 2 --keep-checkpoints 4"
RUNS = {
    "okddip, networks": short("okddip", "--peers 3 --topology networks", EXPORT),
    "okddip, branches, authors' code": short(
        "okddip", "--peers 4 --topology branches --method.variant okddip_code --method.mask-self", EXPORT
    ),
    "okddip, stacked": short("okddip", "--peers 3 --topology networks --execution stacked"),
    "okddip, networks, activations anew": short(
        "okddip", "--peers 3 --topology networks --checkpoint-activations --method.detach peers"
    ),
    "pcl, branches, mean teacher deployed": short(
        "pcl", "--deploy ema", EXPORT, "evaluate run --calibrate --per-class --json > evaluate.json"
    ),
    "pcl, networks, bfloat16": short("pcl", "--topology networks --dtype bfloat16"),
    "kdcl minlogit, two sizes": short("kdcl", "--model resnet20 --method.target minlogit"),
    "kdcl linear, networks": short("kdcl", "--topology networks --method.target linear"),
    "kdcl general, branches": short(
        "kdcl", "--topology branches --peers 3 --method.target general --method.holdout-fraction 0.2"
    ),
    "kdcl naive, bfloat16, stacked": short(
        "kdcl", "--topology networks --method.target naive --dtype bfloat16 --execution stacked"
    ),
    "one, paper": short("one"),
    "one, authors, cosine, adamw": short(
        "one", "--method.variant authors --schedule cosine --optimizer adamw --lr 0.001 --warmup-epochs 1 --head-lr 3"
    ),
    "cl_ilr, a tree": short("cl_ilr", "--branch-at layer2 layer3 --fan-out 2 2"),
    "cl_ilr, authors' code, label smoothing": short(
        "cl_ilr", "--method.variant okddip_code --label-smoothing 0.1 --protocol paper"
    ),
    "dml, alternating": short("dml", "--topology networks --method.update alternating --peers 3", EXPORT),
    "dml, branches, mixup": short("dml", "--topology branches --method.variant authors --mixup 0.4"),
    "dml, networks, cutmix, cutout": short(
        "dml", "--topology networks --method.update joint --method.target mean --cutmix 1 --cutout 3"
    ),
    "kd, from a run": Run(
        (
            f"train independent {SMALL.replace('--out run', '--out teacher')} --peers 1 --topology networks",
            f"train kd {SMALL} --method.teacher teacher --seed 1",
        )
    ),
    "independent, alone, float64": short("independent", "--peers 1 --topology networks --dtype float64"),
    "independent, branches, trunk frozen": short(
        "independent", "--peers 3 --topology branches --freeze trunk --method.rescale --no-channels-last --accumulate 2"
    ),
    "independent, the ensemble deployed": short(
        "independent", "--peers 2 --topology networks --deploy ensemble --balanced-sampling"
    ),
    "fused evaluation": Run(
        (
            write_images,
            "train okddip --model resnet8 --data npz:images.npz --peers 3 --topology branches --batch-size 32 "
            "--epochs 1 --lr 0.05 --device cpu --out run",
        )
    ),
    "files": Run(
        (
            write_pictures,
            "train okddip --model resnet8 --data folder:pictures --data-pipeline files --data-workers 1 "
            "--image-size 20 --peers 3 --batch-size 8 --epochs 2 --lr 0.05 --device cpu --out run",
            "predict run pictures/test/class1 --json > predict.json",
        )
    ),
    "a folder in memory": Run(
        (
            write_pictures,
            "train dml --model resnet8 --data folder:pictures --data-pipeline resident --image-size 16 --normalise "
            "imagenet --batch-size 8 --epochs 2 --lr 0.05 --device cpu --out run",
        )
    ),
    "resumed in an epoch": short("pcl", MID_EPOCH, go_back, f"train pcl {SMALL} {MID_EPOCH} --resume auto"),
    "resumed after an epoch": short(
        "kdcl", "--method.target general", go_back, f"train kdcl {SMALL} --method.target general --resume auto"
    ),
    "2 processes, peers": short("okddip", "--peers 4 --topology networks --mesh data=1,peer=2", processes=2),
    "2 processes, data": short("pcl", "--topology branches --mesh data=2,peer=1 --sync-bn", EXPORT, processes=2),
}


class RunError(Exception):
    """A command of a run failed; the message holds what it wrote."""


@dataclass
class Checkout:
    """A checkout of codistill.

    Args:
        path: Its folder, which holds `src`.
        launcher: A script that starts codistill without fused evaluation; None starts codistill itself.
    """

    path: Path
    launcher: Path | None = None

    def __post_init__(self) -> None:
        git = functools.partial(subprocess.run, cwd=self.path, capture_output=True, text=True, check=True)
        self.commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        self.changed = bool(git(["git", "status", "--porcelain", "--", "src"]).stdout.strip())
        found = git([sys.executable, "-c", "import codistill; print(codistill.__file__)"], env=self.environment())
        if not Path(found.stdout.strip()).is_relative_to((self.path / "src").resolve()):
            sys.exit(f"{self.path}/src holds no codistill; name the top folder of a checkout")

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes."""
        return os.environ | {"PYTHONPATH": str((self.path / "src").resolve()), "OMP_NUM_THREADS": "1"}

    def execute(self, run: Run, folder: Path) -> None:
        """Do a run's steps in a folder.

        Raises:
            RunError: a command failed.
        """
        folder.mkdir(parents=True)
        start = ["-m", "codistill"] if self.launcher is None else [str(self.launcher)]
        for step in run.steps:
            if not isinstance(step, str):
                step(folder)
                continue
            words, _, file = step.partition(" > ")
            command = [*start, *words.split()]
            if run.processes > 1 and words.startswith("train"):
                options = ["--standalone", f"--nproc-per-node={run.processes}"]
                command = ["-m", "torch.distributed.run", *options, *command]
            done = subprocess.run(
                [sys.executable, *command], cwd=folder, env=self.environment(), capture_output=True, text=True
            )
            if done.returncode:
                said = textwrap.indent(done.stderr[-3000:].rstrip(), "    ")
                raise RunError(f"{self.path}: `codistill {words}` ended with {done.returncode}\n{said}")
            if file:
                (folder / file).write_text(done.stdout)


def outcome(checkout: Checkout, run: Run, target: Path) -> float:
    """Do a run and keep in `target` the files that are compared; return the seconds it took."""
    began = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        checkout.execute(run, folder)
        kept = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
        for path in [
            *(folder / "run" / name for name in COMPARED),
            *folder.glob("*.safetensors"),
            *folder.glob("*.json"),
        ]:
            shutil.copy(path, kept / path.name)
    try:
        os.rename(kept, target)
    except OSError:  # another comparison has kept the same run meanwhile
        shutil.rmtree(kept)
    return time.perf_counter() - began


def cache_name(run: Run) -> str:
    """Return what the result of a run depends on besides the checkout: its steps, torch, and the processor."""
    steps = [step if isinstance(step, str) else step.__name__ for step in run.steps]
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, np.__version__)
    return hashlib.sha256(repr((steps, run.processes, machine)).encode()).hexdigest()[:12]


def leaves(value: Any, skipped: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every tensor, number and text in nested dicts and lists."""
    if path in skipped:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield "/".join(path), value
        return
    for key, inner in items:
        yield from leaves(inner, skipped, (*path, str(key)))


def read(path: Path) -> Any:
    """Read tensors and plain values from one of a run's files."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def equal(one: Any, other: Any) -> bool:
    """Say whether two leaves are the same to the last bit; NaN equals NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.equal(
            one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
        )
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return type(one) is type(other) and (both_nan or one == other)


def shown(value: Any) -> str:
    """Describe a leaf in a few words."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def first_difference(old: Path, new: Path) -> str | None:
    """Name the first difference between the files of two runs; None where there is none."""
    names = sorted({p.name for p in old.iterdir()} | {p.name for p in new.iterdir()}, key=_order)
    for name in names:
        if not (old / name).exists() or not (new / name).exists():
            return f"{name} is only in {'NEW' if (new / name).exists() else 'OLD'}"
        difference = _difference(old / name, new / name)
        if difference is not None:
            return f"{name}: {difference}"
    return None


def _order(name: str) -> tuple[int, str]:
    return (COMPARED.index(name) if name in COMPARED else len(COMPARED), name)


def _difference(old: Path, new: Path) -> str | None:
    """Name the first difference between two files."""
    if old.suffix == ".jsonl":
        lines = [path.read_bytes().splitlines() for path in (old, new)]
        if old.read_bytes() == new.read_bytes():
            return None
        number = next((n for n, (one, other) in enumerate(zip(*lines)) if one != other), min(map(len, lines)))
        if number == min(map(len, lines)):
            return f"{len(lines[0])} lines became {len(lines[1])}"
        texts = [json.loads(part[number]) for part in lines]
        return f"line {number + 1}, {_leaf_difference(texts[0], texts[1], set()) or 'spelled differently'}"
    return _leaf_difference(read(old), read(new), NOT_COMPARED.get(old.name, set()))


def _leaf_difference(old: Any, new: Any, skipped: set[tuple[str, ...]]) -> str | None:
    ours, theirs = (dict(leaves(value, skipped)) for value in (old, new))
    for path in [*ours, *(p for p in theirs if p not in ours)]:
        if path not in ours or path not in theirs:
            return f"{path} is only in {'NEW' if path in theirs else 'OLD'}"
        one, other = ours[path], theirs[path]
        if not equal(one, other):
            by = ""
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
                by = f", by {(one.double() - other.double()).abs().max():.2g}"
            return f"{path} was {shown(one)}, is {shown(other)}{by}"
    return None


def main() -> int:
    """Compare, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the checkout that is right")
    parser.add_argument("new", type=Path, help="the checkout that is compared with it")
    parser.add_argument("--out", type=Path, help="where OLD's results are kept and used again; default nowhere")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose names hold one of these")
    parser.add_argument("--without-fusing", action="store_true", help="evaluate without fused kernels on both sides")
    options = parser.parse_args()
    runs = {name: run for name, run in RUNS.items() if any(part in name for part in options.only)}
    if not runs:
        parser.error(f"--only: no run's name holds {' or '.join(options.only)}; there are: {'; '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as place:
        launcher = Path(place) / "without_fusing.py" if options.without_fusing else None
        if launcher is not None:
            launcher.write_text(WITHOUT_FUSING)
        old, new = (Checkout(path.resolve(), launcher) for path in (options.old, options.new))
        kept = options.out.resolve() if options.out and not old.changed else Path(place) / "old"
        kept = kept / (old.commit + ("-without-fusing" if launcher else ""))
        results = Path(tempfile.mkdtemp(prefix="reference-runs-"))
        differing, old_seconds, new_seconds = 0, 0.0, 0.0
        for name, run in runs.items():
            folder = name.replace(",", "").replace("'", "").replace(" ", "-")
            theirs, ours = kept / f"{folder}-{cache_name(run)}", results / folder
            try:
                if not theirs.exists():
                    old_seconds += outcome(old, run, theirs)
                new_seconds += outcome(new, run, ours)
                difference = first_difference(theirs, ours)
            except RunError as error:
                difference = f"failed in {error}"
            differing += difference is not None
            print(f"{name:40} {difference or 'same'}", flush=True)
            if difference is None:
                shutil.rmtree(ours)
    seconds = f"seconds: OLD {old_seconds:.0f}, NEW {new_seconds:.0f}"
    print(f"{len(runs) - differing} of {len(runs)} runs are the same; {seconds}")
    if differing:
        print(f"the results of NEW that differ: {results}")
    else:
        results.rmdir()
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
