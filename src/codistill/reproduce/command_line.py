"""A config as the shell command that trains it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from codistill.config.config import Config


def command_line(config: Config) -> str:
    """Return `codistill train ...` with every option that is not the default; it parses into the same config."""
    words = ["codistill", "train", config.method.name]
    words += _to_flags(config, Config(method=type(config.method)()), "--", skip="method")
    words += _to_flags(config.method, type(config.method)(), "--method.")
    return " ".join(word if word.startswith("--") else shlex.quote(word) for word in words)


def _to_flags(values: Any, defaults: Any, prefix: str, skip: str = "") -> list[str]:
    """Return the flags of all fields of a dataclass that differ from `defaults`, but for the field `skip`."""
    words: list[str] = []
    for field in dataclasses.fields(values):
        value, flag = getattr(values, field.name), field.name.replace("_", "-")
        if field.name == skip or value == getattr(defaults, field.name) or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"{prefix}{'' if value else 'no-'}{flag}")
        elif isinstance(value, tuple):
            words += [f"{prefix}{flag}", *map(str, value)] if value else []
        else:
            words += [f"{prefix}{flag}", f"{value}"]
    return words
