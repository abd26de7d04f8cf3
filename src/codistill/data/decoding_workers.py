"""The processes that decode image files: how they start, send their batches, and end.

A batch travels in a file in shared memory, whose name is sent. torch's own ways ask another process for the batch (a
worker for a file descriptor, or a manager of names), and wait for ever where that one was stopped or could not make its
socket. Where /dev/shm has no room (Docker gives it 64 MB) the file is in the temporary folder, and where that has none
the batch goes through the worker's pipe.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import secrets
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from codistill.utils import (
    DecodingError,
    InputError,
    SignalReceived,
    first_line,
    leave_safe_import_path,
    pending_signal,
    safe_import_path,
)

SampleRef = tuple[int, int, int]
"""Epoch, position in it, and index of the sample at that position."""
SECONDS_BETWEEN_LOOKS = 1.0
"""A process that waits for a batch looks this often whether a signal has arrived."""
DESCRIPTORS_A_WORKER = 5
"""Files that the main process opens for a worker: pipes of its queue, of its end and of its start."""
OTHER_DESCRIPTORS = 32
"""Files that the main process has open besides, and may open at a time."""
SECONDS_AFTER_SIGNAL = 10.0
"""Time that a batch has to come once a signal has arrived; a batch that comes is trained on before the run ends."""

NO_PICKLE = (PicklingError, AttributeError, TypeError)
"""What pickle raises for a value that it cannot send."""

_folders: tuple[str, ...] = ()
"""Folders through which this worker sends its batches."""


class PlannedBatches(Sampler):
    """The samples of each batch, as the main process plans them."""

    def __init__(self) -> None:
        self.planned: Iterable[list[SampleRef]] = ()

    def __iter__(self) -> Iterator[list[SampleRef]]:
        return iter(self.planned)


def start_loader(decoder: Dataset, workers: int, *, pin_memory: bool, persistent: bool) -> DataLoader:
    """Return a DataLoader whose batches are planned in its `batch_sampler`, a `PlannedBatches`.

    Args:
        decoder: Makes a batch from a list of samples.
        workers: Processes that decode; 0 decodes in this one.
        pin_memory: Whether batches are copied to pinned memory.
        persistent: Whether the processes are kept from epoch to epoch.

    Raises:
        DecodingError: this process may not open as many files as that many workers need.
    """
    _check_descriptors(workers)
    atexit.unregister(end_workers)
    atexit.register(end_workers)  # last in, first out: before multiprocessing waits for its children
    folders = _make_folders() if workers else ()
    loader = _QuietLoader(
        decoder,
        batch_sampler=PlannedBatches(),
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=partial(_prepare_worker, folders, os.getpid()),
        pin_memory=pin_memory,
        timeout=SECONDS_BETWEEN_LOOKS if workers else 0,
        generator=torch.Generator(),  # of its own: the DataLoader draws from it in every epoch
        persistent_workers=workers > 0 and persistent,
    )
    weakref.finalize(loader, _remove_folders, folders, os.getpid())
    return loader


class _QuietLoader(DataLoader):
    """A DataLoader that does not advise on the number of its workers, as the user has chosen it."""

    def check_worker_number_rationality(self) -> None:
        """Say nothing."""


def _check_descriptors(workers: int) -> None:
    """Raise the limit of open files where the workers of two loaders (training, and evaluation) would exceed it."""
    try:
        import resource
    except ImportError:  # no POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHER_DESCRIPTORS + 2 * workers * DESCRIPTORS_A_WORKER
    if not workers or soft >= needed or soft == resource.RLIM_INFINITY:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        raise DecodingError(
            f"{workers} processes that decode images need {needed} open files, and this process may have {soft}; raise "
            f"the limit (ulimit -n {needed}), or give a smaller --data-workers (0: none)"
        ) from None


def _identity(batch: Any) -> Any:
    return batch


def _prepare_worker(folders: tuple[str, ...], trainer: int, _worker: int) -> None:
    """Ignore signals in a worker: they reach the whole process group, and the main process still needs its batches."""
    global _folders
    _folders = folders
    leave_safe_import_path()
    Finalize(None, _remove_folders, (folders, trainer), exitpriority=0)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def _ended_workers_ignored() -> Iterator[None]:
    """Do without torch's handler, which would report a worker that is killed on purpose as a failure."""
    before = None
    with suppress(ValueError, AttributeError):  # only the main thread may set handlers; not every system has them
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def end_workers() -> None:
    """Kill the workers when this process ends; multiprocessing would send a signal that they ignore."""
    with _ended_workers_ignored():
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()
                child.join()


