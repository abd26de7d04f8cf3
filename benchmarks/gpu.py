"""A training step on one NVIDIA GPU: every execution, against the published shape and the card's peak throughput.

    make bench-gpu                                        # or:
    python benchmarks/gpu.py [--parts steps epoch ...]    # 5 minutes or more, downloads nothing

OKDDip with 4 ResNet-32 and 100 classes at batch 128, on random images of CIFAR-100's shape. A step is what
`codistill train` does for a batch: augmentation, forward, loss, backward, guard, optimizer and sums. Times are
wall-clock times between synchronizations with the device, medians of several windows. The published shape
(`benchmarks/published_shape.py`) gets a batch that is already on the device, so that its loading time is not included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import published_shape as published
from codistill.config.config import Config
from codistill.config.methods import METHODS, KDConfig, MethodConfig, OKDDipConfig, method_config
from codistill.data import ImageSet
from codistill.evaluation.cost import training_flops
from codistill.models.registry import resolve
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.reporter import Reporter
from codistill.training.run import zero_sums
from codistill.training.step import forward_all, train_step
from codistill.utils.tables import markdown

STEPS_AN_EPOCH, EPOCHS = 391, 300
WAYS = [(execution, graph) for execution in ("loop", "stacked") for graph in (False, True)]


def images(count: int = 50_000, test: int = 10_000) -> ImageSet:
    """Return random images in CIFAR-100's shape."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count + test, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 100, count + test)
    parts = pixels[:count], labels[:count], pixels[count:], labels[count:]
    return ImageSet("random", *parts, tuple(map(str, range(100))), mean=published.MEAN, std=published.STD)


class Program:
    """A method x ResNet-32 as `codistill train` runs it on the GPU."""

    def __init__(
        self,
        data: ImageSet,
        execution: str = "loop",
        graph: bool = True,
        method: MethodConfig | None = None,
        **options: Any,
    ) -> None:
        method = method or OKDDipConfig(variant="okddip_code")
        own: dict[str, Any] = {"peers": 4, "protocol": "paper", "device": "cuda", "model": ("resnet32",)}
        c = Config(method, data="random", execution=execution, cuda_graph=graph, **own | options).resolved()
        teacher = resolve("resnet32")(100, 3) if isinstance(method, KDConfig) else None
        self.t = build_run(c, teacher, data=data)
        self.t.progress.sums = zero_sums(self.t)
        self.t.peers.train()
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for batch in self.t.loader.epoch(0):
                if len(batch[1]) == self.t.config.batch_size:  # one shape
                    yield batch

    def step(self) -> torch.Tensor:
        """Do one step as the loop does it."""
        return train_step(self.t, *next(self.batches), 0.37)["loss"]

    def flops(self) -> float:
        """Return the floating-point operations of a step."""
        views = 4 if "views" in self.t.method.needs else 1
        zeros, labels = (
            torch.zeros(views, 2, 3, 32, 32, device="cuda"),
            torch.zeros(2, dtype=torch.int64, device="cuda"),
        )
        a_sample = training_flops(self.t.peers, self.t.method, lambda x: forward_all(self.t, x), zeros, labels)
        return a_sample * self.t.config.batch_size


class Published:
    """The same networks in the published shape."""

    def __init__(self, data: ImageSet, dtype: torch.dtype = torch.float32) -> None:
        program = Program(data, graph=False, dtype="float64" if dtype is torch.float64 else "float32")
        self.program, peers = program, program.t.peers
        networks = [peers.export_member(p).to(memory_format=torch.contiguous_format) for p in range(4)]
        self.model = published.Published(networks, 64).to("cuda", dtype)
        self.model.query.load_state_dict(program.t.method.query.state_dict())
        self.model.key.load_state_dict(program.t.method.key.state_dict())
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, 0.0, 5e-4, True)
        self.x, self.y = next(program.batches)
        self.x = self.x[0].contiguous()

    def step(self) -> float:
        """Do one training step; its loss."""
        self.model.train()
        return published.train_step(self.model, self.optimizer, self.x, self.y, 0.37)


def timed(step: Callable[[], object], windows: int = 5, warm: int = 8, seconds: float = 0.3) -> float:
    """Return the median over several windows (of about `seconds`) of the milliseconds per step."""
    for _ in range(warm):
        step()
    found, steps = [], 5
    for window in range(windows + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - began) / steps * 1e3)
        if not window:  # only determines the number of steps per window
            steps = max(5, round(seconds * 1e3 / found.pop()))
    return statistics.median(found)


