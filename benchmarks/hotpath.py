"""Speed of the training step against a plain reference loop, and of every method against independent peers, as ratios.

    make bench                                                     # or:
    OMP_NUM_THREADS=1 python benchmarks/hotpath.py [--pairs 5]     # about 7 minutes on 2 cores

One thread, process CPU time, A and B alternately, the median of the pairs' ratios. A parity check in float64 is first:
both programs must give the same loss. The time of an epoch is computed as 391 x (augment + step) + 79 x evaluation +
one folding. The reference loop (`published_shape.py`) has its own process (`programs.py`), because codistill
configures the allocator of its process.
"""

import argparse
import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from codistill.config.config import Config
from codistill.config.methods import METHODS, method_config
from codistill.data import ImageSet
from codistill.losses import cross_entropy
from codistill.methods import build_method
from codistill.peers.base import PeerOutputs
from codistill.peers.branches import BranchPeers
from codistill.peers.ema import MeanTeacher
from codistill.peers.networks import NetworkPeers
from codistill.peers.stacked import StackedPeers
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.step import forward_all, train_step
from codistill.utils.tables import markdown
from programs import Ours, ProgramProcess, Step, Theirs, independent, prepare, spent

SEED_METHODS = ("independent", "kd", "dml", "cl_ilr", "one", "okddip", "pcl", "kdcl")
COUNTS = {"augment": 391, "step": 391, "evaluate": 79}
"""Number of times that an epoch of CIFAR-100 at batch 128 does each."""


def median(values: list[float]) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