@dataclass(frozen=True)
class SentBatch:
    """A batch in a file."""

    path: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the batch, mapped into memory, and remove the file."""
        batch = torch.from_file(self.path, shared=True, size=math.prod(self.shape), dtype=torch.uint8)
        os.unlink(self.path)
        return batch.view(self.shape)


def send(pixels: np.ndarray) -> SentBatch | np.ndarray:
    """Return a batch, uint8, as it leaves this process; `receive` takes what this returns."""
    for folder in _folders if get_worker_info() is not None else ():
        path = os.path.join(folder, secrets.token_hex(8))
        try:
            with open(path, "xb", buffering=0) as stream:
                if (
                    stream.write(np.ascontiguousarray(pixels).data.cast("B")) == pixels.nbytes
                ):  # less where the rest has no room
                    return SentBatch(path, pixels.shape)
        except OSError:  # missing or full, or too many files are open
            pass
        with suppress(OSError):
            os.unlink(path)
    return pixels


def _make_folders() -> tuple[str, ...]:
    """Make the folders through which batches travel: in shared memory, and in the temporary folder."""
    folders = []
    for place in ("/dev/shm", None):
        with suppress(OSError):
            folders.append(tempfile.mkdtemp(prefix=f"codistill-{os.getpid()}-", dir=place))
    return tuple(folders)


def _remove_folders(folders: Iterable[str], trainer: int) -> None:
    """Remove the folders, in the process that made them or in a worker that has outlived it."""
    if os.getpid() == trainer or os.getppid() != trainer:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def receive(loader: DataLoader, seconds: float) -> Iterator[Any]:
    """Yield the batches of the workers.

    Args:
        loader: What `start_loader` returned.
        seconds: Time that one batch may take.

    Raises:
        DecodingError: the workers cannot start, one was killed, or no batch came in time.
        SignalReceived: a signal was recorded, and the batch that was waited for did not come.
    """
    iterator = _begin(loader)
    began, signaled = time.monotonic(), None
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            now, name = time.monotonic(), pending_signal()
            signaled = now if signaled is None and name is not None else signaled
            late = now - began > seconds
            if _timed_out(error) and not late and (signaled is None or now - signaled < SECONDS_AFTER_SIGNAL):
                continue
            _kill_workers(iterator)
            if late or not _timed_out(error):
                raise _explain(error, loader.num_workers, seconds) from None
            raise SignalReceived(name) from None
        yield _read(batch)
        began, signaled = time.monotonic(), None


def _read(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a batch with its images, the first of its values, as a tensor."""
    images, *more = batch
    return images.read() if isinstance(images, SentBatch) else torch.from_numpy(images), *more


def _begin(loader: DataLoader) -> Iterator[Any]:
    """Start the workers, or a further epoch of them."""
    try:
        with warnings.catch_warnings(), safe_import_path():
            warnings.filterwarnings("ignore", "Got pickle error")
            return iter(loader)
    except (RuntimeError, OSError, *NO_PICKLE) as error:
        if loader.num_workers == 0:
            raise
        _discard_unfinished(error)
        if isinstance(error, NO_PICKLE):
            raise _not_sendable(error) from None
        raise DecodingError(
            f"{loader.num_workers} processes that decode images cannot start ({first_line(error).rstrip('. ')}); give "
            "a smaller --data-workers (0: none)"
        ) from None


def check_sendable(decoder: Dataset) -> None:
    """Raise where processes that are spawned, and not forked, could not be sent the decoder.

    Raises:
        InputError: the data set holds what cannot be pickled, such as a lambda.
    """
    if multiprocessing.get_start_method(allow_none=True) in (None, "fork"):
        return
    try:
        ForkingPickler.dumps(decoder)
    except NO_PICKLE as error:
        raise _not_sendable(error) from None


def _not_sendable(error: Exception) -> InputError:
    return InputError(
        f"the data set cannot be sent to the processes that decode images ({first_line(error)}); give it functions of "
        "a module, in place of lambdas and local ones, or --data-workers 0"
    )


def _discard_unfinished(error: Exception) -> None:
    """Kill the workers of an iterator whose construction raised the error, and close its files.

    torch would do that when the iterator is collected: it waits five seconds for each worker, and prints a traceback,
    because attributes are missing.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if isinstance(iterator, _BaseDataLoaderIter):
            for worker in getattr(iterator, "_workers", ()):
                with suppress(AttributeError, ValueError):  # the last one may not have started
                    worker.kill()
                    worker.join()
            vars(iterator)["_shutdown"] = True
    traceback.clear_frames(error.__traceback__)


def _timed_out(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader timed out" in str(error)


def _explain(error: Exception, workers: int, seconds: float) -> Exception:
    """Return the error that ends the run: what failed, and the option that helps."""
    if _timed_out(error):
        return DecodingError(
            f"no batch came within {seconds:g} seconds from the {workers} processes that decode images: one was "
            "stopped, or the disk does not answer; raise --collective-timeout if a batch may take that long"
        )
    if "DataLoader worker" in str(error):
        return DecodingError(
            f"a process that decodes images was killed ({first_line(error).rstrip('. ')}), perhaps for lack of memory; "
            "give a smaller --data-workers (0: none) or --batch-size"
        )
    if "Too many open files" in str(error):
        return DecodingError(
            "too many files are open in the process that decodes images; raise the limit (ulimit -n), or give a "
            "smaller --data-workers (0: none)"
        )
    return error


def _kill_workers(iterator: Any) -> None:
    """Kill the workers of one loader: torch would wait five seconds for each that does not answer."""
    with _ended_workers_ignored():
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()
        getattr(iterator, "_shutdown_workers", lambda: None)()
