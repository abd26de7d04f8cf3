"""A grid of runs in a folder: cells x seeds, resumable, nothing trained twice, failures kept apart.

FOLDER/CELL/seedN    one run folder each
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill.config import Config, InputError, MachineError


@dataclass
class Cell:
    """One row of a table: a label, and the config that all its seeds share."""

    label: str
    config: Config
    baseline: str | None = None
    """Label of the row of equal cost that it is compared with."""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What result.json holds, by seed."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why a seed has no result."""

    def run_config(self, folder: Path, seed: int) -> Config:
        """Return the config of one seed's run."""
        slug = re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")
        return dataclasses.replace(
            self.config, seed=seed, out=str(folder / slug / f"seed{seed}"), resume="auto"
        ).resolved()


def run_grid(
    cells: list[Cell], seeds: int, folder: Path, workers: int = 1, watch: Callable[[int, int], None] | None = None
) -> None:
    """Train what is missing, `workers` at a time, and fill in every cell's results.

    Args:
        cells: The rows; their `results` and `failures` are filled in.
        seeds: Seeds 0 .. n-1.
        folder: Where the runs lie.
        workers: Processes; each uses one CPU thread.
        watch: Called a few times a second with (epochs done, epochs in all).

    Raises:
        InputError: a config cannot be used; nothing has been trained then.
    """
    jobs = [(cell, seed, cell.run_config(folder, seed)) for cell in cells for seed in range(seeds)]
    total = sum(config.epochs for _, _, config in jobs)
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, len(jobs)), initializer=_begin_worker) as pool:
        pending = [(cell, seed, pool.apply_async(_train, (config,))) for cell, seed, config in jobs]
        while not all(answer.ready() for _, _, answer in pending):
            time.sleep(0.2)
            if watch is not None:
                watch(sum(_epochs_done(config) for _, _, config in jobs), total)
        for cell, seed, answer in pending:
            figures, failure = answer.get()
            if figures is not None:
                cell.results[seed] = figures
            else:
                cell.failures[seed] = failure or "no result"


def _begin_worker() -> None:
    import signal
    import warnings

    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    warnings.simplefilter("ignore")


def _train(config: Config) -> tuple[dict[str, Any] | None, str | None]:
    """Train one run in a worker; a failure becomes a sentence."""
    from codistill.signals import Stopped
    from codistill.train import train

    assert config.out is not None
    try:
        done = Path(config.out) / "result.json"
        if done.exists():  # checked against the config as any continuation is
            from codistill.run import RunFolder

            RunFolder(config)
            return json.loads(done.read_text()), None
        return train(config).figures, None
    except (InputError, MachineError, Stopped) as error:
        return None, str(error)
    except Exception as error:  # a run that breaks must not take the grid with it
        return None, f"{type(error).__name__}: {error}"


def _epochs_done(config: Config) -> int:
    path = Path(str(config.out)) / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
