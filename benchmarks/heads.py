"""Cost of the methods' losses against the number of peers and classes, beside another checkout's.

    git worktree add ../before 844e2fa
    OMP_NUM_THREADS=1 python benchmarks/heads.py --against ../before/src --plot docs/heads.svg [--rounds 5]
    OMP_NUM_THREADS=1 python benchmarks/heads.py --against ../before/src --allocator default

Forward and backward of a method's losses on random logits, batch 128, float32, one thread. Each checkout has a process
of its own, which keeps freed memory as in training; with `--allocator default` the C library returns large blocks and
clears them anew each time, as in a plain script, and only the cells that it affects most are measured. They work in
turn. Time is the process's CPU time: the table holds the median of each and the median of the rounds' ratios. The
largest tensor is that of any operator's output, forward and backward, over the size of all peers' logits P x B x C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, WIDTH = 128, 64
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "okddip": ("okddip", {}),
    "okddip, okddip_code": ("okddip", {"variant": "okddip_code"}),
    "dml": ("dml", {}),
    "dml, authors": ("dml", {"variant": "authors"}),
    "dml, okddip_code": ("dml", {"variant": "okddip_code"}),
    "pcl": ("pcl", {}),
    "cl_ilr": ("cl_ilr", {}),
    "one": ("one", {}),
    "kdcl naive": ("kdcl", {"target": "naive"}),
    "kdcl minlogit": ("kdcl", {"target": "minlogit"}),
    "kdcl general": ("kdcl", {"target": "general"}),
    "kdcl linear": ("kdcl", {"target": "linear"}),
}
CURVES = {"okddip": "#1f6fb4", "dml": "#c05020", "pcl": "#2a8a3e"}
PEERS, PEERS_AT = (3, 4, 8, 16, 32), 1_000
CLASSES, CLASSES_AT = (10, 100, 1_000, 10_000, 21_843), 4
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc's

Cell = tuple[str, int, int]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest output of any operator."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and look at its outputs."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Head:
    """The losses of a method on random outputs."""

    def __init__(self, label: str, num_peers: int, num_classes: int) -> None:
        import codistill as cd

        torch.manual_seed(0)
        name, options = METHODS[label]
        sizes = {
            "okddip": {"feature_dim": WIDTH},
            "pcl": {"feature_dims": (WIDTH,) * num_peers, "num_classes": num_classes},
            "one": {"trunk_dim": WIDTH},
        }
        classes = {"okddip": "OKDDip", "dml": "DML", "pcl": "PCL", "cl_ilr": "CLILR", "one": "ONE", "kdcl": "KDCL"}
        self.method = getattr(cd.methods, classes[name])(num_peers, **sizes.get(name, {}), **options)
        self.outputs_type = cd.PeerOutputs
        self.z_PBC, self.ema_PBC = torch.randn(2, num_peers, BATCH, num_classes) * 3
        self.features, self.trunk_BD = [torch.randn(BATCH, WIDTH) for _ in range(num_peers)], torch.randn(BATCH, WIDTH)
        self.targets_B = torch.randint(num_classes, (BATCH,))

    def step(self) -> float:
        """Do one forward and backward pass and return the loss."""
        z_PBC, trunk_BD = self.z_PBC.detach().requires_grad_(), self.trunk_BD.detach().requires_grad_()
        features = [feature_BD.detach().requires_grad_() for feature_BD in self.features]
        outputs = self.outputs_type(z_PBC, features, trunk_BD, ema_logits_PBC=self.ema_PBC)
        self.method.zero_grad()
        loss = self.method(outputs, self.targets_B, 0.5)["loss"]
        loss.backward()
        return loss.item()

    def measure(self, times: int) -> dict[str, float]:
        """Return the CPU seconds of a step and the loss."""
        began = time.process_time()
        for _ in range(times):
            loss = self.step()
        return {"seconds": (time.process_time() - began) / times, "loss": loss}

    def largest(self) -> float:
        """Return the size of the largest tensor over that of all logits."""
        with LargestTensor() as largest:
            self.step()
        return largest.numel / self.z_PBC.numel()


def work() -> None:
    """Answer the parent's questions, one a line: [label, peers, classes, what, times]."""
    torch.set_num_threads(1)
    cell, head = None, None
    for line in sys.stdin:
        *wanted, what, times = json.loads(line)
        if wanted != cell:
            head = None  # frees the last one's memory first
            cell, head = wanted, Head(*wanted)
        print(json.dumps(head.measure(times) if what == "time" else {"largest": head.largest()}), flush=True)


