"""Bytes and time per step: peers distributed over processes against data parallelism of the same peers.

    OMP_NUM_THREADS=1 python benchmarks/mesh.py [--model resnet32] [--method okddip] [--batch 64] [--steps 6]

Starts jobs of 1 and 2 processes on this machine, 4 peers each: one process; `--mesh data=1,peer=2`; `--mesh
data=2,peer=1`; and torch's DistributedDataParallel around all peers. Bytes are per rank and step: those that codistill
counts for a ring, and those that the loopback device carried meanwhile (also of other programs). Times are medians;
images are noise, 32 x 32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from codistill.config.config import Config
from codistill.config.methods import method_config
from codistill.distributed.launch import init_mesh, shutdown
from codistill.distributed.process_mesh import ProcessMesh
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.step import train_step

KINDS = {
    "one process": None,
    "data=1,peer=2": "data=1,peer=2",
    "data=2,peer=1": "data=2,peer=1",
    "DDP": "data=2,peer=1",
}


def loopback_bytes() -> int:
    """Return the bytes sent over the loopback device so far; 0 where they cannot be read."""
    devices = Path("/proc/net/dev")
    lines = (
        [line for line in devices.read_text().splitlines() if line.strip().startswith("lo:")]
        if devices.exists()
        else []
    )
    return int(lines[0].split(":")[1].split()[8]) if lines else 0


def write_noise(folder: Path, batch: int) -> str:
    """Write a data set of noise images and return its name."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", batch * 4), ("test", 200)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 100
    np.savez(folder / "noise.npz", **arrays)
    return f"npz:{folder / 'noise.npz'}"


def ddp_step(t, wrapped, views, targets):
    """Do a step with torch's DistributedDataParallel."""
    wrapped(views, targets[t.mesh.local_rows()]).backward()
    t.optimizers[0].step()
    t.optimizers[0].zero_grad(set_to_none=True)


class Whole(torch.nn.Module):
    """Peers and method as one module that returns the loss."""

    def __init__(self, t) -> None:
        super().__init__()
        self.peers, self.method = t.peers.local, t.method

    def forward(self, views, targets):
        """Return the loss."""
        return self.method(self.peers(views), targets)["loss"]


def work(kind: str, options: argparse.Namespace) -> None:
    """Measure in this process of a job; rank 0 prints the figures as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = Config(
        method=method_config(options.method), model=options.model, data=options.data, peers=4, val_fraction=0.0,
        batch_size=options.batch, topology="networks", mesh=KINDS[kind], device="cpu",
    ).resolved()  # fmt: skip
    mesh = init_mesh(config, torch.device("cpu"))
    t = build_run(config, mesh=mesh)
    t.progress.sums = zero_sums(t)
    wrapped = torch.nn.parallel.DistributedDataParallel(Whole(t)) if kind == "DDP" else None
    seconds: list[float] = []
    sent = lo = 0
    for epoch in range(100):
        for views, targets in t.loader.epoch(epoch):
            if len(seconds) == 2 and isinstance(mesh, ProcessMesh):  # the first two are a warm-up
                dist.barrier()
                mesh.bytes_sent.clear()
                lo = loopback_bytes()
            began = time.perf_counter()
            if wrapped is not None:
                mesh.begin_step(len(targets), 0)
                ddp_step(t, wrapped, views, targets)
            else:
                train_step(t, views, targets, 1.0)
            seconds.append(time.perf_counter() - began)
            if len(seconds) == options.steps + 2:
                break
        else:
            continue
        break
    if isinstance(mesh, ProcessMesh):
        dist.barrier()
        lo, sent = loopback_bytes() - lo, sum(mesh.bytes_sent.values())
    if mesh.rank == 0:
        numbers = sum(p.numel() for p in t.optimizers[0].param_groups[0]["params"])
        counted = numbers * 4 if kind == "DDP" else sent / options.steps  # a ring of two sends every gradient once
        print(json.dumps([kind, counted, lo / options.steps / mesh.world, statistics.median(seconds[2:])]))
    shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--method", default="okddip")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        work(options.kind, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", options.model, "--method", options.method, "--batch", str(options.batch)]
        words += ["--steps", str(options.steps), "--data", write_noise(Path(folder), options.batch)]
        single = None
        print(f"{options.method}, 4 x {options.model}, batch {options.batch}, {os.cpu_count()} cores, one thread each")
        print("| processes as | sent, counted (kB) | sent, loopback (kB) | step (s) | against one process |")
        print("|---|---|---|---|---|")
        for kind, mesh in KINDS.items():
            start = [sys.executable] if mesh is None else [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29655"]  # fmt: skip
            command = [*start, __file__, *words, "--kind", kind]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            name, counted, lo, seconds = json.loads(output.splitlines()[-1])
            single = single or seconds
            print(
                f"| {name} | {counted / 1e3:,.1f} | {lo / 1e3:,.1f} | {seconds:.3f} | {seconds / single:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
