"""What SIGTERM, SIGINT, SIGUSR1 and SIGHUP do: recorded within the epochs, elsewhere they end the command in order.

Signals that were ignored when the process began (nohup ignores SIGHUP) stay ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_caught: list[list[str]] = []
"""The lists of `catch_signals` that are being filled, the innermost last."""


class SignalReceived(BaseException):
    """A signal arrived where nothing has to be written before the process ends; the message is its name."""


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Yield a list that gets the names of the signals received meanwhile; a second SIGINT raises KeyboardInterrupt."""
    caught: list[str] = []

    def record_signal(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    _caught.append(caught)
    try:
        with _handlers(record_signal, "SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            yield caught
    finally:
        _caught.pop()


def pending_signal() -> str | None:
    """Return the name of a signal that `catch_signals` has recorded and that has not ended anything yet."""
    return next((caught[0] for caught in _caught if caught), None)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise SignalReceived where SIGTERM, SIGUSR1 or SIGHUP arrives; SIGINT raises KeyboardInterrupt as usual."""

    def raise_signal(number: int, _frame: object) -> None:
        raise SignalReceived(signal.Signals(number).name)

    with _handlers(raise_signal, "SIGTERM", "SIGUSR1", "SIGHUP"):
        yield


@contextmanager
def ignore_interrupt() -> Iterator[None]:
    """Ignore SIGINT; a process that is started meanwhile ignores it from its first instruction on."""
    with _handlers(signal.SIG_IGN, "SIGINT"):
        yield


@contextmanager
def _handlers(handler: Callable[[int, object], None] | signal.Handlers, *names: str) -> Iterator[None]:
    """Set a handler for the named signals of this system that are not ignored."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    except ValueError:  # only the main thread may set handlers; here another one handles signals
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
