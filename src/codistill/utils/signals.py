"""Catches SIGTERM, SIGINT and SIGUSR1, so that a run ends in order with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Yield a list that gets the names of the signals received meanwhile; a second SIGINT raises KeyboardInterrupt."""
    caught: list[str] = []
    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, n)]

    def record_signal(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    try:
        handlers = {number: signal.signal(number, record_signal) for number in numbers}
    except ValueError:  # only the main thread may set handlers; here another one handles signals
        handlers = {}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
