"""Names of a package that are imported when they are first used, so that the command line starts without torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names live in its modules.

    Args:
        package: The package's `__name__`.
        homes: Module of the package -> the names it defines, separated by spaces.
        modules: Modules of the package that are names of their own.

    Raises:
        AttributeError: (from `__getattr__`) no module of the package defines the name.
    """
    module_of = {name: module for module, names in homes.items() for name in names.split()}
    own_modules = frozenset(modules)

    def load(name: str) -> Any:
        if name in own_modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of, *own_modules})

    return load, list_names
