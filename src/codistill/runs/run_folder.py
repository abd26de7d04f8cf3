"""The run folder: resolved config, environment, metrics, checkpoints; everything written atomically.

config.json        what --config takes to repeat the run
data.json          classes, channels, size and normalising of the images: what predict needs; and their checksum
environment.json   versions, hardware, git commit, command
metrics.jsonl      one line an epoch
last.pt            the newest checkpoint: weights, optimiser, position, every random state (checkpoint.py)
last-1.pt ...      those before it (--keep-checkpoints);  best.pt: the best epoch on validation, where there is one
run.lock           held by the process that trains; the system lets go of it when the process dies
details.json       what a report draws: reliability by bins, confusion of the deployed member
result.json        the final figures; it exists exactly when the run is complete
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from codistill.config.config import Config
from codistill.runs.checkpoint import load_newest, shift, write_checkpoint
from codistill.runs.environment import environment
from codistill.utils.errors import InputError, MachineError
from codistill.utils.files import _FULL, _locked, read_json, read_lines, write_atomically, write_json

# What may differ between a run and its continuation without changing its result.
_FREE = {
    *("out", "resume", "data_dir", "checkpoint_every_epochs", "checkpoint_every_steps", "tracker", "device"),
    *("mesh", "collective_timeout", "checkpoint_activations", "execution", "keep_checkpoints", "skip_nonfinite"),
    *("data_workers", "skip_corrupt"),
}
_locks: set[IO[str]] = set()  # those that this process holds


def _drop_locks() -> None:
    """Close a forked child's copies: a process that decodes may outlive its trainer, and must not hold its folder.

    The parent's lock stays, for closing one of several copies lets go of nothing.
    """
    while _locks:
        with suppress(OSError):
            _locks.pop().close()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_drop_locks)


class RunFolder:
    """One run's folder.

    Args:
        config: The resolved config; `config.out` names the folder.
        resume: Whether to continue what the folder holds.

    Raises:
        InputError: the folder holds another run, or this one and `resume` is not asked for.
    """

    def __init__(self, config: Config) -> None:
        assert config.out is not None
        resume = config.resume
        self.path = Path(resume if resume not in (None, "auto") else config.out)
        self.config = config
        self.checkpoint_path = self.path / "last.pt"
        self._check()

    def _check(self) -> None:
        """Raise where the folder cannot be this run's."""
        resume, held = self.config.resume, self.path / "config.json"
        if resume not in (None, "auto") and not held.exists():
            raise InputError(f"--resume {resume}: there is no run there (no config.json)")
        if held.exists():
            self._compare(Config.from_file(held), asked=resume is not None)
        elif self.path.exists() and (not self.path.is_dir() or not all(map(_own_beginning, self.path.iterdir()))):
            raise InputError(f"--out {self.path} exists and is no run of codistill; name a new or empty folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock dies with its process, however that ends.

        Raises:
            InputError: another process trains there, or the folder cannot be written to.
            MachineError: the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = open(self.path / "run.lock", "a+")  # noqa: SIM115
        except OSError as error:
            kind = MachineError if error.errno in _FULL else InputError
            raise kind(
                f"--out {self.path} cannot be written to ({error.strerror or error}); name another folder"
            ) from None
        with stream:
            if not _locked(stream):
                stream.seek(0)
                by = f" by {name}" if (name := stream.read().strip()) else ""
                raise InputError(f"--out {self.path} is in use{by}; wait for that run's end, or name another --out")
            with suppress(OSError):  # a full disk: the name is a courtesy
                stream.truncate(0)
                stream.write(f"process {os.getpid()} on {platform.node()}\n")
                stream.flush()
            self._check()  # anew: the process that held it may have written what is there
            for leftover in self.path.glob(".*.tmp"):  # a killed process was writing it
                leftover.unlink(missing_ok=True)
            _locks.add(stream)
            try:
                yield
            finally:
                _locks.discard(stream)

    def _compare(self, held: Config, asked: bool) -> None:
        theirs, ours = held.to_dict(), self.config.to_dict()
        keys = sorted(ours, key=lambda k: k == "method")  # last: its ramp follows from the epochs
        differing = [k for k in keys if k not in _FREE and json.dumps(ours[k]) != json.dumps(theirs.get(k))]
        if differing:
            key = differing[0]
            flag = "--resume" if asked else "--out"
            was, now = theirs.get(key), ours[key]
            if key == "method" and isinstance(was, dict) and was.get("name") == now.get("name"):
                key = "method." + next(k for k in now if now[k] != was.get(k))
                was, now = was.get(key[7:]), now[key[7:]]
            else:
                was, now = (v.get("name") if isinstance(v, dict) else v for v in (was, now))
            raise InputError(
                f"{flag}: {self.path} holds another run (--{key.replace('_', '-')} was {was}, now {now}); "
                "name another --out, or repeat the run with its own options"
            )
        if not asked:
            raise InputError(
                f"--out {self.path} holds this run already; continue it with --resume auto, or name another"
            )

    @property
    def complete(self) -> bool:
        """Whether the run has ended and its result is written."""
        return (self.path / "result.json").exists()

    def begin(self) -> None:
        """Write what describes the run, once."""
        if not (self.path / "config.json").exists():  # first: it says whose folder this is
            write_json(self.path / "config.json", self.config.to_dict() | {"resume": None})
        if not (self.path / "environment.json").exists():
            write_json(self.path / "environment.json", environment(self.config))

    def read(self, name: str) -> Any:
        """Return what one of the folder's JSON files holds, None where there is none yet."""
        return read_json(self.path / name)

    def describe(self, about: dict[str, Any]) -> None:
        """Write what the networks take and name (data.json), once."""
        if not (self.path / "data.json").exists():
            write_json(self.path / "data.json", about)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())  # before the checkpoint that says that the epoch is over
        except OSError as error:
            raise MachineError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None

    def lines(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def truncate_metrics(self, epochs: int) -> None:
        """Drop the lines of epochs after the first `epochs`: a resumed run writes them again."""
        kept = [line for line in self.lines() if line["epoch"] < epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path / "metrics.jsonl", lambda stream: stream.write(text.encode()))

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, with every random state, atomically; the ones before it are kept as asked for."""
        make_room = lambda: shift(self.path, self.config.keep_checkpoints)  # noqa: E731
        write_atomically(self.checkpoint_path, lambda stream: write_checkpoint(state, stream), make_room)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the checkpoint of the best epoch on validation."""
        write_atomically(self.path / "best.pt", lambda stream: write_checkpoint(state, stream))

    def load(self) -> dict[str, Any] | None:
        """Return the newest good checkpoint, or None where there is none yet; damaged ones are set aside."""
        return load_newest(self.path, set_aside=True)


def _own_beginning(path: Path) -> bool:
    """Say whether a file is what a run leaves that was killed before it had described itself."""
    return path.name == "run.lock" or re.fullmatch(r"\.config\.json\.\w+\.tmp", path.name) is not None
