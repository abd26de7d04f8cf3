"""A config as the shell command that trains it."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from codistill.config import Config


def format_command(config: Config) -> str:
    """Return `codistill train ...` with every option that is not the default; it parses into the same config.

    Every word is quoted, since configs travel and this line is pasted into shells.
    """
    words = ["codistill", "train", config.method.name]
    words += _to_flags(config, Config(method=type(config.method)()), "--", skip="method")
    words += _to_flags(config.method, type(config.method)(), "--method.")
    return shlex.join(words)


def _to_flags(values: Any, defaults: Any, prefix: str, skip: str = "") -> list[str]:
    """Return the flags of all fields of a dataclass that differ from `defaults`, but for the field `skip`."""
    words: list[str] = []
    for field in dataclasses.fields(values):
        value, flag = getattr(values, field.name), field.name.replace("_", "-")
        if field.name == skip or value == getattr(defaults, field.name) or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"{prefix}{'' if value else 'no-'}{flag}")
            continue
        texts = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
        if any(text.startswith("-") for text in texts):  # would be read as an option
            words += [f"{prefix}{flag}={text}" for text in texts]
        elif texts:
            words += [f"{prefix}{flag}", *texts]
    return words
