"""The published numbers of the papers' tables, each with its source; paper_tables.json is part of the package."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from codistill.utils.errors import InputError, suggest


@functools.cache
def published_tables() -> dict[str, dict[str, Any]]:
    """Return all tables: paper, place, data, measure (accuracy or error), source, note, and rows[row][column]."""
    return json.loads(resources.files("codistill.reproduce").joinpath("paper_tables.json").read_text())


def published_table(name: str) -> dict[str, Any]:
    """Return one table.

    Raises:
        InputError: there is no table of that name.
    """
    tables = published_tables()
    if name not in tables:
        raise InputError(f'reproduce: there is no table "{name}"{suggest(name, tables)}')
    return tables[name]
