"""What can go wrong, as the user is told: one sentence that names the flag and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence that names the flag and the mend (exit code 2)."""


class UnreadableError(InputError):
    """An image file cannot be read, perhaps in the middle of a run; whoever trains keeps what was reached."""


class MachineError(RuntimeError):
    """The machine or the run failed (disk full, out of memory, non-finite loss); one sentence (exit code 1)."""


class OtherRankFailedError(RuntimeError):
    """Another rank of the job failed and says why; this one ends in silence, with the same exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("another rank of the job failed and says why")
        self.code = code


def on_one_line(text: object) -> str:
    """Return text without line breaks and without characters that a terminal would obey."""
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
