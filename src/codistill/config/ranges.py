"""The ranges of numeric options, written beside the fields: `epochs: Annotated[int, AT_LEAST_1] = 300`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from codistill.utils import InputError

LIMIT = 2**31
"""Integers of this size or more are refused everywhere."""


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option accepts: `words` for the error message, `accepts` for the check."""

    words: str
    accepts: Callable[[float], bool] = lambda _: True


ABOVE_0 = Range("a number above 0", lambda number: number > 0)
AT_LEAST_0 = Range("0 or more", lambda number: number >= 0)
AT_LEAST_1 = Range("at least 1", lambda number: number >= 1)
AT_LEAST_1_SECOND = Range("1 second or more", lambda number: number >= 1)
EACH_AT_LEAST_0 = Range("0 or more, each", lambda number: number >= 0)
EACH_AT_LEAST_1 = Range("1 or more, each", lambda number: number >= 1)
FROM_0_TO_1000 = Range("from 0 to 1,000", lambda number: 0 <= number <= 1000)
FROM_8_TO_4096 = Range("from 8 to 4,096", lambda number: 8 <= number <= 4096)
FROM_0_TO_1 = Range("from 0 to 1", lambda number: 0 <= number <= 1)
FROM_0_BELOW_1 = Range("from 0 to below 1", lambda number: 0 <= number < 1)
FROM_8_TO_16 = Range("from 8 to 16", lambda number: 8 <= number <= 16)
BETWEEN_0_AND_1 = Range("a number between 0 and 1", lambda number: 0 < number < 1)
FINITE = Range("a number")
SEED = Range(f"from 0 to {LIMIT - 1}", lambda number: 0 <= number < LIMIT)


def check_ranges(options: Any, prefix: str = "") -> None:
    """Check every number of a dataclass against the `Range` of its field; None is always accepted.

    Raises:
        InputError: a number is out of its range; the message names the flag, which starts with `prefix`.
    """
    for name, ranges in _ranges_of(type(options)).items():
        value = getattr(options, name)
        flag = f"--{prefix}{name.replace('_', '-')}"
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)]
        if any(isinstance(number, int) and abs(number) >= LIMIT for number in numbers):
            raise InputError(f"{flag} is out of range; give a number below 2^31")
        for allowed in ranges:
            if not all(math.isfinite(number) and allowed.accepts(number) for number in numbers):
                raise InputError(f"{flag} is {value}; give {allowed.words}")


@functools.cache
def _ranges_of(options: type) -> dict[str, list[Range]]:
    """Return the ranges in the annotation of each field."""
    hints = get_type_hints(options, include_extras=True)
    return {
        field.name: [extra for extra in getattr(hints[field.name], "__metadata__", ()) if isinstance(extra, Range)]
        for field in dataclasses.fields(options)
    }
