"""The outcome of one run of a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codistill.config.config import Config
from codistill.utils.errors import InputError
from codistill.utils.files import read_json

RunOutcome = tuple[dict[str, Any] | None, str | None]
"""(the contents of result.json, None), or (None, the reason why there is no result)."""


def read_outcome(config: Config) -> RunOutcome | None:
    """Return the outcome of a complete run, or why its folder belongs to another config; None if it is not complete."""
    path = Path(str(config.out)) / "result.json"
    if not path.exists():
        return None
    from codistill.runs.run_folder import RunFolder

    try:
        RunFolder(config)  # raises if the folder was written with other options
        return read_json(path, "test", "student"), None
    except InputError as error:
        return None, str(error)
