"""The outcome of one run of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codistill.config import Config
from codistill.utils import InputError

RunOutcome = tuple[dict[str, Any] | None, str | None]
"""(the contents of result.json, None), or (None, the reason why there is no result)."""


def read_outcome(config: Config) -> RunOutcome | None:
    """Return the outcome of a complete run, or why its folder belongs to another config; None if it is not complete."""
    path = Path(str(config.out)) / "result.json"
    if not path.exists():
        return None
    from codistill.runs import RunFolder

    try:
        folder = RunFolder(config)  # raises if it was written with other options
        result = folder.read_result()
        return None if result is None else ({**result}, None)
    except InputError as error:
        return None, str(error)
