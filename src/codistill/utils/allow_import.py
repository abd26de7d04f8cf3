"""Names that stand for code: `package.module:callable` is imported and run, and configs and run folders travel.

What a person types or passes is run. What only a file says is run where the command line repeats it, or has
`--allow-import`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from codistill.utils.errors import InputError

FLAG = "--allow-import"
_LIBRARIES = ("timm", "torchvision", "hf")
# Options with which a library runs code, or unpickles a file; the last names files for timm to load.
_RUN_CODE = ("trust_remote_code", "checkpoint_path", "pretrained_cfg")


@dataclass(frozen=True)
class ImportPolicy:
    """What this process was asked to run: the words of its command line, or everything that files name."""

    repeated: frozenset[str] = frozenset()
    everything: bool = False


_asked = ImportPolicy()


@contextmanager
def command_line(argv: Sequence[str]) -> Iterator[list[str]]:
    """Take what a command line repeats as asked for, for as long as it runs; yield it without `--allow-import`."""
    repeated = frozenset(part for word in argv for part in (word, word.partition("=")[2]))
    with use_policy(ImportPolicy(repeated, everything=FLAG in argv)):
        yield [word for word in argv if word != FLAG]


def asked() -> ImportPolicy:
    """Return what a process that works for this one is to take over."""
    return _asked


@contextmanager
def use_policy(values: ImportPolicy) -> Iterator[None]:
    """Hold what was asked of the process that this one works for."""
    global _asked
    before, _asked = _asked, values
    try:
        yield
    finally:
        _asked = before


def is_user_code(name: str) -> bool:
    """Say whether building a network of this name runs code that does not come with codistill or a library.

    >>> [runs_code(name) for name in ("resnet32", "timm:resnet18", "mine:net", "hf:x,trust_remote_code=True")]
    [False, False, True, True]
    """
    kind, colon, rest = name.partition(":")
    return bool(colon) and (kind not in _LIBRARIES or any(option in rest for option in _RUN_CODE))


def check_imports(names: Iterable[str], source: object, allow: bool = False, known: Iterable[str] = ()) -> None:
    """Refuse code that only a file names.

    Args:
        names: Names of networks, as a file says them.
        source: The file, for the sentence.
        allow: Whether the caller wants all of it run.
        known: Names that the caller has from elsewhere.

    Raises:
        InputError: a name would run code, and nobody asked for that.
    """
    trusted = _asked.repeated | {*known}
    for name in names:
        if is_user_code(name) and name not in trusted and not (allow or _asked.everything):
            raise InputError(
                f"{source} names code to import and run, {name}; if you trust it, add {FLAG} (in training, "
                f"--model {name} repeats it)"
            )
