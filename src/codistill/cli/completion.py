"""Completion in a shell, whose script calls `codistill _complete WORDS` for the candidates. Imports no torch."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from codistill.cli.options import COMMANDS
from codistill.config import METHODS

SCRIPTS = {
    "bash": """_codistill() {
    local IFS=$'\\n'
    COMPREPLY=($(codistill _complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _codistill codistill
""",
    "zsh": """#compdef codistill
_codistill() {
    local -a found
    found=("${(@f)$(codistill _complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _codistill codistill
""",
    "fish": """complete -c codistill -a '(codistill _complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
""",
}
"""A script for each shell."""
DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder:", "npz:")
MODELS = (
    *("resnet8", "resnet20", "resnet32", "resnet56", "resnet110", "resnet110_basic", "wrn16_2", "wrn40_2", "wrn20_8"),
    *(
        "vgg16",
        "vgg19",
        "vgg16_no_dropout",
        "vgg19_no_dropout",
        "densenet40_12",
        "densenet40_12_plain",
        "densenet100_12",
    ),
    *("timm:", "torchvision:", "hf:"),
)
"""Written out, because importing the networks imports torch."""
LISTS = ("methods", "models", "data", "tables", "branch-points")
EXTRA_FLAGS = {
    "train": ("--config", "--seeds", "--dry-run", "--recipe", "--help-all"),
    "compare": ("--recipe", "--help-all"),
}


def complete(words: Sequence[str]) -> list[str]:
    """Return what the last word of a command line can become; nothing where a file may stand.

    Args:
        words: The words after `codistill`, the last of them incomplete or empty.

    >>> complete(["tr"]), complete(["train", "okdd"]), complete(["train", "okddip", "--opti"])
    (['train'], ['okddip'], ['--optimizer'])
    >>> complete(["train", "okddip", "--optimizer", ""]), complete(["evaluate", "ru"])
    (['sgd', 'adamw'], [])
    """
    *before, last = words or [""]
    if not before:
        candidates: Sequence[str] = [*COMMANDS, "--help", "--version"]
    elif before[0] not in COMMANDS:
        candidates = ()
    elif last.startswith("-"):
        candidates = [*_fields_of(before), *EXTRA_FLAGS.get(before[0], ()), "--help", "--traceback"]
    else:
        candidates = _values_after(before)
    return [candidate for candidate in candidates if candidate.startswith(last)]


def _fields_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the types of a command's options by their flags, with the options of the method that `train` names."""
    options = COMMANDS[words[0]].options()
    types = {f"--{name.replace('_', '-')}": hint for name, hint in _types_of(options).items() if name != "method"}
    if words[0] == "train" and len(words) > 1 and words[1] in METHODS:
        own = _types_of(METHODS[words[1]]())
        types |= {f"--method.{name.replace('_', '-')}": hint for name, hint in own.items()}
    switches = [flag for flag, hint in types.items() if hint is bool]
    return types | {flag.replace("--", "--no-", 1): bool for flag in switches}


def _types_of(options: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(type(options))
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def _values_after(words: Sequence[str]) -> Sequence[str]:
    """Return the words that can follow: values of the last option, or positional arguments."""
    command, previous = words[0], words[-1]
    if previous.startswith("--"):
        known = {"--recipe": ("auto", "paper"), "--data": DATA, "--model": MODELS, "--network": MODELS}
        return known.get(previous) or _choices(_fields_of(words).get(previous))
    if any(word.startswith("-") for word in words):
        return ()
    if command == "train":
        return [*METHODS] if len(words) == 1 else ()
    if command == "compare":
        return [name for name in METHODS if name not in words]
    if command == "reproduce" and len(words) == 1:
        from codistill.reproduce import TABLES

        return [*TABLES]
    return {"list": LISTS, "completion": [*SCRIPTS]}.get(command, ()) if len(words) == 1 else ()


def _choices(hint: Any) -> Sequence[str]:
    """Return the values of a Literal, also within Optional and Annotated."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]
