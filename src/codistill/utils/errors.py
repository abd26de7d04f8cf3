"""Errors that a command prints as one sentence, their exit codes, and helpers to word them. Imports no torch at start.

Exit codes: 2 for `InputError`, 1 for `MachineError`, 75 for `Stopped`. Of any other exception the traceback is written
to a file: 2 where code that the user has named raised it (a network or a method), 1 for a bug.
"""

from __future__ import annotations

import difflib
import errno
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence

_DEVICE_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
_HOST_MEMORY = ("not enough memory", "can't allocate memory")
_own_packages: set[str] = set()
"""Packages that were imported because the user has named them."""
_LIBRARIES = frozenset({"codistill", "torch", "torchvision", "timm", "transformers"})
"""Packages that are no user's own, though a user may name a network in them."""


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence that names the flag and the fix (exit code 2).

    >>> from codistill.config import Config
    >>> Config("okddip", peers=2).resolved()
    Traceback (most recent call last):
        ...
    codistill.utils.errors.InputError: ...
    """


class UnreadableError(InputError):
    """An image file cannot be read, possibly in the middle of a run; training then writes a checkpoint first."""


class MachineError(RuntimeError):
    """The machine or the run failed (disk full, out of memory, non-finite loss); one sentence (exit code 1).

    >>> try:
    ...     raise MachineError("the loss is not finite at step 3")
    ... except MachineError as error:
    ...     print(error)
    the loss is not finite at step 3
    """


class DecodingError(MachineError):
    """The processes that decode images failed in the middle of a run; training then writes a checkpoint first."""


class OtherRankFailedError(RuntimeError):
    """Another rank of the job failed and prints why; this one exits with the same code and prints nothing."""

    def __init__(self, code: int) -> None:
        super().__init__("another rank of the job failed and prints why")
        self.code = code


class Stopped(Exception):  # noqa: N818
    """A signal ended the run after a checkpoint was written (exit code 75); the message is the signal's name."""

    hint = "--resume auto"
    """How to continue."""

    def sentence(self) -> str:
        """Return what is printed."""
        return f"stopped by {self}; the checkpoint is written, continue with {self.hint}"


class StoppedEarly(Stopped):
    """A signal ended a command that had nothing to keep (exit code 75)."""

    def sentence(self) -> str:
        """Return what is printed."""
        return f"stopped by {self} before there was anything to keep; give the same command again"


def on_one_line(text: object) -> str:
    """Return text with every line break and control character replaced by a space, harmless in any terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message on one line, or the exception's class name where it has none."""
    lines = str(error).strip().splitlines()
    return on_one_line(lines[0]) if lines else type(error).__name__


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean "x"?)` for the nearest of `known`, or the list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else f" (there are: {', '.join(known)})"


def out_of_memory(error: Exception) -> str | None:
    """Return "the device" or "the machine" if the exception says that its memory ran out, else None."""
    import torch

    message = str(error) if isinstance(error, RuntimeError) else ""  # not every allocator has an exception of its own
    if isinstance(error, torch.OutOfMemoryError) or any(words in message for words in _DEVICE_MEMORY):
        return "the device"
    if isinstance(error, MemoryError) or any(words in message for words in _HOST_MEMORY):
        return "the machine"
    return None


def explain_failure(error: Exception) -> tuple[str | None, int]:
    """Return (sentence, exit code) for a known kind of failure, (None, exit code) for a bug or an error of own code."""
    if isinstance(error, Stopped):
        return error.sentence(), 75
    if (memory := out_of_memory(error)) is not None:
        other = ", or use --dtype bfloat16" if memory == "the device" else ""
        return f"{memory} is out of memory; lower --batch-size or --peers{other}", 1
    if type(error) is RuntimeError and "deterministic implementation" in str(error):
        operation = str(error).split(" does not")[0]
        return f"--deterministic: {operation} has no deterministic kernel on this device; drop --deterministic", 2
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many files are open; raise the limit (ulimit -n 1024), or give fewer --data-workers or --workers", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}", 1
    return None, 1 if _place_in_own_code(error) is None else 2


def note_own_code(module_name: str) -> None:
    """Record that the user has named a module, so that its exceptions are not taken for bugs of codistill."""
    package = module_name.partition(".")[0]
    if package not in _LIBRARIES:
        _own_packages.add(package)


def _place_in_own_code(error: BaseException) -> str | None:
    """Return where own code was when the exception was raised, in it or below it; None if none was running."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in _own_packages:
            place = f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}"
    return place


def describe_unexpected(error: BaseException, command: Sequence[str] = ()) -> str:
    """Write the traceback of a bug, or of an exception in own code, to a new file; return one sentence that names it.

    Args:
        error: The exception.
        command: The words of the command line, for the file.
    """
    text, place = "".join(traceback.format_exception(error)), _place_in_own_code(error)
    try:
        number, name = tempfile.mkstemp(prefix="codistill-error-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"codistill {shlex.join(command)}\nPython {sys.version}\n\n{text}")
        where = f"its traceback is in {name}{', please report it' if place is None else ''}"
    except OSError as failure:
        where = f"its traceback cannot be written ({failure.strerror}), --traceback shows it"
    what = "unexpected error, a bug in codistill" if place is None else f"your code fails at {on_one_line(place)}"
    return f"{what} ({type(error).__name__}: {first_line(error)}); {where}"
