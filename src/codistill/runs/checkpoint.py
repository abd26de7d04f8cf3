"""Checkpoints: files of tensors and plain values with every random state, a schema and a checksum of themselves.

last.pt is the newest, last-1.pt the one before it, and so on; best.pt is the best on validation.

The SHA-256 of everything before it is the comment at the end of the zip archive, which torch ignores. It is part of
the file, so it is copied with it and written in the same atomic step; torch alone does not notice flipped bits.
Schema 1 had no checksum.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from codistill.config import Checkpoint
from codistill.runs.record_files import convert
from codistill.runs.records import CheckpointState
from codistill.utils import (
    DISK_FULL,
    InputError,
    MachineError,
    check_regular,
    first_line,
    load_tensors,
    on_one_line,
    out_of_memory,
)

SCHEMA = 2
_MARK = b"codistill sha256 "
_COMMENT_LENGTH = len(_MARK) + 64


class CorruptCheckpointError(InputError):
    """A checkpoint is truncated, has flipped bits or is no checkpoint; an older one may be good."""


@contextmanager
def errors_of_checkpoint(state: Mapping[str, Any]) -> Iterator[None]:
    """Raise what the restoring of a checkpoint that does not fit raises as an InputError that names the file."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, InputError | MachineError) or out_of_memory(error) is not None:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = on_one_line(lines[min(1, len(lines) - 1)]) if lines else type(error).__name__
        raise InputError(
            f"{state.get('file', 'the checkpoint')} does not fit the run's config.json or data.json ({reason}); put "
            "the files of one run together"
        ) from error


class _HashingStream:
    """Hashes what is written through it; the last two bytes, the length of the zip comment, are replaced at the end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.last_two = stream, hashlib.sha256(), b""
        self.error: OSError | None = None
        """Why writing failed (a full disk); torch's writer raises an error of its own instead."""

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self.last_two + bytes(view))
        else:
            self._write_and_hash(self.last_two)
        self._write_and_hash(view[:-2])
        self.last_two = bytes(view[-2:])
        return len(data)

    def flush(self) -> None:
        """Do nothing: the last bytes are not known before `write_checksum`."""

    def write_checksum(self) -> None:
        self._write_and_hash(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK)
        self.stream.write(self.digest.hexdigest().encode())

    def _write_and_hash(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = error
            raise


def write_checkpoint(state: Mapping[str, Any], stream: IO[bytes]) -> None:
    """Write a state with this process's random states, the schema and the checksum."""
    hashing = _HashingStream(stream)
    try:
        torch.save({"schema": SCHEMA, **state, "rng": rng_state()}, hashing)  # pyrefly: ignore
    except RuntimeError:
        if hashing.error is not None:
            raise hashing.error from None
        raise
    hashing.write_checksum()


def load_checkpoint(path: Path) -> CheckpointState:
    """Read a checkpoint onto the CPU without running code from it.

    Raises:
        CorruptCheckpointError: it is damaged or no checkpoint.
        InputError: it does not exist, or was written by a newer codistill.
    """
    if not check_regular(path):
        raise InputError(f"{path} does not exist; give a run folder whose training has written a checkpoint")
    try:
        has_checksum = _verify_checksum(path)
        state = load_tensors(path)
        if not isinstance(state, dict) or type(state.get("schema")) is not int:
            raise ValueError("it is no checkpoint of codistill")
        schema = state["schema"]
        if schema <= SCHEMA:
            convert(state, CheckpointState)
        if not has_checksum:
            _verify_without_checksum(path, schema)
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a truncated archive makes torch seek before its start
            raise CorruptCheckpointError(f"{path} is damaged or no checkpoint ({error})") from None
        kind = MachineError if error.errno in DISK_FULL else InputError
        raise kind(f"{path} cannot be read now ({error.strerror or error}); it was left as it is") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is damaged or no checkpoint ({error})") from None
    if schema > SCHEMA:
        raise InputError(f"{path} was written by a newer codistill (schema {schema}); upgrade codistill")
    state["file"] = str(path)
    return cast(CheckpointState, state)


def _verify_checksum(path: Path) -> bool:
    """Return whether a file ends in a checksum; raise ValueError if the checksum is wrong."""
    with open(path, "rb") as stream:
        length = os.fstat(stream.fileno()).st_size - 64
        stream.seek(max(length - len(_MARK), 0))
        tail = stream.read()
        if not tail.startswith(_MARK):
            return False
        stream.seek(0)
        digest, left = hashlib.sha256(), length
        while left and (part := stream.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    if tail[len(_MARK) :] != digest.hexdigest().encode():
        raise ValueError("its checksum does not match its content")
    return True


def _verify_without_checksum(path: Path, schema: int) -> None:
    """Raise ValueError if a file without a checksum should have one, or fails the CRC-32 sums of its zip archive."""
    if schema != 1:
        if schema <= SCHEMA:
            raise ValueError("its checksum is missing")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(first_line(error).rstrip(".")) from None
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not match its checksum")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the last*.pt files of a run folder, newest first."""
    numbered = {int(p.stem[5:]): p for p in folder.glob("last-*.pt") if re.fullmatch("[0-9]{1,9}", p.stem[5:])}
    newest = [folder / "last.pt"] if (folder / "last.pt").exists() else []
    return [*newest, *(numbered[n] for n in sorted(numbered))]


def rotate(folder: Path, keep: int) -> None:
    """Rename last.pt to last-1.pt, last-1.pt to last-2.pt and so on, of which `keep` - 1 files stay."""
    older = list_checkpoints(folder)
    for path in older[max(keep - 1, 0) :]:
        if path.name != "last.pt":  # the new last.pt replaces it
            path.unlink()
    for number, path in reversed([*enumerate(older[: keep - 1], 1)]):
        if path.name != f"last-{number}.pt":
            os.replace(path, folder / f"last-{number}.pt")


def load_newest(folder: Path, *, rename_damaged: bool = False) -> CheckpointState | None:
    """Return the newest good checkpoint of a run, with its path as `file`; None where there is none yet.

    Args:
        folder: The run folder.
        rename_damaged: Rename damaged ones to damaged-*.pt, so that they do not count among those kept.

    Raises:
        InputError: all are damaged, or the newest good one was written by a newer codistill.
    """
    damaged: list[tuple[Path, CorruptCheckpointError]] = []
    for path in list_checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except CorruptCheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            warnings.warn(f"{error}; the one before it is used", stacklevel=2)
            if rename_damaged:
                os.replace(bad, folder / f"damaged-{bad.name}")
        return state
    if damaged:
        raise InputError(f"{damaged[0][1]}, and the run has no other; train it again in another --out")
    return None


def load_run_checkpoint(folder: Path, checkpoint: Checkpoint = "last") -> CheckpointState:
    """Return a run's checkpoint: the newest good one, or the best on validation.

    Raises:
        InputError: it is missing or damaged.
    """
    if checkpoint == "best":
        if not (folder / "best.pt").exists():
            raise InputError(f"--checkpoint best: {folder} has no best.pt; only runs with a validation part keep one")
        return load_checkpoint(folder / "best.pt")
    return load_newest(folder) or load_checkpoint(folder / "last.pt")  # the latter raises: there is none


def rng_state() -> dict[str, Any]:
    """Return every random state as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    key_tensor = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, key_tensor, int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set every random state to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
