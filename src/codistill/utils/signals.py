"""Ends a run in order when the machine or the user asks for it: SIGTERM, SIGINT, SIGUSR1."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):  # noqa: N818
    """A signal ended the run after a checkpoint was written (exit code 75)."""

    mend = "--resume auto"
    """How to go on, in words."""


@contextmanager
def caught_signals() -> Iterator[list[str]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 while training; a second SIGINT ends at once."""
    caught: list[str] = []
    names = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]

    def note(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in names}
    except ValueError:  # not the main thread: whoever runs this thread handles signals
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
