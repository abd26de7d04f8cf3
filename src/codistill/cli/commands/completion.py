"""`codistill completion SHELL`: print the script that completes commands and options in a shell."""

from __future__ import annotations

from codistill.cli.completion import SCRIPTS
from codistill.cli.options import Parsed
from codistill.utils import InputError


def run(parsed: Parsed) -> int:
    """Print the script.

    Raises:
        InputError: there is none for that shell.
    """
    (shell,) = parsed.positionals
    if shell not in SCRIPTS:
        raise InputError(f'completion: no script for "{shell}"; there are {", ".join(SCRIPTS)}')
    print(SCRIPTS[shell], end="")
    return 0
