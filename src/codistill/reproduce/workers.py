"""Executors that train the runs of a grid: processes of this machine, or jobs that submitit gives to a cluster.

Nothing here imports torch before a worker process has selected its GPU.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from codistill.config import Config
from codistill.reproduce.run_result import RunOutcome, read_outcome
from codistill.utils import (
    ImportPolicy,
    InputError,
    MachineError,
    Stopped,
    current_policy,
    describe_unexpected,
    explain_failure,
    first_line,
    ignore_interrupt,
    leave_safe_import_path,
    lock,
    safe_import_path,
    use_policy,
)

SECONDS_TO_END = 300.0
"""Time that the workers have to write their checkpoints where a grid is stopped; then they are killed."""


def train_job(config: Config, policy: ImportPolicy | None = None) -> RunOutcome:
    """Train one run, or read its result if it is complete; a failure is returned as a sentence.

    Args:
        config: The run.
        policy: The user code that the starting command may import; default this process's policy.
    """
    assert config.out is not None
    leave_safe_import_path()
    try:
        with use_policy(policy or current_policy()), lock(Path(f"{config.out}.lock"), wait=True):
            outcome = read_outcome(config)  # another process may have trained it while this one waited
            if outcome is not None:
                return outcome
            from codistill.training import train

            return train(config).figures, None
    except (InputError, MachineError, Stopped) as error:
        return None, str(error)
    except Exception as error:  # a run that fails must not end the grid
        return None, explain_failure(error)[0] or describe_unexpected(error)


class Processes:
    """Worker processes, each of which trains many runs; one that dies loses only its current run, and is replaced.

    Args:
        workers: Their number; None is one per GPU, or one where there is no GPU.
        max_workers: The number of runs: more workers than that have nothing to do.
    """

    def __init__(self, workers: int | None, max_workers: int) -> None:
        self.gpus = _list_gpus()
        count = max(min(workers or max(len(self.gpus), 1), max_workers), 1)
        self.slots: list[_Worker | None] = [None] * count

    def has_capacity(self) -> bool:
        """Return whether a worker is free."""
        return any(worker is None or not worker.busy for worker in self.slots)

    def start(self, config: Config) -> _Worker:
        """Give the run to a free worker."""
        index = next(i for i, worker in enumerate(self.slots) if worker is None or not worker.busy)
        worker = self.slots[index]
        if worker is not None and worker.gpu_lost:
            worker.close()
        if worker is None or worker.gpu_lost or not worker.process.is_alive():
            gpu = self.gpus[index % len(self.gpus)] if len(self.gpus) > 1 else None
            worker = self.slots[index] = _Worker(gpu)
        worker.begin(config)
        return worker

    def poll(self, handle: _Worker) -> RunOutcome | None:
        """Return the outcome of the worker's run, or that the worker died; None while it is running."""
        return handle.poll()

    def close(self) -> None:
        """End all workers; one that is training writes its checkpoint first."""
        workers = [worker for worker in self.slots if worker is not None]
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + SECONDS_TO_END
        for worker in workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            if worker.process.is_alive():  # its newest checkpoint stays
                worker.process.kill()
                worker.process.join()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(child_pipe, gpu, os.getpid()))
        with ignore_interrupt(), safe_import_path():  # Ctrl-C reaches the workers too, and only the parent ends them
            self.process.start()
        child_pipe.close()
        self.busy = self.gpu_lost = False

    def begin(self, config: Config) -> None:
        """Send a run to the process."""
        self.busy = True
        self.pipe.send((config, current_policy()))

    def poll(self) -> RunOutcome | None:
        """Return the run's outcome, or that the process died; None while it is running."""
        try:
            if self.pipe.poll():
                self.busy = False
                outcome: RunOutcome = self.pipe.recv()
                self.gpu_lost = "CUDA error" in (outcome[1] or "")  # after most of them a process cannot use its GPU
                return outcome
        except (EOFError, OSError):
            pass
        if self.busy and self.process.is_alive():
            return None
        self.process.join()
        self.busy = False
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        cause = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
        return None, f"its process died ({how}){cause}; the same command resumes from its last checkpoint"

    def close(self) -> None:
        """Let the process end: a run in progress is stopped by SIGTERM, which writes a checkpoint."""
        if self.busy:
            self.process.terminate()
            if self.process.pid is not None and hasattr(signal, "SIGCONT"):
                with suppress(OSError):  # it has ended
                    os.kill(self.process.pid, signal.SIGCONT)  # a stopped process (SIGSTOP) gets no other signal
        self.pipe.close()


def _worker_main(pipe: Connection, gpu: str | None, parent: int) -> None:
    """Train the runs that come through the pipe, until it closes."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            pipe.send(train_job(*pipe.recv()))
        except (EOFError, OSError):
            return


def _exit_with_parent(parent: int) -> None:
    """Send SIGTERM to this process once its parent has ended for any reason; a run writes its checkpoint."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _list_gpus() -> list[str]:
    """Return the values that CUDA_VISIBLE_DEVICES may take, without initializing CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part for part in visible.split(",") if part.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def find_submitit(cluster: str) -> Any:
    """Return the module submitit.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise InputError(f"--submit {cluster} needs: pip install submitit") from None


class Submitit:
    """Every run is a job that submitit gives to SLURM, or, with `cluster="local"`, to processes of this machine.

    Args:
        folder: The folder of submitit's scripts and logs.
        cluster: `slurm` or `local`.
        options: Parameters of submitit's executor, as `name=value`: slurm_partition=gpu, timeout_min=600 ...

    Raises:
        InputError: submitit is not installed, or does not accept an option.
    """

    def __init__(self, folder: Path, cluster: str, options: tuple[str, ...] = ()) -> None:
        submitit = find_submitit(cluster)
        values: dict[str, Any] = {"timeout_min": 60 * 24}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals:
                raise InputError(f"--submit-option {option}: write NAME=VALUE, as in slurm_partition=gpu")
            values[name] = int(value) if value.isdigit() else value
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=cluster)
            self.executor.update_parameters(**values)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise InputError(
                f"--submit {cluster}: submitit does not accept it ({first_line(error)}); correct --submit-option"
            ) from None
        self.jobs: list[Any] = []

    def has_capacity(self) -> bool:
        """Return True: a cluster's queue has no limit."""
        return True

    def start(self, config: Config) -> Any:
        """Submit the run and return its job."""
        with safe_import_path():
            job = self.executor.submit(train_job, config, current_policy())
        self.jobs.append(job)
        return job

    def poll(self, handle: Any) -> RunOutcome | None:
        """Return the job's outcome once it has ended."""
        if not handle.done():
            return None
        try:
            return handle.result()
        except Exception as error:  # submitit raises many kinds of errors for a lost job; the last line is the cause
            lines = [line for line in str(error).splitlines() if line.strip()]
            return None, f"its job {handle.job_id} was lost ({lines[-1] if lines else type(error).__name__})"

    def close(self) -> None:
        """Cancel the jobs that have not ended."""
        for job in self.jobs:
            if not job.done():
                job.cancel()
