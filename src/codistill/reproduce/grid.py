"""A grid of runs in a folder: cells x seeds. It can be resumed, and a run that is complete is not trained again.

FOLDER/CELL/seedN       one run folder each; result.json exists exactly when the run is complete
FOLDER/CELL/seedN.lock  locked by the process that trains the run; the system releases it when the process ends
FOLDER/failures.json    the runs of the last call that have no result, and why

The folder itself is the queue: several processes (or jobs of a cluster) may work on one. The same command resumes a
killed grid from the checkpoints of its runs.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from codistill.config import Config, TeacherConfig, slug
from codistill.reproduce.run_result import RunOutcome, read_outcome
from codistill.utils import InputError, Stopped, StoppedEarly, catch_signals, write_json

PROGRESS_SECONDS = 0.5
"""Seconds between two looks at how far the runs are."""
MAX_SEEDS = 99_999


class GridStopped(Stopped):
    """A signal ended a grid; its runs have written checkpoints."""

    hint = "the same command"


@dataclass
class Cell:
    """One row of a table: a label, and the config that all its seeds share."""

    label: str
    config: Config
    baseline: str | None = None
    """Label of the row of equal training cost that it is compared with."""
    teacher: str | None = None
    """Label of the cell whose run of the same seed is the teacher; it is trained first."""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The contents of result.json, by seed."""
    failures: dict[int, str] = field(default_factory=dict)
    """The reason why a seed has no result, by seed."""

    def run_path(self, folder: Path, seed: int) -> Path:
        """Return the run folder of a seed."""
        return folder / slug(self.label, lower=True) / f"seed{seed}"

    def list_seeds(self, folder: Path, seeds: Sequence[int]) -> list[int]:
        """Return those of `seeds` (a range, which may be of any length) that have a run folder."""
        names = [path.name.removeprefix("seed") for path in self.run_path(folder, 0).parent.glob("seed*")]
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{1,9}", name) and int(name) in seeds)

    def run_config(self, folder: Path, seed: int, cells: list[Cell] | None = None) -> Config:
        """Return the resolved config of one seed's run; `cells` includes its teacher, if it has one."""
        return self.run_options(folder, seed, cells).resolved()

    def run_options(self, folder: Path, seed: int, cells: list[Cell] | None = None) -> Config:
        """Return the config of one seed's run before its defaults are filled in."""
        config = dataclasses.replace(self.config, seed=seed, out=str(self.run_path(folder, seed)), resume="auto")
        teacher = next((c for c in cells or () if c.label == self.teacher), None)
        if teacher is not None and isinstance(config.method, TeacherConfig):
            config.method = dataclasses.replace(config.method, teacher=str(teacher.run_path(folder, seed)))
        return config


@dataclass
class Job:
    """One run of the grid, and its state."""

    cell: Cell
    seed: int
    config: Config
    depends_on: Job | None = None
    """The job (its teacher) that must have a result first."""
    handle: Any = None
    """What the executor returned when it started the run; None before."""
    ended: bool = False

    def finish(self, outcome: RunOutcome) -> None:
        """Store the run's result or failure in its cell."""
        result, failure = outcome
        self.ended = True
        if result is not None:
            self.cell.results[self.seed] = result
        else:
            self.cell.failures[self.seed] = failure or "no result"


class Executor(Protocol):
    """Trains runs: in processes of this machine, or in jobs of a cluster."""

    def has_capacity(self) -> bool:
        """Return whether another run may be started."""
        ...

    def start(self, config: Config) -> Any:
        """Start a run and return a handle."""
        ...

    def poll(self, handle: Any) -> RunOutcome | None:
        """Return (result, None) or (None, reason) of a run that has ended; None while it is running."""
        ...

    def close(self) -> None:
        """Stop the runs that have not ended; each writes a checkpoint."""
        ...


def run_grid(
    cells: list[Cell],
    seeds: Sequence[int],
    folder: Path,
    workers: int | None = 1,
    on_progress: Callable[[int, int], None] | None = None,
    executor: Executor | None = None,
) -> None:
    """Train the runs that have no result, `workers` at a time, and fill in every cell's results.

    Args:
        cells: The rows; their `results` and `failures` are filled in.
        seeds: The seeds of every row.
        folder: The folder of all runs.
        workers: Processes, each on one CPU thread, or each on its own GPU where there are several; None: one per GPU.
        on_progress: Called about twice a second with (epochs done, epochs in total).
        executor: Trains the runs instead of `workers` processes.

    Raises:
        InputError: a config cannot be used; nothing has been trained then.
        GridStopped: a signal stopped the grid.
        StoppedEarly: the same, before any of its runs had begun.
    """
    jobs = _make_jobs(cells, seeds, folder)
    total = sum(job.config.epochs for job in jobs)
    if executor is None:
        from codistill.reproduce.workers import Processes

        executor = Processes(workers, len(jobs))
    try:
        _run_jobs(jobs, executor, on_progress, total)
    except GridStopped as stopped:
        if any(Path(str(job.config.out)).is_dir() for job in jobs):
            raise
        with suppress(OSError):  # files of the grid are in it
            folder.rmdir()
        raise StoppedEarly(str(stopped)) from None
    _write_failures(cells, folder)


