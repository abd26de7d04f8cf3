"""Kill runs with SIGKILL at random moments and resume them: each must end bit-identical to an uninterrupted run.

    python benchmarks/kills.py                    # all cases, about 130 kills
    python benchmarks/kills.py --kills 3 --only pcl

Children are forked after the imports. A child is killed at a place (in a step, in the middle of writing a checkpoint,
before a rename, in an evaluation, in the middle of a line of metrics, in the grid's files) when it gets there for the
n-th time, n being random, or at a random time. After each kill every file must be readable, and the newest checkpoint
at most one checkpoint interval old. In the end tensors, metrics and figures must equal those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import codistill.runs.checkpoint
import codistill.runs.run_folder
import codistill.training.loop
from codistill.config.config import CompareConfig, Config
from codistill.config.methods import method_config
from codistill.evaluation.metrics import PeerMetrics
from codistill.reproduce import grid, workers
from codistill.runs.run_folder import RunFolder
from codistill.training.loop import train
from kept_whole import behind, difference, differing, unreadable

EVERY = 2  # steps between checkpoints
STEPS = 4  # steps of an epoch
CASES = {
    "pcl, networks": ("pcl", {}, {}),
    "pcl, branches, deployed mean teacher": ("pcl", {}, {"topology": "branches", "deploy": "ema"}),
    "one, branches": ("one", {}, {"topology": "branches"}),
    "one, branches, bfloat16": ("one", {}, {"topology": "branches", "dtype": "bfloat16"}),
    "kdcl general, networks": ("kdcl", {"target": "general", "holdout_fraction": 0.1}, {}),
    "kdcl general, branches": ("kdcl", {"target": "general", "holdout_fraction": 0.1}, {"topology": "branches"}),
    "kdcl linear, networks": ("kdcl", {"target": "linear"}, {}),
    "dml alternating, networks": ("dml", {}, {}),
    "dml alternating, bfloat16": ("dml", {}, {"dtype": "bfloat16"}),
    "okddip random, networks": ("okddip", {"ablation": "random"}, {"peers": 3, "cutout": 2}),
    "okddip, branches, adamw": ("okddip", {}, {"topology": "branches", "peers": 3, "optimizer": "adamw", "lr": 0.001}),
    "independent, mixup, cosine": ("independent", {}, {"mixup": 0.2, "cutmix": 1.0, "schedule": "cosine"}),
    "pcl, 2 processes": ("pcl", {}, {"mesh": "data=1,peer=2"}),
    "dml alternating, 2 processes": ("dml", {}, {"mesh": "data=2,peer=1"}),
}
CHILD_ERROR = Path(tempfile.gettempdir(), f"kills-{os.getpid()}.txt")  # the error of a child that was not killed
PLACES = ("step", "bytes", "flush", "rename", "evaluation", "metrics", "clock")


def config_of(case: str, out: Path, **more: Any) -> Config:
    """Return a case's config: 12 steps in 3 epochs, a checkpoint every 2 steps."""
    name, options, values = CASES[case]
    shared = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 16, "epochs": 3, "peers": 2}
    shared |= {"checkpoint_every_steps": EVERY, "log_every_steps": 1, "device": "cpu", "keep_checkpoints": 2}
    shared |= {"collective_timeout": 20.0, "resume": "auto", "topology": "networks"}
    method = dataclasses.replace(method_config(name), **options)
    return Config(method=method, out=str(out), **shared | values | more)


