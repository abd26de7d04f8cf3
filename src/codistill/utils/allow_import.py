"""Names that stand for code: `package.module:callable` is imported and run, and configs and run folders travel.

A name that a person types or passes is imported. A name that only a file contains is imported if the command line
repeats it as the value of an option that names networks, or has `--allow-import`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from codistill.utils.errors import InputError

FLAG = "--allow-import"
_NETWORK_FLAGS = {"--model": None, "--method.teacher-model": 1}
"""Options whose values are names of networks, and how many values follow each: None is any number."""
_LIBRARIES = ("timm", "torchvision", "hf")
# Options with which a library runs code, or unpickles a file; the last names files for timm to load.
_RUN_CODE = ("trust_remote_code", "checkpoint_path", "pretrained_cfg")
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
def command_line(argv: Sequence[str]) -> Iterator[list[str]]:
    """Allow the networks that a command line names while the context lasts; yield it without `--allow-import`."""
    with use_policy(ImportPolicy(_named_networks(argv), allow_all=FLAG in argv)):
        yield [word for word in argv if word != FLAG]


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
