"""`train --dry-run`: what a run would be, and what it would take; nothing is written."""

from __future__ import annotations

import itertools
import time

from codistill.config import Config
from codistill.runs import find_tracker
from codistill.training.build import build_run
from codistill.training.run import Run
from codistill.training.step import train_step
from codistill.training.summary import describe_run
from codistill.utils import InputError, peak_megabytes, reset_peak_memory, synchronize

MEASURED_STEPS = 2


def describe_dry_run(config: Config) -> list[str]:
    """Build a run, do two steps, and return its description with the estimated time and memory.

    The second step is the measured one: the first also sets up kernels and memory. Evaluation and checkpoints come on
    top.

    Raises:
        InputError: the config cannot be used (its tracker is missing too), or asks for several processes.
    """
    if config.mesh is not None:
        raise InputError("--dry-run measures one process; drop --mesh")
    config = config.resolved()
    find_tracker(config.tracker)
    run = build_run(config)
    notes = describe_run(run)
    reset_peak_memory(run.device)
    seconds = _measure_steps(run)
    steps = config.epochs * len(run.loader)
    peak = peak_megabytes(run.device)
    memory = "unknown" if peak is None else f"{peak:,.0f} MiB"
    what = "of the GPU" if run.device.type == "cuda" else "of the whole process"
    return [
        *notes,
        f"{steps:,} steps of {1000 * seconds:.1f} ms: about {_in_words(steps * seconds)} of training, evaluation apart",
        f"peak memory {what} in {MEASURED_STEPS} steps: {memory}",
        f"nothing was written; without --dry-run the run folder would be {config.out}",
    ]


def _measure_steps(run: Run) -> float:
    """Return the seconds of the last of the measured steps."""
    run.peers.train()
    run.method.train()
    seconds = 0.0
    batches = itertools.chain.from_iterable(run.loader.epoch(epoch) for epoch in range(MEASURED_STEPS))
    for views_VBCHW, targets_B in itertools.islice(batches, MEASURED_STEPS):
        started = time.perf_counter()
        train_step(run, views_VBCHW, targets_B, run.method.weight_at(0))
        synchronize(run.device)
        seconds = time.perf_counter() - started
        run.progress.step += 1
    return seconds


def _in_words(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    >>> _in_words(42.4), _in_words(600), _in_words(7200)
    ('42 s', '10 min', '2.0 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
