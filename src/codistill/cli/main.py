"""The entry point: parse first, import torch afterwards.

Exit codes: 0 done; 1 the machine failed, or a bug; 2 the user's input; 75 stopped by a signal, with a checkpoint
written where there was something to keep; 130 interrupted.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile

from codistill.cli.options import COMMANDS, parse
from codistill.cli.output import safe_output
from codistill.utils import (
    InputError,
    MachineError,
    OtherRankFailedError,
    SignalReceived,
    StoppedEarly,
    command_line,
    describe_unexpected,
    end_displays,
    explain_failure,
    first_line,
    on_one_line,
    raise_on_signals,
    suggest,
)

TRACEBACK_FLAG = "--traceback"
USAGE = """usage: codistill COMMAND [OPTIONS]      (codistill COMMAND --help lists its options, --help-all all)

Train a better small network without a teacher: peers teach each other, one plain network is deployed.

{commands}

Every command takes --allow-import: run code (package.module:callable) that only a config file or run folder names; and
--traceback (or CODISTILL_TRACEBACK=1): show where an unexpected error was raised.

Begin with:  codistill train okddip --model resnet8 --data digits --epochs 60 --batch-size 64
"""


def run() -> None:
    """Run the command of this process and end it; signals that come too late change neither its words nor its code."""
    code = main()
    with suppress(ValueError):  # in a thread
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    distributed = sys.modules.get("torch.distributed")
    if code and distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Other ranks may be gone or wait, so the group cannot be left in order, and its threads would abort the process
        # when the interpreter ends (SIGABRT in place of the code).
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with safe_output() as stdout, _warnings_shown():
        code = _run_command(argv)
        stdout.flush()
        if code == 0 and stdout.failure is not None:
            return _print_error(f"the output cannot be written ({first_line(stdout.failure)}); files are complete", 1)
        return code


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show warnings as sentences; those that `python -W error` makes errors are shown too, and do not end a command."""
    with warnings.catch_warnings():
        for option in sys.warnoptions:
            if option.partition(":")[0] == "error":
                warnings.simplefilter("default")
        warnings.showwarning = _print_warning
        yield


def _run_command(argv: list[str] | None) -> int:
    """Run one command, end it in order where a signal arrives, and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if argv[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(", ".join(f"{name} {version(name)}" for name in ("codistill", "torch")))  # read without importing torch
        return 0
    if argv[0] == "_complete":  # called by the scripts of `codistill completion`
        from codistill.cli.completion import complete

        print("\n".join(complete(argv[1:])))
        return 0
    options = [*takewhile(lambda word: word != "--", argv)]  # what follows are names of files
    show_traceback = TRACEBACK_FLAG in options or os.environ.get("CODISTILL_TRACEBACK", "0") not in ("", "0")
    argv = [_with_home(word) for word in options if word != TRACEBACK_FLAG] + argv[len(options) :]
    if "RANK" in os.environ and not show_traceback:  # read when torch is imported, whose C++ prints pages of frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        if not argv or argv[0] not in COMMANDS:
            name = argv[0] if argv else ""
            raise InputError(f'unknown command "{name}"{suggest(name, COMMANDS)}')
        with command_line(argv[1:], names_methods=argv[0] in ("train", "compare")) as words, raise_on_signals():
            return parse_and_run(argv[0], words)
    except InputError as error:
        return _print_error(error, 2)
    except MachineError as error:
        return _print_error(error, 1)
    except SignalReceived as received:
        return _print_error(StoppedEarly(str(received)).sentence(), 75)
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except OtherRankFailedError as error:
        return error.code
    except Exception as error:
        sentence, code = explain_failure(error)
        if sentence is None and show_traceback:
            traceback.print_exc()
        return _print_error(sentence or describe_unexpected(error, argv), code)


def _with_home(word: str) -> str:
    """Return a word with `~` as the home directory, where the shell leaves it: in quotes, and after the `=` of a flag.

    >>> _with_home("--out=~/run") == "--out=" + os.path.expanduser("~/run"), _with_home("a~b"), _with_home("--lr=1")
    (True, 'a~b', '--lr=1')
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + os.path.expanduser(value)


def parse_and_run(command: str, argv: list[str]) -> int:
    """Parse a command's options, then import what it needs and run it."""
    parsed = parse(command, argv)
    from codistill.cli.commands import run_command

    return run_command(command, parsed)


def _print_usage() -> None:
    usages = {f"{name} {command.arguments}": command.summary for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    print(USAGE.format(commands="\n".join(f"  {usage:{width}}  {summary}" for usage, summary in usages.items())))


def _print_warning(message: object, *_: object, **__: object) -> None:
    print(f"codistill: warning: {on_one_line(message)}", file=sys.stderr)


def _restore_terminal() -> None:
    """End what an exception has left open, and show the cursor, also where a signal arrived while a bar began."""
    end_displays()
    if (console := sys.modules.get("codistill.cli.console")) is not None:
        console.err.show_cursor(True)


def _print_error(message: object, code: int) -> int:
    """Print a sentence and return the code; in a job of several processes, a failure of one rank names the rank."""
    _restore_terminal()
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    # torchrun gives all ranks the same command and the same signals, so the first one prints what these end in. Ranks
    # that were started by hand may differ, and a RANK that is no number has no first.
    same = "TORCHELASTIC_RUN_ID" in os.environ and rank.isdecimal()
    if rank == "0" or code not in (2, 75) or not same:
        prefix = f"rank {rank}: " if rank.isdecimal() and rank != "0" else ""
        print(f"codistill: {prefix}{on_one_line(message)}", file=sys.stderr, flush=True)
    return code
