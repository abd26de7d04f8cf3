"""Names that stand for code: `package.module:callable` is imported and run, and configs and run folders travel.

A name that a person types or passes is imported. A name that only a file contains is imported if the command line
repeats it as the value of an option that names networks, or has `--allow-import`. Imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from codistill.utils.errors import InputError, first_line, note_own_code

FLAG = "--allow-import"
_NETWORK_FLAGS = {"--model": None, "--method.teacher-model": 1}
"""Options whose values are names of networks, and how many values follow each: None is any number."""
_LIBRARIES = ("timm", "torchvision", "hf")
# Options with which a library runs code, or unpickles a file; the last names files for timm to load.
# The implementations may be kernels of the Hub, which are programs.
_RUN_CODE = ("trust_remote_code", "checkpoint_path", "pretrained_cfg", "attn_implementation", "experts_implementation")
# Networks that codistill used to build itself, and that run folders name by their function.
_OLD_NETWORKS = {
    f"{module}:mobilenet_v2_{suffix}": f"torchvision:mobilenet_v2,width_mult={width}"
    for module in ("codistill.recipes.networks", "codistill.reproduce.recipes.networks")
    for suffix, width in (("x0_5", 0.5), ("x1_2", 1.2))
}


def current_network_name(name: str) -> str:
    """Return today's name of a network that run folders may hold under another one.

    >>> current_network_name("codistill.recipes.networks:mobilenet_v2_x0_5")
    'torchvision:mobilenet_v2,width_mult=0.5'
    """
    return _OLD_NETWORKS.get(name, name)


@dataclass(frozen=True)
class ImportPolicy:
    """The names that this process may import."""

    allowed_names: frozenset[str] = frozenset()
    """The networks that the command line names."""
    allow_all: bool = False


_policy = ImportPolicy()


@contextmanager
def command_line(argv: Sequence[str], *, names_methods: bool = False) -> Iterator[list[str]]:
    """Allow the networks and methods that a command line names while the context lasts; yield it without the flag.

    Args:
        argv: The words after the command.
        names_methods: Whether the words before the first option are methods (`train`, `compare`).

    Raises:
        InputError: the flag may be the name of a file, which a shell's wildcard put there.
    """
    options = [*takewhile(lambda word: word != "--", argv)]  # what follows are names of files
    names = _named_networks(options)
    if names_methods:
        names |= frozenset(takewhile(lambda word: not word.startswith("-"), options))
    if FLAG in options and os.path.lexists(FLAG):
        raise InputError(
            f"a file in this folder is called {FLAG}, so a wildcard may have put this option there; remove the file, "
            "or give the command in another folder"
        )
    with use_policy(ImportPolicy(names, allow_all=FLAG in options)):
        yield [word for word in options if word != FLAG] + [*argv[len(options) :]]


def _named_networks(argv: Sequence[str]) -> frozenset[str]:
    """Return the values of the options that name networks; no other word counts, since a shell may have filled it in.

    >>> sorted(_named_networks(["predict", "run", "a:b", "--model", "c:d", "e:f", "--out", "g:h", "--model=i:j"]))
    ['c:d', 'e:f', 'i:j']
    """
    names: set[str] = set()
    left: float = 0  # values that may still follow the last option
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("-"):
            flag = flag.replace("_", "-")
            limit = _NETWORK_FLAGS[flag] or float("inf") if flag in _NETWORK_FLAGS else 0
            names |= {value} if limit and equals else set()
            left = limit - bool(equals)
        elif left > 0:
            names.add(word)
            left -= 1
    return frozenset(names)


def current_policy() -> ImportPolicy:
    """Return the policy of this process, for a process that it starts."""
    return _policy


@contextmanager
def use_policy(policy: ImportPolicy) -> Iterator[None]:
    """Use another policy while the context lasts: the parent process's, for example."""
    global _policy
    before, _policy = _policy, policy
    try:
        yield
    finally:
        _policy = before


def is_user_code(name: str) -> bool:
    """Return whether building the network of this name runs code that comes neither with codistill nor with a library.

    >>> [is_user_code(name) for name in ("resnet32", "timm:resnet18", "mine:net", "hf:x,trust_remote_code=True")]
    [False, False, True, True]
    """
    kind, colon, rest = current_network_name(name).partition(":")
    return bool(colon) and (kind not in _LIBRARIES or any(option in rest for option in _RUN_CODE))


def check_imports(names: Iterable[str], source: object, allow: bool = False, known: Iterable[str] = ()) -> None:
    """Refuse code that only a file names.

    Args:
        names: Names of networks in the file.
        source: The file, for the error message.
        allow: Whether the caller wants all of it to run.
        known: Names that the caller has from elsewhere.

    Raises:
        InputError: a name would run code, and nobody asked for that.
    """
    trusted = _policy.allowed_names | {*known}
    for name in names:
        if is_user_code(name) and name not in trusted and not (allow or _policy.allow_all):
            raise InputError(
                f"{source} names code to import and run, {name}; if you trust it, add {FLAG} (in training, "
                f"--model {name} repeats it)"
            )


def check_method_import(name: str, source: object, allow: bool = False, known: Iterable[str] = ()) -> None:
    """Refuse the code of an own method (package.module:Class) that only a file names; the arguments of check_imports.

    Raises:
        InputError: nobody asked for that code.
    """
    if not (allow or _policy.allow_all or name in _policy.allowed_names or name in {*known}):
        raise InputError(
            f"{source} names code to import and run, {name}; if you trust it, add {FLAG} (in training, naming the "
            f"method repeats it: train {name})"
        )


def import_object(module_name: str, attribute: str, given: str, hint: Callable[[str], str] = lambda _: "") -> Any:
    """Import an attribute of a module; modules of the working folder are found too, as with `python -m`.

    Args:
        module_name: The name before the colon.
        attribute: The name after it.
        given: What the user wrote, for messages: `--model a:b`.
        hint: Completes the message about a module that does not exist; gets the module's name.

    Raises:
        InputError: there is no such module, it needs another one, or it has no such attribute.
    """
    folder = str(Path.cwd())
    note_own_code(module_name)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not (module_name + ".").startswith(error.name + "."):
            raise InputError(f"{given}: {module_name} needs {error.name}, which is not installed") from None
        raise InputError(f'{given}: there is no module "{module_name}"{hint(module_name)}') from None
    except (Exception, SystemExit) as error:  # the module's own code may raise anything
        raise InputError(f"{given}: importing {module_name} fails ({first_line(error)}); fix it") from error
    finally:
        sys.path.remove(folder)
    if not callable(found := getattr(module, attribute, None)):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.6)
        raise InputError(
            f'{given}: {module_name} has no callable "{attribute}"' + (f' (did you mean "{near[0]}"?)' if near else "")
        )
    return found