def paired(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> tuple[float, float]:
    """Return the median over pairs of theirs / ours (each returns its CPU seconds), and that of ours, warmed up."""
    ours()
    theirs()
    both = [(ours(), theirs()) for _ in range(pairs)]
    return median([b / a for a, b in both]), median([a for a, _ in both])


def ratio(ours: Step, theirs: Step, pairs: int) -> float:
    """Return the median over pairs of theirs / ours in CPU time, both in this process."""
    return paired(lambda: spent(ours), lambda: spent(theirs), pairs)[0]


def seconds(step: Step, times: int = 3) -> float:
    """Return the median CPU seconds of a step, after a warm-up."""
    step()
    return median([spent(step) for _ in range(times)])


def check_parity() -> float:
    """Return the largest difference of three losses of both programs in float64; raise if they differ."""
    ours = Ours("float64", 8)
    theirs = Theirs(ours)
    gaps = [abs(ours.step() - theirs.step()) for _ in range(3)]
    assert max(gaps) < 1e-8, f"the two programs differ: {gaps}"
    return max(gaps)


def against_the_published_shape(dtype: str, theirs: ProgramProcess, pairs: int) -> list[dict[str, str]]:
    """Return the ratio of each part of an epoch, and of the epoch that they add up to."""
    ours = Ours(dtype)
    fold = seconds(ours.fold)
    rows, mine, other = [], fold, 0.0
    for name, count in COUNTS.items():
        times, own = paired(lambda n=name: spent(getattr(ours, n)), lambda n=name: theirs.spent(n), pairs)
        rows.append({"line": f"{name}, {dtype}, against the published shape", "ratio": f"{times:.2f}"})
        mine, other = mine + count * own, other + count * own * times
    return [*rows, {"line": f"epoch, {dtype}, composed", "ratio": f"{other / mine:.2f}"}]


def has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions (Linux)."""
    path = Path("/proc/cpuinfo")
    return path.exists() and any(f in path.read_text() for f in ("avx512_bf16", "amx_bf16"))


def allocator_ratio(pairs: int) -> float:
    """Return the time of a step with the default allocator over that with the one that keeps freed memory."""
    kept, default = ProgramProcess("ours", keep=True), ProgramProcess("ours")
    times, _ = paired(lambda: kept.spent("step"), lambda: default.spent("step"), pairs)
    for program in (kept, default):
        program.end()
    return times


def okddip_overhead(pairs: int) -> float:
    """Return a whole step of okddip over one of independent peers, batch 128, as the median of paired ratios."""
    okddip, plain = Ours(), independent()
    return 1 / ratio(okddip.step, plain.step, pairs)


def overheads() -> list[dict[str, str]]:
    """Return, for the methods of the three papers, their losses' cost (forward and backward) over the peers' own step.

    The second column adds the forward passes that the method needs: pcl's mean teachers, and in dml's alternating
    update the new outputs of the members that have stepped.
    """
    variants = [(name, {}) for name in SEED_METHODS if name != "kdcl"]
    variants += [("kdcl", {"target": target}) for target in ("minlogit", "naive", "linear", "general")]
    rows = []
    for name, options in variants:
        topology = METHODS[name].topologies[0] if name == "one" else "networks"
        peers = (BranchPeers if topology == "branches" else NetworkPeers)("resnet32", METHODS[name].max_peers or 4, 100)
        peers.to(memory_format=torch.channels_last)
        method = build_method(dataclasses.replace(method_config(name), **options), peers)
        views, targets = torch.randn(1, 128, 3, 32, 32), torch.randint(100, (128,))
        views[0] = views[0].contiguous(memory_format=torch.channels_last)
        outputs = peers(views)
        teacher = MeanTeacher(peers, 0.999) if "ema" in method.needs else None
        base = seconds(lambda p=peers, v=views, t=targets: cross_entropy(p(v).logits_PBC, t).sum().backward(), 2)

        def head(method=method, outputs=outputs, targets=targets):
            z = outputs.logits_PBC.detach().requires_grad_()
            h = [f.detach().requires_grad_() for f in outputs.features]
            trunk = None if outputs.trunk_BD is None else outputs.trunk_BD.detach().requires_grad_()
            detached = PeerOutputs(z, h, trunk, teacher_logits_BC=z[0].detach(), ema_logits_PBC=z.detach())
            terms = method(detached, targets, 1.0)
            terms["loss"].backward()

        def plain(outputs=outputs, targets=targets):
            cross_entropy(outputs.logits_PBC.detach().requires_grad_(), targets).sum().backward()

        def forwards(method=method, outputs=outputs, views=views, peers=peers, teacher=teacher):
            if teacher is not None:
                teacher(views)
                teacher.update(peers, 5)
            if method.update_mode == "alternating":
                current = PeerOutputs(outputs.logits_PBC.detach().clone(), [])
                for p in range(peers.num_peers - 1):
                    peers.refresh(current, views, p)

        turns = peers.num_peers if method.update_mode == "alternating" else 1
        losses = turns * seconds(head, 5) - seconds(plain, 5)
        rows.append(
            {
                "method": f"{name} {options.get('target', '')}".strip() + f", 4 {topology}",
                "its losses": f"{1 + losses / base:.3f}",
                "and its forwards": f"{1 + (losses + seconds(forwards, 2)) / base:.3f}",
            }
        )
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def contrib_overheads() -> list[dict[str, str]]:
    """Return, for every method of `methods/contrib`, its losses' cost over a step of its networks without them.

    Two ResNet-32 (or as many as the method takes), batch 128. The forwards that a method asks for, on rotations, exits,
    hybrids or images seen before, count as network cost, as do the modules that ffsd trains, which have a row.
    """
    rng, rows = np.random.default_rng(0), []
    pixels, labels = rng.integers(0, 256, (512, 32, 32, 3), dtype=np.uint8), np.arange(512) % 100
    data = ImageSet("random", pixels, labels, pixels[:128], labels[:128], tuple(map(str, range(100))))
    for name in (n for n in METHODS if n not in SEED_METHODS):
        topology = METHODS[name].topologies[0]
        model = ("timm:resnet10t,drop_path_rate=0.1",) if topology == "twins" else ("resnet32",)
        peers = max(min(2, METHODS[name].max_peers or 2), METHODS[name].default_peers)
        options = {"data": "random", "peers": peers, "execution": "loop", "protocol": "paper", "device": "cpu"}
        run = build_run(Config(method_config(name), model, **options).resolved(), data=data)
        run.progress.sums = zero_sums(run)
        run.peers.train()
        batches = run.loader.epoch(0)
        if run.previous is not None:
            train_step(run, *next(batches), 1.0)  # keeps the batch that the next forward sees again
        views, targets = next(batches)
        outputs = forward_all(run, views)

        def base(run=run, views=views, targets=targets):
            forwarded = forward_all(run, views)
            upright = forwarded.logits_PBC[:, :: run.method.rows_per_image]
            others = [f.sum() for own in forwarded.exits for f in own]
            (cross_entropy(upright, targets).sum() + sum(others)).backward()

        given = detach_outputs(outputs)

        def losses(run=run, given=given, targets=targets):
            run.method(given, targets, 1.0)["loss"].backward()

        def plain(run=run, given=given, targets=targets):
            upright = given.logits_PBC.detach()[:, :: run.method.rows_per_image].requires_grad_()
            cross_entropy(upright, targets).sum().backward()

        extra, step = seconds(losses, 5) - seconds(plain, 5), seconds(base, 3)
        if name == "ffsd":
            modules = seconds(lambda method=run.method, given=given: run_ffsd_modules(method, given.maps), 5)
            rows.append({"method": "ffsd, its modules", "its losses": f"{1 + modules / step:.3f}"})
            extra, step = extra - modules, step + modules
        rows.append({"method": f"{name}, {peers} {topology}", "its losses": f"{1 + extra / step:.3f}"})
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def run_ffsd_modules(method: Any, maps: list[list[torch.Tensor]]) -> None:
    """Run the modules that FFSD trains beside its networks, forward and backward, as often as its losses do."""
    fused, logits = method.fusion(torch.cat([own[-1].detach() for own in maps[:-1]], 1))
    mixed = method.leader_mixer(maps[-1][-1].detach().requires_grad_())
    (logits.sum() + mixed.sum()).backward()
    method.decoders.requires_grad_(True)
    for decoder, own in zip(method.decoders, maps[1:]):
        with torch.no_grad():
            decoder(fused)
        sum(made.sum() for made in decoder(own[-1].detach())).backward()
    method.zero_grad()
    method.decoders.requires_grad_(False)


def detach_outputs(outputs: PeerOutputs) -> PeerOutputs:
    """Return the same outputs as leaves that want gradients."""

    def leaf(x: Any) -> Any:
        if isinstance(x, list):
            return [leaf(one) for one in x]
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(x, **{f.name: leaf(getattr(x, f.name)) for f in dataclasses.fields(x)})
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().requires_grad_(x.requires_grad)

    return leaf(outputs)


class Counter(TorchDispatchMode):
    """Counts operators, views of tensors (which launch no kernel) separately, and reads from the device."""

    operators, views, reads = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count the operator and run it."""
        self.operators += not func.is_view
        self.views += func.is_view
        self.reads += any(n in str(func) for n in ("_local_scalar_dense", "nonzero"))
        return func(*args, **(kwargs or {}))


def count(step: Step) -> Counter:
    """Return the operators and host reads of a step, after a warm-up."""
    step()
    with Counter() as counter:
        step()
    return counter


def small_networks(pairs: int) -> list[dict[str, str]]:
    """Return the gain of stacking where kernel launches dominate: batch 2, 8 x 8 images, 4 ResNet-32."""
    loop = NetworkPeers("resnet32", 4, 10, image_size=8)
    stacked = NetworkPeers("resnet32", 4, 10, image_size=8)
    x, y = torch.randn(1, 2, 3, 8, 8), torch.randint(10, (2,))
    stacked.stacked_runner = StackedPeers(stacked, x[0])

    def step_of(peers: NetworkPeers) -> Step:
        def step() -> None:
            cross_entropy(peers(x).logits_PBC, y).sum().backward()
            peers.zero_grad(set_to_none=True)
            for parameter in peers.trained_parameters():
                parameter.grad = None

        return step

    ours, theirs = count(step_of(stacked)), count(step_of(loop))
    times = ratio(step_of(stacked), step_of(loop), pairs * 4)
    return [
        {
            "line": "stacked over loop, batch 2, 8 x 8",
            "ratio": f"{times:.2f}",
        },
        {"line": "operators per step, stacked (loop)", "ratio": f"{ours.operators} ({theirs.operators})"},
        {"line": "views per step, stacked (loop)", "ratio": f"{ours.views} ({theirs.views})"},
    ]


def reads_of_a_run() -> int:
    """Return the host reads of a whole training step as the loop does it, guard and sums included."""
    t = build_run(Config("okddip", "resnet8", "digits", batch_size=32).resolved())
    with Counter() as counter:
        t.progress.sums = zero_sums(t)
        t.peers.train()
        train_step(t, *next(t.loader.epoch(0)), 1.0)
    return counter.reads


def peak_memory(name: str, topology: str, checkpoint: bool = False) -> float:
    """Return the increase of resident memory by two steps of batch 128, in MiB, in a new process (Linux)."""
    code = f"""
import torch
torch.set_num_threads(1)
from codistill.config.config import Config
from codistill.utils.device import peak_megabytes, reset_peak_memory
from codistill.training.build import build_run
from codistill.training.step import train_step
from codistill.training.run import zero_sums
size = {{"topology": {topology!r}, "peers": 4, "batch_size": 128, "checkpoint_activations": {checkpoint}}}
t = build_run(Config({name!r}, "resnet32", "digits", **size).resolved())
t.progress.sums = zero_sums(t)
t.peers.train()
views = torch.randn(t.loader.sample_batch().shape[0], 128, 1, 32, 32)
reset_peak_memory(t.device)
start = peak_megabytes(t.device)
for _ in range(2):
    train_step(t, views, torch.randint(10, (128,)), 1.0)
print(peak_megabytes(t.device) - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory() -> list[dict[str, str]]:
    """Return every method's peak memory relative to that of as many plain networks."""
    plain = peak_memory("independent", "networks")
    cells = [
        (name, topology, False)
        for name, c in METHODS.items()
        if name != "kd" and not c.max_peers
        for topology in c.topologies
    ]
    rows = []
    for name, topology, recompute in [*cells, ("okddip", "networks", True)]:
        what = f"{name}, 4 {topology}" + (", --checkpoint-activations" if recompute else "")
        peak = peak_memory(name, topology, recompute)
        rows.append({"method": what, "peak over 4 plain networks": f"{peak / plain:.2f}", "MiB": f"{peak:.0f}"})
    return rows


def main() -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    prepare(keep=True)
    warnings.simplefilter("ignore")
    print(f"parity check: losses of both programs differ by {check_parity():.1e} in float64\n")
    theirs = ProgramProcess("theirs")
    rows = against_the_published_shape("float32", theirs, options.pairs)
    if has_bfloat16():
        rows += against_the_published_shape("bfloat16", theirs, options.pairs)
    theirs.end()
    rows.append({"line": "step, default allocator over kept memory", "ratio": f"{allocator_ratio(options.pairs):.2f}"})
    rows += small_networks(options.pairs)
    rows.append({"line": "host reads per training step", "ratio": str(reads_of_a_run())})
    rows.append({"line": "okddip's whole step over independent's", "ratio": f"{okddip_overhead(options.pairs):.3f}"})
    print(markdown(rows), flush=True)
    print(markdown(overheads()), flush=True)
    print(markdown(contrib_overheads()), flush=True)
    print(markdown(memory()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
