"""What each command takes, as dataclasses, and how a command line becomes one of them. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codistill.cli.option_types import (
    CheckOptions,
    CompletionOptions,
    DemoOptions,
    EvaluateOptions,
    ExportOptions,
    ListOptions,
    PredictOptions,
    ReportOptions,
)
from codistill.config import (
    METHODS,
    CompareConfig,
    Config,
    ReproduceConfig,
    method_config,
    rename_old_flags,
)
from codistill.utils import InputError, check_imports, suggest


@dataclass(frozen=True)
class Command:
    """A command: its positional arguments, what it does, and its options."""

    arguments: str
    """The positional arguments, as the usage line names them."""
    summary: str
    options: Callable[[], Any]
    """Builds the options with their defaults."""
    takes: str
    """The positional arguments in words, for the message about a wrong number of them."""
    min_arguments: int
    max_arguments: int | None
    example: str
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Short spellings of options."""


COMMANDS = {
    "train": Command(
        "METHOD",
        "train peers with a method, in a run folder",
        Config,
        "one METHOD (compare takes several)",
        *(0, 1),
        "train okddip --data digits",
    ),
    "evaluate": Command(
        "RUN",
        "evaluate every member of a trained run",
        EvaluateOptions,
        "one RUN",
        *(1, 1),
        "evaluate runs/first",
    ),
    "predict": Command(
        "RUN IMAGES ...",
        "classify image files with the deployed student, as CSV or JSON",
        PredictOptions,
        "a RUN and image files or folders",
        *(2, None),
        "predict runs/first cat.jpg",
    ),
    "compare": Command(
        "METHOD ...",
        "train methods and baselines of equal cost over seeds, print the table",
        lambda: CompareConfig(method="independent"),
        "at least one METHOD",
        *(1, None),
        "compare okddip --data digits",
    ),
    "export": Command(
        "RUN",
        "write the one deployed student as a file that needs no codistill",
        ExportOptions,
        "one RUN",
        *(1, 1),
        "export runs/first",
    ),
    "reproduce": Command(
        "TABLE",
        "train a published table again, with deviations and baselines of equal cost",
        ReproduceConfig,
        "one TABLE (`codistill list tables` names them)",
        *(1, 1),
        "reproduce okddip_table2 --scale smoke",
    ),
    "report": Command(
        "RUN ...",
        "write one self-contained page about runs, grids and tables",
        ReportOptions,
        "at least one RUN (a run folder, or the folder of a grid or of a table)",
        *(1, None),
        "report runs/first",
        {"-o": "--out"},
    ),
    "list": Command(
        "methods|models|data|tables|branch-points",
        "list what is available",
        ListOptions,
        "one of methods, models, data, tables and branch-points",
        *(1, 1),
        "list methods",
    ),
    "check": Command(
        "",
        "check in seconds that this machine computes what it should",
        CheckOptions,
        "options only",
        *(0, 0),
        "check --device cpu",
    ),
    "completion": Command(
        "bash|zsh|fish",
        "print the completion script of a shell",
        CompletionOptions,
        "one of bash, zsh and fish",
        *(1, 1),
        "completion bash",
    ),
    "demo": Command(
        "",
        "run the comparison of make demo",
        DemoOptions,
        "options only",
        *(0, 0),
        "demo --data digits",
    ),
}
_REPEATABLE: dict[type, tuple[str, ...]] = {
    Config: ("--model",),
    ReproduceConfig: ("--network", "--method", "--submit-option"),
}
"""Options that may be given several times, each with one value or more."""


@dataclass
class Parsed:
    """A parsed command line."""

    positionals: list[str]
    """The arguments before the options."""
    options: Any
    seeds: int | None = None
    dry_run: bool = False
    """Whether `train` only says what it would do (--dry-run)."""
    recipe: str | None = None
    """auto or paper (--recipe); None: not given."""
    given: frozenset[str] = frozenset()
    """Names of the options that were given."""


def parse(command: str, argv: Sequence[str]) -> Parsed:
    """Read a command's positional arguments, which come first, and its options; files may also follow `--`.

    Raises:
        InputError: an argument or an option is missing, unknown or has a wrong type.
        SystemExit: help was asked for and is printed (0).
    """
    spec = COMMANDS[command]
    files: list[str] = []
    if "--" in argv and spec.max_arguments is None and command != "compare":
        end = argv.index("--")
        argv, files = argv[:end], [*argv[end + 1 :]]
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    positionals, rest = [*argv[:first], *files], [spec.aliases.get(word, word) for word in argv[first:]]
    asks_help = bool({"--help", "-h", "--help-all"} & {*rest})
    if not asks_help:
        _check_positionals(command, positionals)
    name = " ".join(["codistill", command, *(positionals or [spec.arguments])]).strip()
    if asks_help and command in ("train", "compare"):
        from codistill.cli.help_text import format_help

        default = spec.options()
        if command == "train" and positionals:
            default = dataclasses.replace(default, method=method_config(positionals[0]))
        print(format_help(default, name, complete="--help-all" in rest))
        raise SystemExit(0)
    rest = ["--help" if word == "--help-all" else word for word in rest]
    if command == "train":
        return _parse_train(positionals, rest, name)
    if command == "compare":
        recipe, rest = _pop_recipe(rest)
        return Parsed(positionals, _parse_options(spec.options(), rest, name), recipe=recipe, given=_given(rest))
    return Parsed(positionals, _parse_options(spec.options(), rest, name))


def _check_positionals(command: str, positionals: list[str]) -> None:
    """Raise InputError for too few or too many positional arguments."""
    spec, count = COMMANDS[command], len(positionals)
    if count < spec.min_arguments or (spec.max_arguments is not None and count > spec.max_arguments):
        given = f"{count} argument{'s' if count != 1 else ''}{f' ({chr(32).join(positionals)})' if positionals else ''}"
        raise InputError(f"{command} takes {spec.takes}, not {given}; for example: codistill {spec.example}")


