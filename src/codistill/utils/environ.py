"""Numbers that a launcher puts into the environment, and what processes that start get from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from codistill.utils.errors import InputError


def environment_number(name: str, default: int, minimum: int = 0) -> int:
    """Return a whole number from the environment, `default` where the variable is missing or empty.

    Raises:
        InputError: it is no whole number, or less than `minimum`.
    """
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < minimum:
        raise InputError(
            f"the environment variable {name} is {text!r} and must be a whole number from {minimum} on; unset it, or "
            "start with torchrun, which sets it"
        )
    return int(text)


_SAFE_PATH = "PYTHONSAFEPATH"


@contextmanager
def safe_import_path() -> Iterator[None]:
    """Keep the working folder out of what a Python process that is started in the context imports from.

    The folder may hold anybody's file that is called like one of Python's own (`signal.py`). Networks and methods of
    one's own are found there all the same (`import_object`).
    """
    is_set = _SAFE_PATH in os.environ
    os.environ.setdefault(_SAFE_PATH, "codistill")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[_SAFE_PATH]


def leave_safe_import_path() -> None:
    """Let programs that the user's code starts in a process from `safe_import_path` find their modules as usual."""
    if os.environ.get(_SAFE_PATH) == "codistill":
        del os.environ[_SAFE_PATH]