def host_time(step: Callable[[], object], steps: int = 10) -> float:
    """Return the milliseconds that the host spends on a step, without waiting for the device."""
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        found.append((time.perf_counter() - began) / steps * 1e3)
    torch.cuda.synchronize()
    return min(found)


def launches(step: Callable[[], object]) -> tuple[int, int]:
    """Return the number of launches by the host in a step, and the number of kernels that run."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events()
    calls = sum(
        e.name.startswith(
            ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
        )
        for e in events
    )
    kernels = sum(str(e.device_type).endswith("CUDA") and not e.name.startswith(("Memcpy", "Memset")) for e in events)
    return calls, kernels


def ceiling() -> tuple[float, float]:
    """Return the bfloat16 TFLOP/s of an 8192^3 matrix product on random data, and TB/s of a copy (read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / (timed(lambda: a @ b) * 1e-3) / 1e12
    x = torch.randn(2**30, device="cuda")
    y = torch.empty_like(x)
    return rate, 2 * x.numel() * 4 / (timed(lambda: y.copy_(x)) * 1e-3) / 1e12


@contextmanager
def settings(tf32: bool = True, benchmark: bool = False) -> Iterator[None]:
    """Set whether convolutions use TF32 (torch's default: yes), and whether cuDNN benchmarks kernels (default: no)."""
    conv = torch.backends.cudnn.conv
    held = conv.fp32_precision, torch.backends.cudnn.benchmark
    conv.fp32_precision, torch.backends.cudnn.benchmark = "tf32" if tf32 else "ieee", benchmark
    try:
        yield
    finally:
        conv.fp32_precision, torch.backends.cudnn.benchmark = held


class Table:
    """Rows that are printed as they come, and kept as JSON lines."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows = out, []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **row: Any) -> None:
        """Add a row."""
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append({"part": part, **row})
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(part, json.dumps(row), flush=True)

    def of(self, part: str) -> list[dict[str, Any]]:
        """Return the rows of a part."""
        return [{k: v for k, v in row.items() if k != "part"} for row in self.rows if row["part"] == part]

    def markdown(self, part: str) -> str:
        """Return a part's rows as a table; what a row lacks stays empty."""
        rows = self.of(part)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return markdown([{name: str(row.get(name, "")) for name in names} for row in rows])


def machine(table: Table) -> None:
    """Record the card and the software, and measure the card's peak throughput."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    rate, copy = ceiling()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    table.add("machine", card=card, **versions, bf16_tflops=rate, copy_tb_s=copy)


def parity(table: Table, data: ImageSet) -> None:
    """Record the largest difference of the losses of three float64 steps of both programs."""
    theirs = Published(data, torch.float64)
    program = theirs.program

    def ours() -> float:
        return float(train_step(program.t, theirs.x.unsqueeze(0), theirs.y, 0.37)["loss"])

    gaps = [abs(ours() - theirs.step()) for _ in range(3)]
    table.add("parity", losses_apart=max(gaps))
    assert max(gaps) < 1e-8, gaps


def one_way(
    table: Table, data: ImageSet, dtype: str, execution: str, graph: bool, count: bool = True, **setting: Any
) -> None:
    """Time one way of running the step."""
    options = {k: setting.pop(k) for k in list(setting) if k == "channels_last"}
    with settings(**setting):
        torch.cuda.reset_peak_memory_stats()
        program = Program(data, execution, graph, dtype=dtype, **options)
        row = {"ms": timed(program.step), "host_ms": host_time(program.step)}
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        if count:
            row["launches"], row["kernels"] = launches(program.step)
        rate = next((r["bf16_tflops"] for r in table.of("machine")), None)
        if rate:
            row["share_of_bf16_ceiling"] = program.flops() / (row["ms"] * 1e-3) / 1e12 / rate
    del program
    torch.cuda.empty_cache()
    table.add("step", dtype=dtype, execution=execution, graph=graph, **setting, **options, **row)


def steps(table: Table, data: ImageSet) -> None:
    """Time every execution in every precision, and the published shape, in turn."""
    theirs = Published(data)
    table.add("published", tf32=True, ms=timed(theirs.step), launches=launches(theirs.step)[0])
    for dtype in ("float32", "bfloat16"):
        for execution, graph in WAYS:
            one_way(table, data, dtype, execution, graph)
    for execution, graph in WAYS:
        one_way(table, data, "float32", execution, graph, tf32=False, count=False)
    with settings(tf32=False):
        table.add("published", tf32=False, ms=timed(theirs.step))
    table.add("published", tf32=True, ms=timed(theirs.step), again=True)


class Clock(Reporter):
    """Notes when each epoch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def epoch(self, line: dict[str, Any]) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def epoch(table: Table, data: ImageSet) -> None:
    """Train several epochs as `codistill train` does, with evaluation and checkpoints; the first one is not counted."""
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            method = OKDDipConfig(variant="okddip_code", ramp_epochs=0.0)
            options: dict[str, Any] = {"peers": 4, "protocol": "paper", "device": "cuda", "dtype": dtype, "epochs": 6}
            c = Config(method, "resnet32", "random", out=f"{folder}/run", **options)
            began = time.perf_counter()
            train(c, clock, data=data)
            whole = time.perf_counter() - began
            lasting = [b - a for a, b in zip(clock.ends, clock.ends[1:])]
            seconds = statistics.median(lasting)
            row = {"seconds_an_epoch": seconds, "epochs": [round(x, 3) for x in lasting], "whole_run_s": whole}
            table.add("epoch", dtype=dtype, **row, minutes_for_300=seconds * EPOCHS / 60)


def methods(table: Table, data: ImageSet) -> None:
    """Time every method in an eager loop over members, and as `auto` runs it, with 4 peers of its first topology."""
    cells: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in METHODS if name != "kdcl"]
    cells += [("kdcl", {"target": target}) for target in ("minlogit", "naive", "linear", "general")]
    for name, options in cells:
        method = dataclasses.replace(method_config(name), **options)
        found: dict[str, Any] = {}
        for graph in (False, True):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                program = Program(data, "auto" if graph else "loop", graph, method, dtype="bfloat16")
                found["auto_ms" if graph else "eager_ms"] = timed(program.step, 3, seconds=0.2)
            found["auto"] = program.t.execution
            found["captured"] = bool(program.t.graph and program.t.graph.captured)
            if not found["captured"] and graph:
                found["why"] = "; ".join(str(w.message)[:200] for w in caught) or "alternating"
            del program
        table.add("method", method=name, **options, topology=METHODS[name].topologies[0], **found)


