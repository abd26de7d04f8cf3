"""A config as the shell command that trains it."""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

from codistill.config import Config, UnimportedConfig


def format_command(config: Config) -> str:
    r"""Return `codistill train ...` with every option that is not the default; it parses into the same config.

    Every word is quoted, since configs travel and this line is pasted into shells. A control character is written by
    its number (`$'\x1b'`, as bash, zsh and ksh read it): pasted as it is, it would be a key that edits the line.
    """
    words = ["codistill", "train", config.method.import_name or config.method.name]
    words += _to_flags(_fields(config), _fields(Config()), "--", skip="method")
    if isinstance(config.method, UnimportedConfig):
        words += _to_flags(config.method.options, {}, "--method.")
    else:
        words += _to_flags(_fields(config.method), _fields(type(config.method)()), "--method.")
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    r"""Return a word in quotes for the shell.

    >>> print(_quote("cat's"), _quote("a\x15b"))
    'cat'"'"'s' $'a\x15b'
    """
    if word.isprintable():
        return shlex.quote(word)
    shown = (
        c if c.isprintable() and c not in "'\\" else "".join(map("\\x{:02x}".format, os.fsencode(c))) for c in word
    )
    return f"$'{''.join(shown)}'"


def _fields(options: Any) -> dict[str, Any]:
    """Return the fields of a dataclass with their values."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _to_flags(values: dict[str, Any], defaults: dict[str, Any], prefix: str, skip: str = "") -> list[str]:
    """Return the flags of all options that differ from `defaults`, but for the option `skip`."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if name == skip or value == defaults.get(name) or value is None:
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
