"""A checkpoint as a file: tensors and plain values with every random state, a schema, and a checksum of itself.

The SHA-256 of all that comes before it stands in the comment at the archive's end, which torch passes over. It is part
of the file, so that it travels with it and is written in the same atomic step; torch itself does not notice flipped
bits. last.pt is the newest, last-1.pt the one before, and so on; best.pt is the best on validation.
Schema 1 had no checksum.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from codistill.config.config import Checkpoint
from codistill.utils.errors import InputError
from codistill.utils.safe_load import load_tensors

SCHEMA = 2
_MARK = b"codistill sha256 "
_COMMENT = len(_MARK) + 64


class CorruptCheckpointError(InputError):
    """A checkpoint is truncated, has flipped bits or is none; an older one may do."""


class _Hashed:
    """Passes on what is written and hashes it; the last two bytes, the length of the archive's comment, are held."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.held = stream, hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self.held + bytes(view))
        else:
            self._pass(self.held)
        self._pass(view[:-2])
        self.held = bytes(view[-2:])
        return len(data)

    def flush(self) -> None:
        """Do nothing yet: `end` is still to come."""

    def end(self) -> None:
        self._pass(_COMMENT.to_bytes(2, "little") + _MARK)
        self.stream.write(self.digest.hexdigest().encode())

    def _pass(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.stream.write(data)


def write_checkpoint(state: dict[str, Any], stream: IO[bytes]) -> None:
    """Write a state with this process's random states; the checksum comes last."""
    hashed = _Hashed(stream)
    torch.save({"schema": SCHEMA, **state, "rng": rng_state()}, hashed)  # pyrefly: ignore
    hashed.end()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        DamagedError: it is damaged or no checkpoint.
        InputError: it is missing, or was written by a newer codistill.
    """
    try:
        summed = _holds_checksum(path)
        state = load_tensors(path)
        if not isinstance(state, dict) or not isinstance(state.get("schema"), int):
            raise ValueError("it is no checkpoint of codistill")
        if not summed:
            _check_older(path, state["schema"])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; is {path.parent} a run folder whose training has begun?") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CorruptCheckpointError(f"{path} is damaged or no checkpoint ({error})") from None
    if state["schema"] > SCHEMA:
        raise InputError(f"{path} was written by a newer codistill (schema {state['schema']}); upgrade codistill")
    return state


def _holds_checksum(path: Path) -> bool:
    """Say whether a file ends in a checksum, and raise ValueError where it is not the file's."""
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
        raise ValueError("its checksum does not fit its content")
    return True


def _check_older(path: Path, schema: int) -> None:
    """Raise ValueError where a file without a checksum should have one, or differs from the sums that zip keeps."""
    if schema != 1:
        if schema <= SCHEMA:
            raise ValueError("its checksum is missing")
        return
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"{bad} in it does not fit its checksum")


def checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoints, the newest first."""
    numbered = {int(p.stem[5:]): p for p in folder.glob("last-*.pt") if p.stem[5:].isdecimal()}
    newest = [folder / "last.pt"] if (folder / "last.pt").exists() else []
    return [*newest, *(numbered[n] for n in sorted(numbered))]


def shift(folder: Path, keep: int) -> None:
    """Make room for a new last.pt: each kept checkpoint gets the next number, and `keep` - 1 of them stay."""
    older = checkpoints(folder)
    for path in older[max(keep - 1, 0) :]:
        if path.name != "last.pt":  # that one is replaced by its successor
            path.unlink()
    for number, path in reversed([*enumerate(older[: keep - 1], 1)]):
        if path.name != f"last-{number}.pt":
            os.replace(path, folder / f"last-{number}.pt")


def load_newest(folder: Path, set_aside: bool = False) -> dict[str, Any] | None:
    """Return the newest good checkpoint of a run, its path under `file`; None where there is none yet.

    Args:
        folder: The run folder.
        set_aside: Give damaged ones another name, so that they take no good one's place.

    Raises:
        InputError: all are damaged, or the newest good one was written by a newer codistill.
    """
    damaged: list[tuple[Path, CorruptCheckpointError]] = []
    found = checkpoints(folder)
    for path in found:
        try:
            state = load_checkpoint(path)
        except CorruptCheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:
            warnings.warn(f"{error}; the one before it is used", stacklevel=2)
            if set_aside:
                os.replace(bad, folder / f"damaged-{bad.name}")
        return state | {"file": str(path)}
    if damaged:
        raise InputError(f"{damaged[0][1]}, and the run holds no other; train it anew in another --out")
    return None


def load_state(path: Path, checkpoint: Checkpoint = "last") -> dict[str, Any]:
    """Return a run's checkpoint: the newest good one, or the best on validation.

    Raises:
        InputError: it is missing or damaged.
    """
    if checkpoint == "best":
        if not (path / "best.pt").exists():
            raise InputError(f"--checkpoint best: {path} has no best.pt; only runs with a validation part keep one")
        return load_checkpoint(path / "best.pt")
    return load_newest(path) or load_checkpoint(path / "last.pt")  # which says that there is none


def rng_state() -> dict[str, Any]:
    """Return every random state as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put every random state back."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        for index, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
