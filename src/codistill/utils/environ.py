"""Numbers that a launcher puts into the environment."""

from __future__ import annotations

import os

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
