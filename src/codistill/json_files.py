"""The JSON files that runs and grids keep: read with one sentence for whatever is wrong with them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codistill.errors import InputError


def read_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """Return what a file holds, None where there is none.

    Args:
        path: The file.
        keys: What it must name.

    Raises:
        InputError: it is damaged, or lacks something.
    """
    try:
        held = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); put it back as it was, or train in another --out") from None
    lacking = [key for key in keys if key not in held] if isinstance(held, dict) else ["braces around what it says"]
    if lacking:
        raise InputError(f"{path} is damaged (it lacks {lacking[0]}); put it back as it was, or train in another --out")
    return held
