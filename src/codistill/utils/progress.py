"""Showing how far a long loop has come; the command line sets what shows it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Display = Callable[[Sequence[Any], str], Iterator[Any]]

_display: Display | None = None


def set_progress_display(display: Display | None) -> None:
    """Set what shows the progress of `track`: a function of the items and a description that yields the items."""
    global _display
    _display = display


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items, and show how many are done where a display is set.

    >>> [*track([1, 2], "counting")]
    [1, 2]
    """
    return iter(items) if _display is None else _display(items, description)
