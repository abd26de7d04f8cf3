"""Where the runs of a grid are trained: processes of this machine, or jobs that submitit hands to a cluster.

Nothing here imports torch before a worker knows its GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from codistill.config.config import Config
from codistill.reproduce.run_result import RunOutcome, finished
from codistill.utils.allow_import import ImportPolicy, current_policy, use_policy
from codistill.utils.errors import InputError, MachineError


def train_job(config: Config, asked_for: ImportPolicy | None = None) -> RunOutcome:
    """Train one run, or read its result if it is complete; a failure becomes a sentence.

    Args:
        config: The run.
        asked_for: What code the command that hands it over was asked to run; default what this process was.
    """
    from codistill.utils.failures import explain
    from codistill.utils.signals import Stopped

    assert config.out is not None
    try:
        with use_policy(asked_for or current_policy()), _lock(Path(f"{config.out}.lock")):
            answer = finished(config)  # another process may have trained it while this one waited
            if answer is not None:
                return answer
            from codistill.training.loop import train

            return train(config).figures, None
    except (InputError, MachineError, Stopped) as error:
        return None, str(error)
    except Exception as error:  # a run that breaks must not take the grid with it
        return None, explain(error)[0] or f"{type(error).__name__}: {error}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process trains this run; where files cannot be locked, go on without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        _wait_for(stream)
        yield


def _wait_for(stream: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # no POSIX
        return
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(1.0)
        except OSError:  # a file system without locks
            return


class Processes:
    """Worker processes, kept from run to run; one that dies costs the run it had, and is replaced.

    Args:
        workers: How many; None is one a GPU, or one where there is none.
        most: No more than that many are of use.
    """

    def __init__(self, workers: int | None, most: int) -> None:
        self.gpus = _gpus()
        count = max(min(workers or max(len(self.gpus), 1), most), 1)
        self.slots: list[_Worker | None] = [None] * count

    def room(self) -> bool:
        """Say whether a worker is free."""
        return any(worker is None or not worker.busy for worker in self.slots)

    def start(self, config: Config) -> _Worker:
        """Give the run to a free worker."""
        index = next(i for i, worker in enumerate(self.slots) if worker is None or not worker.busy)
        worker = self.slots[index]
        if worker is not None and worker.spoiled:
            worker.end()
        if worker is None or worker.spoiled or not worker.process.is_alive():
            gpu = self.gpus[index % len(self.gpus)] if len(self.gpus) > 1 else None
            worker = self.slots[index] = _Worker(gpu)
        worker.begin(config)
        return worker

    def answer(self, handle: _Worker) -> RunOutcome | None:
        """Return what the worker says, or that it died."""
        return handle.answer()

    def close(self) -> None:
        """Ask all workers to end: one that trains writes its checkpoint first."""
        alive = [worker for worker in self.slots if worker is not None]
        for worker in alive:
            worker.end()
        for worker in alive:
            worker.process.join()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, gpu: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, gpu, os.getpid()))
        self.process.start()
        theirs.close()
        self.busy = self.spoiled = False

    def begin(self, config: Config) -> None:
        self.busy = True
        self.pipe.send((config, current_policy()))

    def answer(self) -> RunOutcome | None:
        try:
            if self.pipe.poll():
                self.busy = False
                answer: RunOutcome = self.pipe.recv()
                self.spoiled = "CUDA error" in (answer[1] or "")  # most leave the GPU lost to the process
                return answer
        except (EOFError, OSError):
            pass
        if self.busy and self.process.is_alive():
            return None
        self.process.join()
        self.busy = False
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hint = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
        return None, f"its process died ({how}){hint}; the same command goes on from its last checkpoint"

    def end(self) -> None:
        if self.busy:
            self.process.terminate()
        self.pipe.close()


def _serve(pipe: Connection, gpu: str | None, parent: int) -> None:
    """Train what comes through the pipe, until it closes."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs the parent says when to end
    while True:
        try:
            pipe.send(train_job(*pipe.recv()))
        except (EOFError, OSError):
            return


def _follow(parent: int) -> None:
    """End this process when the one that started it is gone, however it went: its runs stop with a checkpoint."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may name, without waking a GPU in this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part for part in named.split(",") if part.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


class Submitit:
    """Every run is a job that submitit hands to SLURM, or, with `cluster="local"`, to processes of this machine.

    Args:
        folder: Where submitit keeps its scripts and logs.
        cluster: `slurm` or `local`.
        options: Parameters of submitit's executor, as `name=value`: slurm_partition=gpu, timeout_min=600 ...

    Raises:
        InputError: submitit is missing, or does not know an option.
    """

    def __init__(self, folder: Path, cluster: str, options: tuple[str, ...] = ()) -> None:
        try:
            import submitit
        except ImportError:
            raise InputError(f"--submit {cluster} needs: pip install 'codistill[slurm]'") from None
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
            raise InputError(f"--submit {cluster}: submitit refuses ({str(error).splitlines()[0]})") from None
        self.jobs: list[Any] = []

    def room(self) -> bool:
        """Say yes: a cluster's queue takes everything."""
        return True

    def start(self, config: Config) -> Any:
        """Hand the run over."""
        job = self.executor.submit(train_job, config, current_policy())
        self.jobs.append(job)
        return job

    def answer(self, handle: Any) -> RunOutcome | None:
        """Return the job's answer once it has ended."""
        if not handle.done():
            return None
        try:
            return handle.result()
        except Exception as error:  # a job may be lost in as many ways as a cluster has
            said = [line for line in str(error).splitlines() if line.strip()]
            return None, f"its job {handle.job_id} was lost ({said[-1] if said else type(error).__name__})"

    def close(self) -> None:
        """Take back what has not ended."""
        for job in self.jobs:
            if not job.done():
                job.cancel()
