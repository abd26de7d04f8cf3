"""Atomic writes, JSON files with a one-sentence error for whatever is wrong with them, and file locks. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import secrets
import stat
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
        InputError: the name is that of a folder or of no regular file, such as /dev/null, which would be replaced.
        MachineError: the disk is full or the folder cannot be written to.
    """
    check_regular(path)
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


MAX_BYTES = 256 * 2**20
"""Size of the largest text file that is read: far above that of any file of a run."""


def check_regular(path: Path) -> bool:
    """Return whether a file exists; anything that is no regular file is refused, since opening it may wait forever.

    Raises:
        InputError: it is a folder, FIFO, socket or device, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"{path} is {kind}; name a file")
    return True


def read_file(path: Path) -> bytes | None:
    """Return the content of a text file, None if there is no file.

    Raises:
        InputError: it is no regular file, is larger than any file of a run, or may not be read.
        MachineError: the disk fails.
    """
    if not check_regular(path):
        return None
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        kind = MachineError if error.errno in DISK_FULL else InputError
        raise kind(f"{path} cannot be read now ({error.strerror or error}); it was left as it is") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES:,} bytes, which no file of a run is")
    return data


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file.

    Raises:
        InputError: the file is damaged or cannot be read.
    """
    data = read_file(path)
    if data is None:
        return None
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it, or train in another --out") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged (it holds no JSON object); restore it, or train in another --out")
    return values


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
def lock(path: Path, *, wait: bool = False) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file and yield it; the system releases it when the process dies in any way.

    Where files cannot be locked (no POSIX, some network file systems) nothing is locked.

    Args:
        path: The lock file, created where needed; it gets the process's number and its host.
        wait: Wait until the lock is free.

    Raises:
        LockedError: another process holds it, and `wait` is not set.
        InputError: it is a link, whose target would be written to, or no regular file.
        OSError: the file cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is {'a link' if path.is_symlink() else 'no regular file'}; remove it")
    with open(path, "a+", opener=_open_no_link) as stream:
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
            yield stream
        finally:
            _locks.discard(stream)


def _open_no_link(file: str, flags: int) -> int:
    """Open a file, not one that a link names which was put there meanwhile."""
    return os.open(file, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def is_same_file(stream: IO[Any], path: Path) -> bool:
    """Return whether a path still names an open file: it may have been deleted, renamed or replaced."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except OSError:
        return False


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
