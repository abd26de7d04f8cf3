"""A grid of runs in a folder: cells x seeds, resumable, nothing trained twice, failures kept apart.

FOLDER/CELL/seedN       one run folder each; result.json is there exactly when the run is complete
FOLDER/CELL/seedN.lock  held by the process that trains it; the system lets go of it when the process dies
FOLDER/failures.json    the runs of the last call that have no result, and why

The folder itself is the queue: several processes (or jobs of a cluster) may work on one. A killed grid goes on where
its runs' checkpoints stand when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from codistill.config.config import Config, slug
from codistill.config.methods import TeacherConfig
from codistill.reproduce.run_result import RunOutcome, finished
from codistill.utils.errors import InputError
from codistill.utils.files import read_json
from codistill.utils.signals import Stopped, caught_signals


class GridStopped(Stopped):
    """A signal ended a grid; its runs have written checkpoints."""

    mend = "the same command"


@dataclass
class Cell:
    """One row of a table: a label, and the config that all its seeds share."""

    label: str
    config: Config
    baseline: str | None = None
    """Label of the row of equal cost that it is compared with."""
    teacher: str | None = None
    """Label of the cell whose run of the same seed is the teacher; it is trained first."""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What result.json holds, by seed."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why a seed has no result."""

    def place(self, folder: Path, seed: int) -> Path:
        """Return the run folder of a seed."""
        return folder / slug(self.label, lower=True) / f"seed{seed}"

    def run_config(self, folder: Path, seed: int, cells: list[Cell] | None = None) -> Config:
        """Return the resolved config of one seed's run; `cells` holds the teacher's, if it has one."""
        return self.run_options(folder, seed, cells).resolved()

    def run_options(self, folder: Path, seed: int, cells: list[Cell] | None = None) -> Config:
        """Return that config before its defaults are filled in, which is what a command line says."""
        config = dataclasses.replace(self.config, seed=seed, out=str(self.place(folder, seed)), resume="auto")
        teacher = next((c for c in cells or () if c.label == self.teacher), None)
        if teacher is not None:
            assert isinstance(config.method, TeacherConfig)
            config.method = dataclasses.replace(config.method, teacher=str(teacher.place(folder, seed)))
        return config


@dataclass
class Job:
    """One run of the grid, and how it stands."""

    cell: Cell
    seed: int
    config: Config
    first: Job | None = None
    """The job that must have a result before."""
    running: Any = None
    ended: bool = False


class Executor(Protocol):
    """Where runs are trained: processes of this machine, or a cluster's queue."""

    def room(self) -> bool:
        """Say whether another run may be started."""
        ...

    def start(self, config: Config) -> Any:
        """Start a run and return a handle."""
        ...

    def answer(self, handle: Any) -> RunOutcome | None:
        """Return what came out, (figures, None) or (None, reason); None while it goes on."""
        ...

    def close(self) -> None:
        """End what still runs, in order."""
        ...


def run_grid(
    cells: list[Cell],
    seeds: int,
    folder: Path,
    workers: int | None = 1,
    watch: Callable[[int, int], None] | None = None,
    executor: Executor | None = None,
) -> None:
    """Train what is missing, `workers` at a time, and fill in every cell's results.

    Args:
        cells: The rows; their `results` and `failures` are filled in.
        seeds: Seeds 0 .. n-1.
        folder: Where the runs lie.
        workers: Processes, each on one CPU thread, or on a GPU of its own where there are several; None: one a GPU.
        watch: Called a few times a second with (epochs done, epochs in all).
        executor: Where to train instead of on `workers` processes.

    Raises:
        InputError: a config cannot be used; nothing has been trained then.
        GridStopped: a signal asked for the end.
    """
    jobs = [Job(cell, seed, cell.run_config(folder, seed, cells)) for seed in range(seeds) for cell in cells]
    if len({str(job.config.out) for job in jobs}) < len(jobs):
        raise InputError("two rows of this grid have names that differ in signs only; rename one")
    for job in jobs:
        job.first = next((j for j in jobs if j.cell.label == job.cell.teacher and j.seed == job.seed), None)
    total = sum(job.config.epochs for job in jobs)
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        answer = finished(job.config)
        if answer is not None:
            _end(job, answer)
    if executor is None:
        from codistill.reproduce.workers import Processes

        executor = Processes(workers, len(jobs))
    with caught_signals() as caught:
        try:
            while not all(job.ended for job in jobs):
                _advance(jobs, executor)
                if caught:
                    raise GridStopped(caught[0])
                if watch is not None:
                    watch(sum(_epochs_done(job.config) for job in jobs), total)
                time.sleep(0.05)
        finally:
            executor.close()
    _keep_failures(cells, folder)


def _advance(jobs: list[Job], executor: Executor) -> None:
    """Take in what has ended and start what may start; a job whose teacher has failed fails with it."""
    for job in jobs:
        if job.ended:
            continue
        if job.running is None:
            if job.first is not None and not job.first.ended:
                continue
            if job.first is not None and job.seed in job.first.cell.failures:
                _end(job, (None, f"its teacher has no result ({job.first.cell.label}, seed {job.seed})"))
            elif executor.room():
                job.running = executor.start(job.config)
            continue
        answer = executor.answer(job.running)
        if answer is not None:
            _end(job, answer)


def _end(job: Job, answer: RunOutcome) -> None:
    figures, failure = answer
    job.ended = True
    if figures is not None:
        job.cell.results[job.seed] = figures
    else:
        job.cell.failures[job.seed] = failure or "no result"


def _keep_failures(cells: list[Cell], folder: Path) -> None:
    """Write the list of failures, or take an old one away."""
    path = folder / "failures.json"
    failures = {str(cell.place(folder, s)): why for cell in cells for s, why in cell.failures.items()}
    if failures:
        from codistill.utils.files import write_json

        write_json(path, failures)
    else:
        path.unlink(missing_ok=True)


def read_results(cells: list[Cell], seeds: int, folder: Path) -> None:
    """Fill in the results that the folder already holds, without training."""
    for cell in cells:
        for seed in range(seeds):
            result = read_json(cell.place(folder, seed) / "result.json", "test", "student")
            if result is not None:
                cell.results[seed] = result


def _epochs_done(config: Config) -> int:
    path = Path(str(config.out)) / "metrics.jsonl"
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
