"""The command line: parse first, import torch afterwards.

Exit codes: 0 done; 2 the user's input; 1 the machine's or ours; 75 stopped by a signal with a checkpoint written.
"""

from __future__ import annotations

import os
import sys
import warnings

from codistill.cli.options import COMMANDS, parse
from codistill.utils.allow_import import command_line
from codistill.utils.errors import InputError, MachineError, on_one_line, suggest

USAGE = """usage: codistill COMMAND [OPTIONS]      (codistill COMMAND --help says more)

Train a better small network without a teacher: peers teach each other, one plain network is deployed.

{commands}

Every command takes --allow-import: run code (package.module:callable) that only a config file or run folder names.

Begin with:  codistill train okddip --model resnet8 --data digits --epochs 60 --batch-size 64
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(len(c.usage) for c in COMMANDS.values())
        print(USAGE.format(commands="\n".join(f"  {c.usage:{width}}  {c.summary}" for c in COMMANDS.values())))
        return 0
    if argv[0] in ("--version", "-V"):
        from codistill import __version__

        print(f"codistill {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f'unknown command "{argv[0]}"{suggest(argv[0], COMMANDS)}')
        with command_line(argv[1:]) as words:
            return run(argv[0], words)
    except InputError as error:
        return _say(error, 2)
    except MachineError as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        from codistill.utils.errors import OtherRankFailedError
        from codistill.utils.failures import explain

        if isinstance(error, OtherRankFailedError):
            return error.code
        sentence, code = explain(error)
        if sentence is None:
            raise
        return _say(sentence, code)


def run(command: str, argv: list[str]) -> int:
    """Parse the options of a command, then import what it needs and run it."""
    options = parse(command, argv)
    warnings.showwarning = _warn
    from codistill.cli import commands

    return getattr(commands, command)(options)


def _warn(message: object, *_: object, **__: object) -> None:
    print(f"codistill: warning: {on_one_line(message)}", file=sys.stderr)


def _say(message: object, code: int) -> int:
    """Print a sentence; in a job of several processes, a failure that not all have comes with its rank."""
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    if rank == "0" or code not in (2, 75):  # input and signals are the same for all: the first says it
        print(
            f"codistill: {f'rank {rank}: ' if rank != '0' else ''}{on_one_line(message)}", file=sys.stderr, flush=True
        )
    return code
