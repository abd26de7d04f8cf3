"""Names of before that still work: of options, and of networks.

Flags, keyword arguments, attributes, config files and run folders may all use them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, TypeVar

Options = TypeVar("Options", bound=type)

OLD_OPTIONS = {"head_lr": "head_lr_scale", "normalise": "normalize"}
"""Old name of an option -> its name now."""


def accept_old_options(options: Options) -> Options:
    """Let a dataclass take and show its options under their old names too (a class decorator)."""
    init = options.__init__

    @functools.wraps(init)
    def init_with_old_names(self: Any, *args: Any, **kwargs: Any) -> None:
        renamed = {OLD_OPTIONS[name]: kwargs.pop(name) for name in OLD_OPTIONS.keys() & kwargs.keys()}
        init(self, *args, **{**kwargs, **renamed})

    options.__init__ = init_with_old_names
    for old, new in OLD_OPTIONS.items():
        setattr(options, old, property(attrgetter(new), lambda self, value, new=new: setattr(self, new, value)))
    return options


def rename_old_flags(argv: Iterable[str]) -> list[str]:
    """Return a command line with today's names of the options.

    >>> rename_old_flags(["--head-lr", "3", "--normalise=imagenet"])
    ['--head-lr-scale', '3', '--normalize=imagenet']
    """
    flags = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in OLD_OPTIONS.items()}
    words = [word.partition("=") for word in argv]
    return [flags.get(flag, flag) + equals + value for flag, equals, value in words]