class Worker:
    """A process that runs the heads of one checkout."""

    def __init__(self, source: Path, allocator: str) -> None:
        environment = (
            os.environ
            | (KEEP_FREED if allocator == "kept" else {})
            | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        )
        command = [sys.executable, __file__, "--work"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, cell: Cell, what: str, times: int = 1) -> dict[str, float]:
        """Return the answer for a cell."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([*cell, what, times]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(ours: Worker, theirs: Worker, cell: Cell, rounds: int) -> dict[str, float]:
    """Return medians of both programs' seconds and of their ratio, and both largest tensors."""
    _, num_peers, num_classes = cell
    times = max(1, 2_000_000 // (num_peers * BATCH * num_classes))
    loss, other = (worker.ask(cell, "time", 1)["loss"] for worker in (ours, theirs))
    assert abs(loss - other) <= 1e-5 * abs(other), f"{cell}: losses {loss} and {other}"
    pairs = [(ours.ask(cell, "time", times), theirs.ask(cell, "time", times)) for _ in range(rounds)]
    found = {
        "ours": median(a["seconds"] for a, _ in pairs),
        "theirs": median(b["seconds"] for _, b in pairs),
        "ratio": median(b["seconds"] / a["seconds"] for a, b in pairs),
        "our_largest": ours.ask(cell, "largest")["largest"],
        "their_largest": theirs.ask(cell, "largest")["largest"],
    }
    print(cell, {name: float(f"{value:.4g}") for name, value in found.items()}, file=sys.stderr, flush=True)
    return found


def row(cell: Cell, found: dict[str, float]) -> dict[str, str]:
    """Return a row of the table."""
    label, num_peers, num_classes = cell
    return {
        "losses": label,
        "P": str(num_peers),
        "C": f"{num_classes:,}",
        "ms": f"{found['ours'] * 1e3:.3g}",
        "ms before": f"{found['theirs'] * 1e3:.3g}",
        "before / now": f"{found['ratio']:.2f}",
        "largest tensor": f"{found['our_largest']:.2f}",
        "before": f"{found['their_largest']:.2f}",
    }


def panel(left: float, title: str, x_values: tuple[int, ...], curves: list[tuple[str, str, list[float]]]) -> list[str]:
    """Return the parts of a plot with two logarithmic axes; a curve is (color, dash pattern, milliseconds)."""
    width, top, height = 270.0, 50.0, 220.0
    lowest, highest = -1.0, 4.0  # powers of ten of the milliseconds
    spread = math.log(x_values[-1] / x_values[0])
    xs = [left + width * math.log(x / x_values[0]) / spread for x in x_values]

    def y(milliseconds: float) -> float:
        return top + height * (highest - math.log10(milliseconds)) / (highest - lowest)

    anchors = ["middle"] * (len(x_values) - 1) + ["start"]  # the last two may be near each other
    parts = [f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#555"/>']
    parts += [
        f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="{anchor}">{v:,}</text>'
        for x, v, anchor in zip(xs, x_values, anchors)
    ]
    parts += [f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{title}</text>']
    for power in range(int(lowest), int(highest) + 1):
        parts.append(f'<text x="{left - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    for color, dashes, values in curves:
        points = " ".join(f"{x:.1f},{y(value):.1f}" for x, value in zip(xs, values))
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2"{dashed} points="{points}"/>')
    return parts


def plot(found: dict[Cell, dict[str, float]]) -> str:
    """Return the SVG of both curves: over the peers and over the classes."""

    def curves(cells_of: Any) -> list[tuple[str, str, list[float]]]:
        return [
            (color, dashes, [found[cell][who] * 1e3 for cell in cells_of(label)])
            for label, color in CURVES.items()
            for who, dashes in (("ours", ""), ("theirs", "5 4"))
        ]

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 330" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        *panel(60, f"peers, {PEERS_AT:,} classes", PEERS, curves(lambda label: [(label, p, PEERS_AT) for p in PEERS])),
        *panel(
            410,
            f"classes, {CLASSES_AT} peers",
            CLASSES,
            curves(lambda label: [(label, CLASSES_AT, c) for c in CLASSES]),
        ),
        f'<text x="20" y="22">CPU ms of a forward and backward pass, batch {BATCH}; dashed: before</text>',
        *(
            f'<text x="{420 + 70 * i}" y="22" fill="{color}">{label}</text>'
            for i, (label, color) in enumerate(CURVES.items())
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Measure, print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="src folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    if options.against is None:
        parser.error("give the src folder of another checkout: --against ../before/src")
    from codistill.utils.tables import markdown

    sources = Path(__file__).parent.parent / "src", options.against.resolve()
    ours, theirs = (Worker(source, options.allocator) for source in sources)
    cells: list[Cell] = [(label, 4, 100) for label in METHODS]
    cells += [(label, 16, 1_000) for label in METHODS if label != "kdcl linear"]  # its solver takes seconds there
    if options.allocator == "default":
        cells = [(label, 16, 1_000) for label in CURVES]
    if options.plot:
        cells += [(label, p, PEERS_AT) for label in CURVES for p in PEERS]
        cells += [(label, CLASSES_AT, c) for label in CURVES for c in CLASSES]
    found = {cell: compare(ours, theirs, cell, options.rounds) for cell in dict.fromkeys(cells)}
    print(markdown([row(cell, values) for cell, values in found.items()]))
    if options.plot:
        options.plot.write_text(plot(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
