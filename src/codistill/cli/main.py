"""The entry point: parse first, import torch afterwards.

Exit codes: 0 done; 1 the machine failed, or a bug; 2 the user's input; 75 stopped by a signal, with a checkpoint
written; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings

from codistill.cli.options import COMMANDS, parse
from codistill.utils import (
    InputError,
    MachineError,
    OtherRankFailedError,
    command_line,
    explain_failure,
    on_one_line,
    suggest,
)

USAGE = """usage: codistill COMMAND [OPTIONS]      (codistill COMMAND --help lists its options, --help-all all)

Train a better small network without a teacher: peers teach each other, one plain network is deployed.

{commands}

Every command takes --allow-import: run code (package.module:callable) that only a config file or run folder names.

Begin with:  codistill train okddip --model resnet8 --data digits --epochs 60 --batch-size 64
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if argv[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(", ".join(f"{name} {version(name)}" for name in ("codistill", "torch")))  # read without importing torch
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f'unknown command "{argv[0]}"{suggest(argv[0], COMMANDS)}')
        with command_line(argv[1:]) as words:
            return parse_and_run(argv[0], words)
    except InputError as error:
        return _print_error(error, 2)
    except MachineError as error:
        return _print_error(error, 1)
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except OtherRankFailedError as error:
        return error.code
    except Exception as error:
        sentence, code = explain_failure(error)
        if sentence is None:
            raise
        return _print_error(sentence, code)


def parse_and_run(command: str, argv: list[str]) -> int:
    """Parse a command's options, then import what it needs and run it."""
    parsed = parse(command, argv)
    warnings.showwarning = _print_warning
    from codistill.cli.commands import run_command

    return run_command(command, parsed)


def _print_usage() -> None:
    usages = {f"{name} {command.arguments}": command.summary for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    print(USAGE.format(commands="\n".join(f"  {usage:{width}}  {summary}" for usage, summary in usages.items())))


def _print_warning(message: object, *_: object, **__: object) -> None:
    print(f"codistill: warning: {on_one_line(message)}", file=sys.stderr)


def _print_error(message: object, code: int) -> int:
    """Print a sentence and return the code; in a job of several processes, a failure of one rank names the rank."""
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    if rank == "0" or code not in (2, 75):  # input and signals are the same on all ranks: the first prints it
        prefix = f"rank {rank}: " if rank != "0" else ""
        print(f"codistill: {prefix}{on_one_line(message)}", file=sys.stderr, flush=True)
    return code
