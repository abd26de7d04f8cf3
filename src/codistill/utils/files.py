"""The JSON files that runs and grids keep: read with one sentence for whatever is wrong with them. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from codistill.utils.errors import InputError, MachineError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


def write_atomically(path: Path, write: Callable[[Any], object], before: Callable[[], object] = lambda: None) -> None:
    """Write a file so that a reader finds the old or the new one whole, whatever happens.

    Args:
        path: The file.
        write: Writes to the stream that it is given.
        before: Called once all is written, just before the file takes its name.

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
        before()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise MachineError(f"cannot write {path}: {error.strerror or error}; what was there is kept") from None
    with suppress(OSError):  # the name is on the disk only when its folder is; some systems cannot do that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def _locked(stream: IO[str]) -> bool:
    """Lock a file for this process, and say whether that went; where files cannot be locked, it does."""
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that a kill left unfinished is dropped."""
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


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """Return what a file holds, None where there is none.

    Args:
        path: The file.
        keys: What it must name.

    Raises:
        InputError: it is damaged, or lacks something.
    """
    try:
        held = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); put it back as it was, or train in another --out") from None
    lacking = [key for key in keys if key not in held] if isinstance(held, dict) else ["braces around what it says"]
    if lacking:
        raise InputError(f"{path} is damaged (it lacks {lacking[0]}); put it back as it was, or train in another --out")
    return held
