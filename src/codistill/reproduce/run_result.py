"""What a run of a grid comes back with: its figures, or why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from codistill.config.config import Config
from codistill.utils.errors import InputError
from codistill.utils.files import read_json

RunOutcome = tuple[dict[str, Any] | None, str | None]


def finished(config: Config) -> RunOutcome | None:
    """Return the answer of a run that is complete, or why the folder cannot be this run's; else None."""
    path = Path(str(config.out)) / "result.json"
    if not path.exists():
        return None
    from codistill.runs.run_folder import RunFolder

    try:
        RunFolder(config)  # checked against the config as any continuation is
        return read_json(path, "test", "student"), None
    except InputError as error:
        return None, str(error)
