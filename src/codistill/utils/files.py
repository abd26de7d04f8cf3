"""Atomic writes, JSON files with a one-sentence error for whatever is wrong with them, and file locks. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from codistill.utils.errors import InputError, MachineError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}
"""Error numbers of a full or failing disk."""


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], before_rename: Callable[[], object] = lambda: None
) -> None:
    """Write a file so that a reader finds either the old one or the new one, complete, even after a crash.

    Args:
        path: The file.
        write: Writes the content to the binary stream it is given.
        before_rename: Called when all is written, just before the file gets its name.

    Raises:
        MachineError: the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        before_rename()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise MachineError(f"cannot write {path}: {error.strerror or error}; no existing file was changed") from None
    with suppress(OSError):  # the name is on the disk only when its folder is; some systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically; figures that are not finite are written as null."""
    write_text(path, json.dumps(finite_or_null(values), indent=2, allow_nan=False) + "\n")


def finite_or_null(values: Any) -> Any:
    """Return plain values with None in place of NaN and infinities, for which JSON has no spelling.

    >>> finite_or_null({"top1": [10.0, float("nan")]})
    {'top1': [10.0, None]}
    """
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: finite_or_null(value) for key, value in values.items()}
    return [finite_or_null(value) for value in values] if isinstance(values, list | tuple) else values


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file.

    Args:
        path: The file.
        keys: Keys that the object must have.

    Raises:
        InputError: the file is damaged, or a key is missing.
    """
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or train in another --out") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged (it holds no JSON object); restore it, or train in another --out")
    missing = [key for key in keys if key not in values]
    if missing:
        raise InputError(f'{path} is damaged ("{missing[0]}" is missing); restore it, or train in another --out')
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that a killed process left unfinished is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


class LockedError(RuntimeError):
    """Another process holds the lock; the message names it, and is empty where the lock file does not say."""


_locks: set[IO[str]] = set()
"""Streams of the locks that this process holds."""


def _close_inherited_locks() -> None:
    """Close a forked child's copies: a data worker may outlive its trainer, and must not keep its folder locked.

    The parent keeps its lock: closing one of several copies releases nothing.
    """
    while _locks:
        with suppress(OSError):
            _locks.pop().close()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_close_inherited_locks)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it when the process dies, however that happens.

    Where files cannot be locked (no POSIX, some network file systems) nothing is locked.

    Args:
        path: The lock file, created where needed; it gets the process's number and its host.
        wait: Wait until the lock is free.

    Raises:
        LockedError: another process holds it, and `wait` is not set.
        OSError: the file cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as stream:
        while not _try_lock(stream):
            if not wait:
                stream.seek(0)
                raise LockedError(stream.read().strip())
            time.sleep(1.0)
        with suppress(OSError):  # a full disk: the name is only for the message
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()}\n")
            stream.flush()
        _locks.add(stream)
        try:
            yield
        finally:
            _locks.discard(stream)


def _try_lock(stream: IO[str]) -> bool:
    """Lock a file for this process; return False if another process holds the lock."""
    try:
        import fcntl
    except ImportError:  # no POSIX
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
