"""The run folder: resolved config, environment, metrics, checkpoints; every file is written atomically.

config.json        what --config takes to repeat the run
data.json          classes, channels, size and normalization of the images, which predict needs; their checksum
environment.json   versions, hardware, git commit, command
metrics.jsonl      one line per epoch
last.pt            the newest checkpoint: weights, optimizers, position, every random state (checkpoint.py)
last-1.pt ...      those before it (--keep-checkpoints);  best.pt: the best epoch on validation, where there is one
run.lock           locked by the process that trains; the system releases the lock when that process dies
trained_images.bin hashes of the images that were trained on (of a folder, an npz file, or from Python)
result-60-epochs.json, details-60-epochs.json    those of an earlier end, where --epochs was raised after it
details.json       what a report draws: reliability by bins, confusion matrix of the deployed member
result.json        the final figures; it exists if and only if the run is complete
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from codistill.config import Config, learning_rate_at
from codistill.runs.checkpoint import load_newest, rotate, write_checkpoint
from codistill.runs.environment import describe_environment
from codistill.runs.record_files import read_epoch_lines, read_epoch_texts, read_record, write_record
from codistill.runs.records import CheckpointState, DataInfo, EpochLine, RunResult
from codistill.utils import (
    DISK_FULL,
    InputError,
    LockedError,
    MachineError,
    check_regular,
    finite_or_null,
    is_same_file,
    lock,
    read_file,
    write_atomically,
    write_text,
)


def open_run(
    path: str | Path, flag: str = "", *, without_initial_weights: bool = False, allow_import: bool = False
) -> Config:
    """Read the config of a run folder.

    Args:
        path: The run folder.
        flag: The option that names the folder, for the message.
        without_initial_weights: Resolve the config with `pretrained` and `weights` off, for a network whose weights
            come from a checkpoint.
        allow_import: Import the own method that the folder names.

    Raises:
        InputError: it is no run folder, its config is damaged, or its method is code that nobody asked for.
    """
    prefix, file = flag + " " if flag else "", Path(path) / "config.json"
    if not check_regular(file):
        raise InputError(f"{prefix}{path} is no run folder (it has no config.json)")
    config = Config.from_file(file, allow_import=allow_import)
    try:
        resolved = dataclasses.replace(config, pretrained=False, weights=None, mesh=None).resolved()
    except InputError as error:
        raise InputError(f"{prefix}{file} cannot be used ({error})") from None
    return resolved if without_initial_weights else config


class RunFolder:
    """One run's folder.

    Args:
        config: The resolved config; `out`, or a path in `resume`, names the folder.

    Raises:
        InputError: the folder holds another run, or this one and `resume` is not set.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(str(config.out if config.resume in (None, "auto") else config.resume))
        self.config = config
        self.checkpoint_path = self.path / "last.pt"
        self._lock_stream: IO[str] | None = None
        self.begun_with: int | None = None
        """Epochs of a run that now goes on to others; None where they stay."""
        self._displaced = False
        self._check_folder()

    def _check_folder(self) -> None:
        """Raise InputError if the folder cannot be used for this run."""
        resume, config_path = self.config.resume, self.path / "config.json"
        if resume not in (None, "auto") and not config_path.exists():
            raise InputError(f"--resume {resume}: there is no run there (no config.json)")
        if config_path.exists():
            own = self.config.method.import_name
            self._compare_config(Config.from_file(config_path, known=[own] if own else []))
        elif self.path.exists() and (not self.path.is_dir() or not all(map(_is_leftover, self.path.iterdir()))):
            raise InputError(f"--out {self.path} exists and is no run of codistill; name a new or empty folder")

    def _compare_config(self, saved: Config) -> None:
        """Raise InputError if the folder's config is another run's, or this run's and `resume` is not set."""
        old, new = saved.to_dict(), self.config.to_dict()
        keys = sorted(new, key=lambda k: k == "method")  # last: its ramp follows from the epochs
        differing = [k for k in keys if k not in Config.NOT_IDENTITY and json.dumps(new[k]) != json.dumps(old.get(k))]
        if {new["data"].partition(":")[0], str(old.get("data")).partition(":")[0]} in ({"folder"}, {"npz"}):
            differing = [k for k in differing if k != "data"]  # it may have moved: its checksum in data.json decides
        only_length = "epochs" in differing and {*differing} <= {"epochs", "milestones", "method"}
        if only_length and self.config.resume is not None:
            self._check_other_length(saved, old, new)
            return
        if differing:
            key, was, now = _find_difference(differing[0], old, new)
            raise InputError(
                f"{'--out' if self.config.resume is None else '--resume'}: {self.path} holds another run "
                f"(--{key.replace('_', '-')} was {was}, now {now}); name another --out, or repeat the run with its "
                f"own options{', or go on with --resume auto' if only_length else ''}"
            )
        if self.config.resume is None:
            raise InputError(
                f"--out {self.path} holds this run already; continue it with --resume auto, or name another"
            )

    def _check_other_length(self, saved: Config, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Check that the run may go on to other epochs than it was begun with, and note it for `lock`."""
        if old["method"] != new["method"]:
            key, was, now = _find_difference("method", old, new)
            flag = f"--{key.replace('_', '-')}"
            raise InputError(
                f"--epochs: in a run of {self.config.epochs} epochs {flag} is {json.dumps(now)}, and {self.path} was "
                f"begun with another; add {flag} {json.dumps(was)}, or name another --out"
            )
        check_other_length(saved, self.config, self.read_metrics())
        self.begun_with = saved.epochs

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock is released when the process dies, however that happens.

        Raises:
            InputError: another process trains there, or the folder cannot be written to.
            MachineError: the disk is full.
        """
        with ExitStack() as stack:
            stack.callback(self._remove_if_unused, _missing_folders(self.path))
            try:
                self._lock_stream = stack.enter_context(lock(self.path / "run.lock"))
            except LockedError as error:
                by = f" by {error}" if str(error) else ""
                raise InputError(
                    f"--out {self.path} is in use{by}; wait for that run's end, or name another --out"
                ) from None
            except OSError as error:
                kind = MachineError if error.errno in DISK_FULL else InputError
                raise kind(
                    f"--out {self.path} cannot be written to ({error.strerror or error}); name another folder"
                ) from None
            self._check_folder()  # again: the process that had the lock may have written a run
            if self.begun_with is not None:
                self._change_length(self.begun_with)
            for leftover in self.path.glob(".*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)
            try:
                yield
            finally:
                self._lock_stream = None

    def _change_length(self, epochs: int) -> None:
        """Let the run end after another number of epochs; what it wrote at its first end is kept under another name.

        The result is renamed first: a process that is killed before it writes the config leaves the run as it was,
        but for its result, which the run's own command writes again.
        """
        if self.complete:
            warnings.warn(
                f"this run ended after {epochs} epochs before, and its test images were read then; that result is kept "
                f"in result-{epochs}-epochs.json",
                stacklevel=2,
            )
        for name in ("result", "details"):
            with suppress(FileNotFoundError):
                os.replace(self.path / f"{name}.json", self.path / f"{name}-{epochs}-epochs.json")
        write_record(self.path / "config.json", self.config.to_dict() | {"resume": None})

    def check_in_place(self) -> None:
        """Raise MachineError if the folder was deleted, renamed or replaced, or its lock deleted, since it was locked.

        Otherwise the folder would be made anew with half of a run in it, or two processes would train in it.
        """
        if self._lock_stream is not None and not is_same_file(self._lock_stream, self.path / "run.lock"):
            self._displaced = True
            raise MachineError(
                f"the run folder {self.path} or its run.lock was deleted, renamed or replaced while the run trained; "
                "nothing more was written: move it back, or name it with --resume, to continue from its last checkpoint"
            )

    def _remove_if_unused(self, created: list[Path]) -> None:
        """Remove the folder, and those above it that were created with it, where no run began in it."""
        with suppress(OSError):
            files = [*self.path.iterdir()]
            if not self._displaced and all(map(_is_leftover, files)):
                for file in files:
                    file.unlink(missing_ok=True)
                for folder in created:
                    folder.rmdir()

    @property
    def complete(self) -> bool:
        """Whether the run has ended and its result is written."""
        return (self.path / "result.json").exists()

    def write_metadata(self) -> None:
        """Write config.json and environment.json, if they are not there."""
        if not (self.path / "config.json").exists():  # first: it marks the folder as this run's
            write_record(self.path / "config.json", self.config.to_dict() | {"resume": None})
        if not (self.path / "environment.json").exists():
            write_record(self.path / "environment.json", describe_environment())

    def write_data_info(self, info: Mapping[str, Any]) -> None:
        """Write data.json, if it is not there."""
        if not (self.path / "data.json").exists():
            write_record(self.path / "data.json", info)

    def read_data_info(self) -> DataInfo | None:
        """Read data.json, None if it does not exist."""
        return read_record(self.path / "data.json", DataInfo)

    def read_result(self) -> RunResult | None:
        """Read result.json, None if it does not exist."""
        return read_record(self.path / "result.json", RunResult)

    def write_result(self, figures: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Write details.json, and then result.json, which marks the run as complete."""
        self.check_in_place()
        self.write_metadata()  # again, should a file have been deleted
        write_record(self.path / "details.json", details)
        write_record(self.path / "result.json", figures)

    def append_metrics(self, line: EpochLine) -> None:
        """Append one epoch to metrics.jsonl."""
        self.check_in_place()
        try:
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(finite_or_null(line), allow_nan=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())  # before the checkpoint that counts this epoch as done
        except OSError as error:
            raise MachineError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None

    def read_metrics(self) -> list[EpochLine]:
        """Read metrics.jsonl."""
        return read_epoch_lines(self.path / "metrics.jsonl")

    def truncate_metrics(self, epochs: int) -> None:
        """Keep the first `epochs` epochs of metrics.jsonl; a resumed run writes the others again."""
        path = self.path / "metrics.jsonl"
        write_text(path, "".join(f"{text}\n" for text, line in read_epoch_texts(path) if line["epoch"] < epochs))

    def save(self, state: Mapping[str, Any]) -> None:
        """Write last.pt, with every random state; `keep_checkpoints` - 1 older ones are kept."""
        self.check_in_place()
        self._forget_temperature("temperature")
        rotate_older = lambda: rotate(self.path, self.config.keep_checkpoints)  # noqa: E731
        write_atomically(self.checkpoint_path, lambda stream: write_checkpoint(state, stream), rotate_older)

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Write best.pt, the checkpoint of the best epoch on validation."""
        self.check_in_place()
        self._forget_temperature("temperature_best")
        write_atomically(self.path / "best.pt", lambda stream: write_checkpoint(state, stream))

    def _forget_temperature(self, key: str) -> None:
        """Drop a temperature that was fitted (`evaluate --calibrate`) to weights which a checkpoint now replaces."""
        path = self.path / "data.json"
        if f'"{key}"'.encode() in (read_file(path) or b"") and (info := self.read_data_info()) is not None:
            write_record(path, {name: value for name, value in info.items() if name != key})

    def load(self) -> CheckpointState | None:
        """Return the newest good checkpoint, None if there is none yet; damaged ones are renamed."""
        return load_newest(self.path, rename_damaged=True)


def check_other_length(old: Config, new: Config, metrics: Sequence[EpochLine]) -> None:
    """Check that a run may go on to another number of epochs: that all it did would have been the same.

    Args:
        old: The config that it was trained with.
        new: The same with other epochs, and perhaps other milestones.
        metrics: Its epochs so far; the next one may have begun.

    Raises:
        InputError: it trained longer already, or an epoch would have had another learning rate.
    """
    done = len(metrics)
    if new.epochs < done:
        raise InputError(f"--epochs {new.epochs}: the run has trained {done} epochs already; give that many or more")
    if old.first_averaged_epoch is not None:
        raise InputError("--epochs: --deploy swa averages the last part of a run's epochs; name another --out")
    for epoch in range(min(done + 1, old.epochs)):
        was, now = (learning_rate_at(config, epoch) for config in (old, new))
        if was != now:
            own = f"give --milestones {' '.join(map(str, old.milestones or ()))}, those of the run, or "
            fix = f"{'' if new.schedule == 'cosine' else own}name another --out"
            raise InputError(
                f"--epochs: epoch {epoch + 1} had the learning rate {was:g}, and in a run of {new.epochs} epochs it "
                f"has {now:g}; {fix}"
            )


def _missing_folders(path: Path) -> list[Path]:
    """Return `path` and the folders above it that do not exist, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _is_leftover(path: Path) -> bool:
    """Return whether a file is one that a run leaves if it is killed before its config is written."""
    return path.name == "run.lock" or re.fullmatch(r"\.config\.json\.\w+\.tmp", path.name) is not None


def _find_difference(key: str, old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any]:
    """Return the differing option's name, and its value in the old and the new config."""
    was, now = old.get(key), new[key]
    if key == "method" and isinstance(was, dict) and was.get("name") == now.get("name"):
        option = next(k for k in now if now[k] != was.get(k))
        return f"method.{option}", was.get(option), now[option]
    was, now = (value.get("name") if isinstance(value, dict) else value for value in (was, now))
    return key, was, now