def _run_jobs(jobs: list[Job], executor: Executor, on_progress: Callable[[int, int], None] | None, total: int) -> None:
    """Run all jobs to their end, and close the executor.

    Raises:
        GridStopped: a signal stopped the grid.
    """
    counter, shown_at = _EpochCounter(), -PROGRESS_SECONDS
    with catch_signals() as caught:
        try:
            while not all(job.ended for job in jobs):
                _advance_jobs(jobs, executor)
                if caught:
                    raise GridStopped(caught[0])
                if on_progress is not None and time.monotonic() - shown_at >= PROGRESS_SECONDS:
                    on_progress(
                        sum(job.config.epochs if job.ended else counter.count(job.config) for job in jobs), total
                    )
                    shown_at = time.monotonic()
                time.sleep(0.05)
            if on_progress is not None:
                on_progress(sum(counter.count(job.config) for job in jobs), total)
        finally:
            executor.close()


def _make_jobs(cells: list[Cell], seeds: Sequence[int], folder: Path) -> list[Job]:
    """Return all jobs, those with a result as ended, and create the folder."""
    jobs = [Job(cell, seed, cell.run_config(folder, seed, cells)) for seed in seeds for cell in cells]
    if len({str(job.config.out) for job in jobs}) < len(jobs):
        raise InputError("two rows of this grid have names that differ in punctuation or case only; rename one")
    for job in jobs:
        job.depends_on = next((j for j in jobs if j.cell.label == job.cell.teacher and j.seed == job.seed), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"--out {folder} cannot be a folder ({error.strerror}); name another one") from None
    for job in jobs:
        outcome = read_outcome(job.config)
        if outcome is not None:
            job.finish(outcome)
    return jobs


def _advance_jobs(jobs: list[Job], executor: Executor) -> None:
    """Collect ended runs and start new ones; a job whose teacher has failed fails too."""
    for job in jobs:
        if job.ended:
            continue
        if job.handle is None:
            teacher = job.depends_on
            if teacher is not None and not teacher.ended:
                continue
            if teacher is not None and job.seed in teacher.cell.failures:
                job.finish((None, f"its teacher has no result ({teacher.cell.label}, seed {job.seed})"))
            elif executor.has_capacity():
                job.handle = executor.start(job.config)
            continue
        outcome = executor.poll(job.handle)
        if outcome is not None:
            job.finish(outcome)


def list_failures(cells: list[Cell]) -> list[str]:
    """Return one line per run that has no result."""
    return [f"{cell.label}, seed {seed}: {reason}" for cell in cells for seed, reason in sorted(cell.failures.items())]


def _write_failures(cells: list[Cell], folder: Path) -> None:
    """Write failures.json, or remove an old one if no run failed."""
    path = folder / "failures.json"
    failures = {str(cell.run_path(folder, s)): reason for cell in cells for s, reason in cell.failures.items()}
    if failures:
        write_json(path, failures)
    else:
        path.unlink(missing_ok=True)


def read_results(cells: list[Cell], seeds: Sequence[int], folder: Path) -> None:
    """Fill in the results that the folder already contains, without training."""
    from codistill.runs import RunResult, read_record

    for cell in cells:
        for seed in cell.list_seeds(folder, seeds):
            try:
                result = read_record(cell.run_path(folder, seed) / "result.json", RunResult)
            except InputError as error:
                cell.failures[seed] = str(error)
                continue
            if result is not None:
                cell.results[seed] = {**result}


class _EpochCounter:
    """Counts the epochs that runs have finished; of a metrics.jsonl only what is new is read."""

    def __init__(self) -> None:
        self.known: dict[Path, tuple[int, int]] = {}
        """Size in bytes up to which a file was read, and its lines."""

    def count(self, config: Config) -> int:
        """Return the number of epochs that a run has finished so far."""
        path = Path(str(config.out)) / "metrics.jsonl"
        size, lines = self.known.get(path, (0, 0))
        try:
            new_size = path.stat().st_size
            if new_size < size:  # a resumed run dropped lines
                size, lines = 0, 0
            if new_size > size:
                with open(path, "rb") as stream:
                    stream.seek(size)
                    added = stream.read(new_size - size)
                self.known[path] = size + len(added), lines + added.count(b"\n")
        except OSError:
            return 0
        return self.known.get(path, (0, 0))[1]
