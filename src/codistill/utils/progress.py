"""Showing how far a long loop has come; the command line sets what shows it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Display = Callable[[Sequence[Any], str], Iterator[Any]]

_display: Display | None = None
_shown: list[Iterator[Any]] = []
"""The displays that were begun, the innermost last."""


def set_progress_display(display: Display | None) -> None:
    """Set what shows the progress of `track`: a function of the items and a description that yields the items."""
    global _display
    _display = display


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items, and show how many are done where a display is set.

    >>> [*track([1, 2], "counting")]
    [1, 2]
    """
    if _display is None:
        return iter(items)
    _shown.append(_display(items, description))
    return _shown[-1]


def end_displays() -> None:
    """End the displays that an exception has left open: a terminal would keep its cursor hidden."""
    while _shown:
        if isinstance(shown := _shown.pop(), Generator):
            shown.close()
