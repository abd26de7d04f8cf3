"""Memory and open files of a long run with evaluation, checkpoints and a tracker.

    python benchmarks/soak.py --minutes 4 --plot docs/soak.svg

The run is one process on one thread: OKDDip with 3 resnet8 on digits, an evaluation and a checkpoint every epoch of 14
steps, another checkpoint every 5 steps, TensorBoard if it is installed. A sample is taken every 5 epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from codistill.config.config import Config
from codistill.training.loop import train
from codistill.training.reporter import Reporter
from codistill.utils.errors import Stopped


def resident_memory() -> float:
    """Return this process's memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """Return the number of open file handles."""
    return len(os.listdir("/proc/self/fd"))


class Sampler(Reporter):
    """Records (steps, MB, handles) and ends the run by a signal when the time is over."""

    def __init__(self, minutes: float) -> None:
        self.until = time.perf_counter() + 60 * minutes
        self.samples: list[tuple[int, float, int]] = []
        self.steps = 0

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Store the number of steps per epoch."""
        self.steps = steps

    def epoch(self, line: dict[str, Any]) -> None:
        """Take a sample every 5 epochs."""
        if line["epoch"] % 5 == 0:
            gc.collect()
            self.samples.append(((line["epoch"] + 1) * self.steps, resident_memory(), open_files()))
        if time.perf_counter() > self.until:
            os.kill(os.getpid(), 15)


def plot(samples: list[tuple[int, float, int]]) -> str:
    """Return memory and handles over steps as SVG."""
    width, height, left, bottom = 720, 300, 60, 40
    last, most = samples[-1][0], 1.25 * max(mb for _, mb, _ in samples)
    x = lambda step: left + (width - 2 * left) * step / last  # noqa: E731
    y = lambda share: height - bottom - (height - 2 * bottom) * share  # noqa: E731
    line = lambda points, color: (  # noqa: E731
        f'<polyline fill="none" stroke="{color}" stroke-width="2" points="'
        + " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points) + '"/>'
    )  # fmt: skip
    handles = 2 * max(n for _, _, n in samples)
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        line([(s, mb / most) for s, mb, _ in samples], "#1f6fb4"),
        line([(s, n / handles) for s, _, n in samples], "#c05020"),
        f'<path d="M{left} {bottom}V{height - bottom}H{width - left}V{bottom}" fill="none" stroke="#555"/>',
    ]
    for share in (0, 0.5, 1):
        text.append(f'<text x="{left - 6}" y="{y(share) + 4:.0f}" text-anchor="end">{share * most:.0f}</text>')
        text.append(f'<text x="{width - left + 6}" y="{y(share) + 4:.0f}">{share * handles:.0f}</text>')
    text += [
        f'<text x="{left}" y="{bottom - 14}" fill="#1f6fb4">memory, MB</text>',
        f'<text x="{width - left}" y="{bottom - 14}" fill="#c05020" text-anchor="end">open file handles</text>',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">steps, 0 to {last:,}</text>',
        "</svg>",
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    sampler = Sampler(options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        config = Config("okddip", "resnet8", "digits", peers=3, batch_size=64, epochs=1_000_000, device="cpu")
        config.out, config.tracker, config.checkpoint_every_steps, config.log_every_steps = folder, tracker, 5, 5
        with contextlib.suppress(Stopped):
            train(config, sampler)
    samples = sampler.samples
    tenth = max(len(samples) // 10, 1)
    parts = samples[tenth : 2 * tenth], samples[-tenth:]  # in the first tenth the allocators still grow
    begin, end = (fmean(mb for _, mb, _ in part) for part in parts)
    handles = sorted({n for _, _, n in samples})
    print(
        f"{samples[-1][0]:,} steps, {samples[-1][0] // sampler.steps:,} epochs in {options.minutes:g} minutes, tracker "
        f"{tracker}; memory {begin:.1f} MB after a tenth, {end:.1f} MB at the end ({end - begin:+.1f}); open files "
        f"{', '.join(map(str, handles))}; {len(samples)} samples"
    )
    if options.plot:
        options.plot.write_text(plot(samples))
    return int(end > begin * 1.02 or len(handles) > 2)


if __name__ == "__main__":
    sys.exit(main())