def child(seconds: float, dtype: str, execution: str, start: Path) -> None:
    """Train for some seconds at the same time as other processes; print the steps per second."""
    program = Program(images(2_000, 200), execution, True, dtype=dtype)
    for _ in range(10):
        program.step()
    torch.cuda.synchronize()
    print("ready", flush=True)
    while not start.exists():
        time.sleep(0.01)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            program.step()
        torch.cuda.synchronize()
        done += 10
    print(done / (time.perf_counter() - began), flush=True)


def side_by_side(table: Table, execution: str = "auto", dtype: str = "bfloat16") -> None:
    """Train 1, 2 and 4 runs at the same time, each in its own process."""
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            start = Path(folder) / "start"
            command = [sys.executable, __file__, "--child", str(start), "--dtype", dtype, "--execution", execution]
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            start.touch()
            rates = [float(process.communicate()[0].split()[-1]) for process in processes]
        table.add("side by side", runs=count, dtype=dtype, execution=execution, steps_a_second=sum(rates), each=rates)


def main() -> int:
    """Run the requested parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["machine", "parity", "steps", "epoch", "methods", "side_by_side"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"), help="folder for gpu.jsonl")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--execution", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    if options.child is not None:
        child(3.0, options.dtype, options.execution, options.child)
        return 0
    table, data, failed = Table(options.out), images(), []
    for part in options.parts:
        began = time.perf_counter()
        arguments = (table,) if part in ("machine", "side_by_side") else (table, data)
        try:
            globals()[part](*arguments)
        except Exception:  # the other parts still run
            traceback.print_exc()
            failed.append(part)
        print(f"# {part}: {time.perf_counter() - began:.1f} s", flush=True)
    for part in dict.fromkeys(row["part"] for row in table.rows):
        print(f"\n{part}\n{table.markdown(part)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