class SharedCounters:
    """Counters in memory shared with a child: steps done, and how many times it passed each place."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 * (1 + len(PLACES)))

    def __getitem__(self, place: str) -> int:
        return struct.unpack_from("q", self.memory, 8 * self._index(place))[0]

    def __setitem__(self, place: str, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * self._index(place), value)

    @staticmethod
    def _index(place: str) -> int:
        return 0 if place == "done" else 1 + PLACES.index(place)

    def clear(self) -> None:
        """Set all counters to zero."""
        for place in ("done", *PLACES):
            self[place] = 0


def arm(counters: SharedCounters, place: str | None, count: int) -> None:
    """Make this process kill itself the `count`-th time that it reaches `place`."""

    def at(name: str) -> None:
        counters[name] += 1
        if name == place and counters[name] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    step, replace, fsync = codistill.training.loop.train_step, os.replace, os.fsync
    write, log, update = codistill.runs.checkpoint._HashingStream.write, RunFolder.append_metrics, PeerMetrics.update

    def counted_step(t: Any, *args: Any) -> Any:
        at("step")
        terms = step(t, *args)
        counters["done"] = t.steps_done + 1
        return terms

    def half_written(self: Any, data: bytes) -> int:
        if len(data) > 1:  # the first half is written before the kill
            half = len(data) // 2
            write(self, data[:half])
            self.stream.flush()
            at("bytes")
            return half + write(self, data[half:])
        return write(self, data)

    def half_a_line(self: RunFolder, line: dict[str, Any]) -> None:
        if place == "metrics" and counters["metrics"] + 1 == count:
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(line)[:40])
        at("metrics")
        log(self, line)

    def evaluated(self: PeerMetrics, *args: Any) -> None:
        at("evaluation")
        update(self, *args)

    codistill.training.loop.train_step = counted_step
    codistill.runs.checkpoint._HashingStream.write = half_written
    RunFolder.append_metrics, PeerMetrics.update = half_a_line, evaluated
    os.replace = lambda *args: (at("rename"), replace(*args), at("rename"))  # type: ignore[assignment]
    os.fsync = lambda handle: (fsync(handle), at("flush"))  # type: ignore[assignment]


def fork(what: Callable[[], None], counters: SharedCounters, place: str | None, count: int, env: dict[str, str]) -> int:
    """Start a child without output, which is killed at a place (or not); return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(env)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        warnings.simplefilter("ignore")
        arm(counters, place, count)
        what()
        os._exit(0)
    except BaseException as error:
        CHILD_ERROR.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def attempt(config: Config, counters: SharedCounters, place: str | None, count: int, seconds: float, rank: int) -> bool:
    """Train in a child (on a mesh in two, of which `rank` is killed); return whether it was killed."""
    ranks = 1 if config.mesh is None else 2
    counters.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    other = SharedCounters()
    children = []
    for r in range(ranks):
        env = {"RANK": str(r), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(ranks),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        is_killed = r == rank
        arguments = (counters if is_killed else other, place if is_killed else None, count)
        children.append(fork(lambda: train(config), *arguments, {} if ranks == 1 else env))
    if place == "clock":
        time.sleep(seconds)
        os.kill(children[rank], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    killed = codes[rank] == -signal.SIGKILL
    if not killed and any(codes):
        raise AssertionError(f"a child failed: {codes} {CHILD_ERROR.read_text() if CHILD_ERROR.exists() else ''}")
    return killed


@dataclasses.dataclass
class Count:
    """Results of the kills."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    unreadable: int = 0
    repeated: int = 0
    """Largest number of finished steps that a resumed run repeated."""
    runs: int = 0
    identical: int = 0
    trouble: list[str] = dataclasses.field(default_factory=list)


def survive(case: str, kills: int, folder: Path, rng: random.Random, count: Count) -> None:
    """Kill one run many times, resume it to its end, and compare it with an uninterrupted run."""
    uninterrupted, out, counters = folder / "uninterrupted", folder / "killed", SharedCounters()
    began = time.perf_counter()
    attempt(config_of(case, uninterrupted), counters, None, 0, 0.0, 0)
    lasts = time.perf_counter() - began
    passed = {place: counters[place] for place in PLACES}
    done, tries = 0, 0
    while done < kills and tries < 4 * kills:
        tries += 1
        place = PLACES[rng.randrange(len(PLACES))]
        rank = rng.randrange(2) if "processes" in case and place in ("step", "clock") else 0
        # Early in the remaining steps; a resumed run gets further each time.
        when = rng.randint(1, max(passed[place] // 2, 1))
        killed = attempt(config_of(case, out), counters, place, when, rng.random() * lasts, rank)
        if killed:
            done += 1
            count.kills[place] += 1
            if bad := unreadable(out):
                count.unreadable += len(bad)
                count.trouble += bad
            # No checkpoint may exist yet when the first run of a folder is killed.
            repeats = behind(out, counters["done"], STEPS) if counters["done"] else 0
            count.repeated = max(count.repeated, repeats)
        elif (out / "result.json").exists():
            compare_ended(uninterrupted, out, count)
            shutil.rmtree(out)
    if out.exists() or not count.runs:
        attempt(config_of(case, out), counters, None, 0, 0.0, 0)
        compare_ended(uninterrupted, out, count)


def compare_ended(uninterrupted: Path, out: Path, count: Count) -> None:
    """Compare a finished run with the uninterrupted one, and count it."""
    found = differing(out, uninterrupted)
    count.runs += 1
    count.identical += found is None
    count.trouble += [found] if found else []


class Inline:
    """An executor that trains in this process, so that one kill ends the grid and its run."""

    def __init__(self, *_: Any) -> None:
        pass

    def has_capacity(self) -> bool:
        """Return True."""
        return True

    def start(self, config: Config) -> grid.RunOutcome:
        """Train it."""
        return workers.train_job(config)

    def poll(self, handle: grid.RunOutcome) -> grid.RunOutcome:
        """Return the outcome."""
        return handle

    def close(self) -> None:
        """Do nothing."""


def compare_grid(out: Path) -> None:
    """Run the grid of `codistill compare pcl` in this process."""
    from codistill.cli.compare import compare

    workers.Processes = Inline  # type: ignore[misc, assignment]
    options = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 16, "epochs": 2, "peers": 2}
    options |= {"checkpoint_every_steps": EVERY, "log_every_steps": 1, "device": "cpu", "seeds": 1}
    compare(["pcl"], CompareConfig(method="independent", out=str(out), **options))


def survive_grid(kills: int, folder: Path, rng: random.Random, count: Count) -> None:
    """Kill a grid of three runs while it writes files, run the same command again, and compare."""
    counters, uninterrupted, out = SharedCounters(), folder / "grid-uninterrupted", folder / "grid-killed"

    def once(place: str | None, when: int, where: Path) -> int:
        counters.clear()
        child = fork(lambda: compare_grid(where), counters, place, when, {})
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert once(None, 0, uninterrupted) == 0
    passed = {place: counters[place] for place in PLACES}
    done = 0
    while done < kills:
        place = rng.choice(("rename", "flush"))
        # Half of the kills are at the grid's own files, which it writes last.
        last = rng.random() < 0.5
        code = once(place, rng.randint(max(passed[place] - 8, 1) if last else 1, passed[place]), out)
        if code == -signal.SIGKILL:
            done += 1
            count.kills["the grid's files" if last else place] += 1
            bad = unreadable(out)
            count.unreadable += len(bad)
            count.trouble += bad
        if rng.random() < 0.3:
            shutil.rmtree(out, ignore_errors=True)
    assert once(None, 0, out) == 0
    for path in sorted(uninterrupted.glob("*/seed*/result.json")):
        compare_ended(path.parent, out / path.parent.relative_to(uninterrupted), count)
    rows = [json.loads((p / "table.json").read_text())["rows"] for p in (uninterrupted, out)]
    if found := difference(*rows):
        count.trouble.append(f"table.json{found}")


def warm_up() -> None:
    """Train once here, so that the children need no lazy imports."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config_of("kdcl general, branches", Path(folder) / "run", epochs=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=9, help="kills per case")
    parser.add_argument("--only", default="", help="only cases that contain this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warm_up()
    rng, total, began = random.Random(options.seed), Count(), time.perf_counter()
    print("| case | kills | runs, bit-identical | files unreadable | steps repeated, at most |")
    print("|---|---|---|---|---|")
    for case in [*CASES, "a grid of 3 runs"]:
        if options.only not in case:
            continue
        count = Count()
        with tempfile.TemporaryDirectory() as folder:
            if case in CASES:
                survive(case, options.kills, Path(folder), rng, count)
            else:
                survive_grid(options.kills, Path(folder), rng, count)
        total.kills += count.kills
        for name in ("unreadable", "runs", "identical"):
            setattr(total, name, getattr(total, name) + getattr(count, name))
        total.repeated = max(total.repeated, count.repeated)
        total.trouble += count.trouble
        row = (count.kills.total(), f"{count.runs}, {count.identical}", count.unreadable, count.repeated)
        print(f"| {case} | {' | '.join(map(str, row))} |", flush=True)
    row = (total.kills.total(), f"{total.runs}, {total.identical}", total.unreadable, total.repeated)
    print(f"| all | {' | '.join(map(str, row))} |")
    places = ", ".join(f"{place} {n}" for place, n in total.kills.most_common())
    print(f"\nwhere: {places}; {time.perf_counter() - began:.0f} s")
    print("\n".join(total.trouble))
    return bool(total.trouble)


if __name__ == "__main__":
    sys.exit(main())
