"""Processes that decode: batches arrive without shared memory, and what stops them ends the run in time."""

import gc
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.data import FileLoader, ImageSet, decoding_workers, load_set
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.utils.errors import DecodingError, InputError
from helpers.folders import train_on, write_images

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images", per_class=12)


class Pairs(torch.utils.data.Dataset):
    """Images, and what spawned processes cannot be sent."""

    def __init__(self):
        self.transform = lambda image: image

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.full((16, 16, 3), 10 * index, np.uint8), index % 2


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(decoding_workers, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(decoding_workers, "SECONDS_AFTER_SIGNAL", 0.3)


def make_loader(folder, workers, timeout=60.0):
    data = load_set(f"folder:{folder}", None, 16, "files")
    options = LoaderOptions(batch_size=4, augmentation=Augmentation(flip=True, resized_crop=True), views=2)
    return FileLoader(data.x_train, data.y_train, (0.5,) * 3, (0.2,) * 3, options, workers=workers, timeout=timeout)


def stop_workers():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGSTOP)


@pytest.fixture
def alone(folder):
    return [pixels for pixels, _ in make_loader(folder, 0).epoch(0)]


def assert_equal(batches, others):
    assert len(batches) == len(others) > 0
    assert all(torch.equal(one, other) for one, other in zip(batches, others))


def places_of(loader, monkeypatch):
    """Return the batches of an epoch, and where each was on its way: a folder, or "pipe"."""
    places, read = [], decoding_workers._read
    note = lambda b: places.append(str(Path(b[0].path).parents[1]) if hasattr(b[0], "path") else "pipe")  # noqa: E731
    monkeypatch.setattr(decoding_workers, "_read", lambda batch: note(batch) or read(batch))
    return [pixels for pixels, _ in loader.epoch(0)], {*places}


def test_batches_travel_in_shared_memory_and_leave_nothing_there(folder, alone, monkeypatch):
    loader = make_loader(folder, 1)
    batches, places = places_of(loader, monkeypatch)
    assert_equal(batches, alone)
    assert places == {"/dev/shm"}
    left = lambda: [*Path("/dev/shm").glob(f"codistill-{os.getpid()}-*")]  # noqa: E731
    assert left()
    assert [*left()[0].iterdir()] == []
    del loader
    gc.collect()
    assert left() == []


@pytest.mark.parametrize("missing", ["shm", "both"])
def test_batches_are_the_same_where_there_is_no_shared_memory(folder, alone, monkeypatch, tmp_path, missing):
    long = tmp_path / ("x" * 110)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long if missing == "shm" else tmp_path / "none"))
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: make(None, prefix, dir if dir is None else "/none"))
    batches, places = places_of(make_loader(folder, 1), monkeypatch)
    assert_equal(batches, alone)
    assert places == {str(long) if missing == "shm" else "pipe"}


def test_a_batch_that_is_too_large_for_a_folder_takes_the_next(folder, alone, monkeypatch, tmp_path):
    """A limit on the size of files acts as a full file system does: the file is cut short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        batches, places = places_of(make_loader(folder, 1), monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)
    assert_equal(batches, alone)
    assert places == {"pipe"}


def test_a_worker_that_is_stopped_ends_the_epoch_in_time(folder, impatient):
    loader = make_loader(folder, 1, timeout=1.0)
    batches = loader.epoch(0)
    next(batches)
    stop_workers()
    began = time.monotonic()
    with pytest.raises(DecodingError, match=r"no batch came within 1 seconds.*raise --collective-timeout"):
        list(batches)
    assert 1.0 <= time.monotonic() - began < 6.0


def test_a_worker_that_is_killed_is_named(folder, impatient):
    loader = make_loader(folder, 1)
    batches = loader.epoch(0)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DecodingError, match=r"a process that decodes images was killed.*--data-workers"):
        list(batches)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a DataLoader that was never made
def test_workers_that_cannot_start_are_told(folder, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch.multiprocessing, "Queue", refuse)
    with pytest.raises(DecodingError, match=r"1 processes that decode images cannot start.*--data-workers"):
        list(make_loader(folder, 1).epoch(0))


def test_workers_of_which_the_second_cannot_start_end_at_once(folder, monkeypatch, capfd):
    """torch would wait five seconds for each that has started, and print a traceback."""
    start, started = multiprocessing.Process.start, []

    def start_one(process):
        if started:
            raise OSError(28, "No space left on device")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start_one)
    began = time.monotonic()
    with pytest.raises(DecodingError, match=r"3 processes that decode images cannot start.*No space left on device"):
        list(make_loader(folder, 3).epoch(0))
    gc.collect()
    assert time.monotonic() - began < 4.0
    assert not started[0].is_alive()
    assert capfd.readouterr().err == ""


def test_a_data_set_that_cannot_be_sent_is_refused_at_set_up(monkeypatch):
    """Where processes are spawned: macOS, Windows, and Python 3.14."""
    pairs = Pairs()
    data = ImageSet.from_dataset(pairs, pairs, image_size=16, lazy=True)
    options = LoaderOptions(batch_size=4)
    make = lambda: FileLoader(data.x_train, data.y_train, (0.5,) * 3, (0.2,) * 3, options, workers=1)  # noqa: E731
    make()  # forked
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda **_: "spawn")
    with pytest.raises(InputError, match=r"cannot be sent to the processes that decode images .*--data-workers 0"):
        make()
    pairs.transform = None
    make()


def test_the_files_that_workers_need_are_counted_before_they_start(folder, monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    make_loader(folder, 2)._start_workers()
    assert limits == [(52, 4096)]  # raised as far as needed, and no further

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(DecodingError, match=r"2 processes .* need 52 open files, and this process may have 40.*ulimit"):
        make_loader(folder, 2)._start_workers()
    make_loader(folder, 0)._start_workers()  # no process needs none


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["signal", "timeout"])
def test_a_run_whose_workers_stop_keeps_its_steps(folder, impatient, monkeypatch, capsys, tmp_path, ends):
    """The batches that were decoded ahead are trained on; then a signal or the time limit ends the run."""
    words = ["--data-pipeline", "files", "--data-workers", "1", "--val-fraction", "0", "--log-every-steps", "1"]
    assert train_on(folder, tmp_path / "whole", *words) == 0
    steps = []

    def stop(*args):
        step(*args)
        steps.append(args)
        if len(steps) == 1:
            stop_workers()
            if ends == "signal":
                threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with monkeypatch.context() as patched:
        from codistill.training.loop import train_step as step

        patched.setattr("codistill.training.loop.train_step", stop)
        limit = ["--collective-timeout", "600" if ends == "signal" else "2"]
        began = time.monotonic()
        assert train_on(folder, tmp_path / "run", *words, *limit) == (75 if ends == "signal" else 1)
        assert time.monotonic() - began < 30
    said = " ".join(capsys.readouterr().err.split())
    expected = "stopped by SIGTERM; the checkpoint is written" if ends == "signal" else "no batch came within 2 seconds"
    assert expected in said
    assert "Traceback" not in said
    assert train_on(folder, tmp_path / "run", *words, "--resume", "auto") == 0
    results = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "run")]
    assert results[0] == results[1]