def _parse_train(positionals: list[str], argv: list[str], name: str) -> Parsed:
    """Read --config first, then the method's name, whose options are --method.NAME, then the other options."""
    path, argv = _pop_option(argv, "--config")
    seeds, argv = _pop_option(argv, "--seeds")
    recipe, argv = _pop_recipe(argv)
    recipe = "paper" if recipe is None and path is not None else recipe  # the file says all
    dry_run, argv = "--dry-run" in argv, [word for word in argv if word != "--dry-run"]
    config = Config.from_file(path) if path is not None else Config()
    if not positionals and path is None:
        raise InputError(
            f"train needs a METHOD{suggest('', METHODS)}; for example: codistill train okddip --data digits"
        )
    if positionals:
        method = method_config(positionals[0])
        if path is None or config.method.name != method.name:
            config = dataclasses.replace(config, method=method)
    if seeds is not None and not re.fullmatch("0*[1-9][0-9]{0,4}", seeds):
        raise InputError(f"--seeds {seeds} must be a number of seeds, 1 to 99999")
    options = _parse_options(config, argv, name)
    if path is not None:
        check_imports(options.network_names(), f"--config {path}")
    return Parsed(positionals, options, int(seeds) if seeds else None, dry_run, recipe, _given(argv))


def _pop_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of --recipe, and the command line without it."""
    recipe, argv = _pop_option(argv, "--recipe")
    if recipe not in (None, "auto", "paper"):
        raise InputError(f"--recipe {recipe} must be auto or paper")
    return recipe, argv


def _given(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options in a command line, as fields of the config."""
    words = rename_old_flags([word for word in argv if word.startswith("--")])
    return frozenset(word.removeprefix("--").split("=")[0].replace("-", "_") for word in words)


def _pop_option(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Return the value of an option, None where it is not given, and the command line without it."""
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise InputError(f"{flag} needs a value")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :], argv[:index] + argv[index + 1 :]
    return None, argv


def _merge_repeated(argv: list[str], flag: str) -> list[str]:
    """Turn `--model a --model b` into `--model a b`, which is how tyro reads a tuple.

    tyro's own UseAppendAction would append to the default instead of replacing it, and refuse `--model a b`.
    """
    values: list[str] = []
    rest: list[str] = []
    position, collecting = None, False
    for index, word in enumerate(argv):
        if word == flag and (index + 1 == len(argv) or argv[index + 1].startswith("-")):
            raise InputError(f"{flag} needs at least one value")
        if word == flag or word.startswith(flag + "="):
            position = len(rest) if position is None else position
            collecting = True
            values += [word[len(flag) + 1 :]] if word != flag else []
        elif collecting and not word.startswith("-"):
            values.append(word)
        else:
            collecting = False
            rest.append(word)
    return rest if position is None else [*rest[:position], flag, *values, *rest[position:]]


def _parse_options(default: Any, argv: list[str], name: str) -> Any:
    """Read options into a copy of `default`; the method's own options are --method.NAME."""
    import tyro

    for kind, flags in _REPEATABLE.items():
        for flag in flags if isinstance(default, kind) else ():
            argv = _merge_repeated(argv, flag)
    start, description = _with_method_options(default) if isinstance(default, Config) else (default, default.__doc__)
    stderr_text = io.StringIO()
    argv = rename_old_flags(argv)
    try:
        with contextlib.redirect_stderr(stderr_text):
            parsed, unknown = tyro.cli(
                type(start),
                prog=name,
                default=start,
                args=argv,
                return_unknown_args=True,
                description=" ".join((description or "").split()),
            )
    except SystemExit as end:
        if end.code:
            raise InputError(f"{_read_error_box(stderr_text.getvalue())}; `{name} --help` explains it") from None
        raise
    if unknown:
        _reject_unknown(unknown[0], default)
    return type(default)(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(default)})


def _with_method_options(config: Config) -> tuple[Any, str | None]:
    """Return a copy whose `method` field has the type of its value, so that tyro sees its options; and the help text.

    compare trains several methods with their own defaults, so it hides these options.
    """
    import tyro

    kind, method_type = type(config), type(config.method)
    hidden = kind is CompareConfig
    annotation = tyro.conf.Suppress[method_type] if hidden else method_type
    field = ("method", annotation, dataclasses.field(default_factory=lambda: config.method))
    shown = dataclasses.make_dataclass("Options", [field], bases=(kind,))
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return shown(**values), (kind if hidden else method_type).__doc__


def _read_error_box(box: str) -> str:
    """Return the sentence that tyro prints in a box, drawn with lines or, where the terminal has only ASCII, dashes."""
    sentence: list[str] = []
    for line in (line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]):
        if line.strip("-"):
            sentence.append(line)
        elif sentence:  # a rule ends the sentence
            break
    return " ".join(sentence).removeprefix("Error parsing ").rstrip(".")


def _reject_unknown(word: str, default: Any) -> None:
    """Raise InputError for an option that does not exist, with the most similar name."""
    if not word.startswith("--"):
        raise InputError(f'"{word}" belongs to no option; options begin with --')
    names = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(default)} - {"--method"}
    if isinstance(default, Config):
        names |= {"--config", "--seeds", "--dry-run", "--recipe"}
        method = method_config(default.method) if isinstance(default.method, str) else default.method
        names |= {f"--method.{f.name.replace('_', '-')}" for f in dataclasses.fields(method)}
    if word.split("=")[0] in names:
        raise InputError(f"{word} is no option of this command, but of codistill train; drop it")
    raise InputError(f'unknown option "{word}"{suggest(word.split("=")[0], names)}')
