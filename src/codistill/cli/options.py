"""What each command takes, as dataclasses, and how a command line becomes one of them. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass
from typing import Any, Literal

from codistill.config.config import Checkpoint, CompareConfig, Config, Device, ReproduceConfig
from codistill.config.methods import METHODS, method_config
from codistill.config.old_names import rename_old_flags
from codistill.utils.allow_import import check_imports
from codistill.utils.errors import InputError, suggest


@dataclass
class Command:
    """A command's name with its arguments, and what it does."""

    usage: str
    summary: str


COMMANDS = {
    "train": Command("train METHOD", "train peers with a method, in a run folder"),
    "evaluate": Command("evaluate RUN", "measure every member of a trained run"),
    "predict": Command("predict RUN IMAGES ...", "say what the deployed student sees in image files, as CSV or JSON"),
    "compare": Command("compare METHOD ...", "train methods and baselines of equal cost over seeds, print the table"),
    "export": Command("export RUN", "write the one deployed student as a file that needs no codistill"),
    "reproduce": Command(
        "reproduce TABLE", "train a published table anew, with deviations and baselines of equal cost"
    ),
    "report": Command("report RUN ...", "write one self-contained page about runs, grids and tables"),
    "list": Command("list methods|models|data|tables|branch-points", "show what there is"),
    "demo": Command("demo", "the comparison that make demo runs"),
}


@dataclass
class EvaluateOptions:
    """Measure every member and the ensemble of a trained run."""

    split: Literal["test", "val"] = "test"
    """Which part of the run's data to measure on."""
    data: str | None = None
    """Another data set with the same classes and image size; its test part is measured."""
    data_dir: str | None = None
    """Where the data lies, if not where the run found it."""
    device: Device = "auto"
    """Where to run."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""
    per_class: bool = False
    """Also say, class by class, what the deployed student gets right and what it takes each class for."""
    confusion: str | None = None
    """Also write the deployed student's confusion matrix to this CSV file."""
    calibrate: bool = False
    """Fit a temperature on the run's validation part, keep it for `predict`, and show calibration with and without."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class PredictOptions:
    """Say what the deployed student sees in image files; a folder stands for all images in it."""

    top: int = 5
    """Guesses an image, the most probable first."""
    json: bool = False
    """Print JSON instead of CSV."""
    batch_size: int = 64
    """Images at once."""
    device: Device = "auto"
    """Where to run."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""


@dataclass
class ExportOptions:
    """Write the deployed student."""

    out: str | None = None
    """File to write; default student.safetensors, pt2 or onnx in the run folder; a model card (.md) goes beside it."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """safetensors: weights; torch-export: a program for torch.export.load; onnx: with a free batch size."""
    license: str = "unknown"
    """Licence of the weights, as the Hub spells it (apache-2.0, mit, ...), for the model card."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""
    data_dir: str | None = None
    """Where the data lies, if not where the run found it."""


@dataclass
class ReportOptions:
    """Write one self-contained page about runs, grids and tables: no network is needed to read it."""

    out: str = "report.html"
    """File to write (also -o)."""
    title: str | None = None
    """Heading of the page; default what it is about."""


@dataclass
class ListOptions:
    """Show what there is."""

    model: str = "resnet32"
    """Network whose places to fork are listed (branch-points)."""
    image_size: int | None = None
    """Height and width of its images (branch-points); default what the network was made for."""


@dataclass
class DemoOptions:
    """Train peers on real images, and print what it buys against baselines of equal cost."""

    data: str = "digits"
    """digits (needs no download), fashion-mnist or cifar100."""
    data_dir: str | None = None
    """Where the data set lies or is downloaded to; default ./data."""
    out: str | None = None
    """Folder of the runs; default demo/DATA."""
    seeds: int = 3
    """Number of seeds."""
    workers: int = 2
    """Runs side by side."""


@dataclass
class Parsed:
    """A command line, understood."""

    words: list[str]
    """The arguments before the options."""
    options: Any
    seeds: int | None = None


def parse(command: str, argv: list[str]) -> Parsed:
    """Split off the words, read --config, and let tyro read the options.

    Raises:
        InputError: a word or an option is missing or unknown.
        SystemExit: help was asked for (0), or tyro printed what it did not understand (2).
    """
    words, rest = _split(argv)
    asks_help = "--help" in rest or "-h" in rest
    if command == "train":
        return _parse_train(words, rest, asks_help)
    if command == "compare":
        if not words and not asks_help:
            raise InputError("compare needs at least one METHOD, as in: codistill compare okddip --data digits")
        return Parsed(
            words,
            _tyro(CompareConfig(method="independent"), rest, f"codistill compare {' '.join(words) or 'METHOD ...'}"),
        )
    if command == "reproduce":
        if len(words) != 1 and not asks_help:
            raise InputError(f"reproduce takes one TABLE, not {len(words)} words; `codistill list tables` names them")
        return Parsed(words, _tyro(ReproduceConfig(), rest, f"codistill reproduce {words[0] if words else 'TABLE'}"))
    if command == "report":
        if not words and not asks_help:
            raise InputError("report needs at least one RUN: a run folder, or the folder of a grid or of a table")
        rest = ["--out" if word == "-o" else word for word in rest]
        return Parsed(words, _tyro(ReportOptions(), rest, "codistill report RUN ..."))
    if command == "predict":
        if len(words) < 2 and not asks_help:
            raise InputError(
                "predict takes a RUN and image files or folders, as in: codistill predict runs/first cat.jpg"
            )
        return Parsed(words, _tyro(PredictOptions(), rest, "codistill predict RUN IMAGES ..."))
    plain = {"evaluate": EvaluateOptions, "export": ExportOptions, "list": ListOptions, "demo": DemoOptions}
    expected = {"evaluate": "RUN", "export": "RUN", "list": "methods|models|data|tables|branch-points"}.get(command)
    if expected and len(words) != 1 and not asks_help:
        raise InputError(f"{command} takes one {expected}, not {len(words)} words")
    prog = f"codistill {command}" + (f" {words[0] if words else expected}" if expected else "")
    return Parsed(words, _tyro(plain[command](), rest, prog))


def _parse_train(words: list[str], rest: list[str], asks_help: bool) -> Parsed:
    path, rest = _take(rest, "--config")
    config = Config.from_file(path) if path is not None else None
    if len(words) > 1:
        raise InputError(f"train takes one METHOD, not {len(words)} ({' '.join(words)}); compare takes several")
    if words:
        method = method_config(words[0])
        held = config.method if config is not None else None
        method = held if held is not None and held.name == words[0] else method
    elif config is not None:
        method = config.method
    elif asks_help:
        method = method_config("okddip")
    else:
        raise InputError(f"train needs a METHOD{suggest('', METHODS)}, as in: codistill train okddip")
    config = dataclasses.replace(config or Config(), method=method)
    seeds, rest = _take(rest, "--seeds")
    if seeds is not None and (not seeds.isdigit() or int(seeds) < 1):
        raise InputError(f"--seeds {seeds} must be a number of seeds, 1 or more")
    options = _tyro(config, rest, f"codistill train {words[0] if words else 'METHOD'}")
    if path is not None:
        check_imports(options.network_names(), f"--config {path}")
    return Parsed(words, options, int(seeds) if seeds else None)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate the leading words from the options."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first], argv[first:]


def _take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take one flag and its value out of a command line."""
    for index, word in enumerate(argv):
        if word == flag:
            if index + 1 == len(argv):
                raise InputError(f"{flag} needs a value")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
        if word.startswith(flag + "="):
            return word[len(flag) + 1 :], argv[:index] + argv[index + 1 :]
    return None, argv


def _gather(argv: list[str], flag: str) -> list[str]:
    """Turn `--model a --model b` into `--model a b`, which is how tyro reads a tuple."""
    values, rest = [], []
    words = iter(argv)
    for word in words:
        if word == flag:
            values.append(next(words, ""))
        elif word.startswith(flag + "="):
            values.append(word[len(flag) + 1 :])
        elif values and rest and rest[-1] is _HERE:
            values.append(word) if not word.startswith("-") else rest.append(word)
            continue
        else:
            rest.append(word)
            continue
        if _HERE not in rest:
            rest.append(_HERE)
    if not values:
        return argv
    place = rest.index(_HERE)
    return rest[:place] + [flag, *values] + rest[place + 1 :]


_HERE = "\0"


def _tyro(default: Any, argv: list[str], prog: str) -> Any:
    """Read options into a copy of `default`; the method's options stand under --method."""
    import tyro

    kind = type(default)
    description = kind.__doc__ or ""
    shown, start = kind, default
    if isinstance(default, Config):
        argv = _gather(rename_old_flags(argv), "--model")
        hidden = kind is CompareConfig  # several methods: each keeps its own defaults
        method_type = type(default.method)
        annotation = tyro.conf.Suppress[method_type] if hidden else method_type  # type: ignore[valid-type]
        description = description if hidden else method_type.__doc__ or ""
        field = ("method", annotation, dataclasses.field(default_factory=lambda: default.method))
        shown = dataclasses.make_dataclass("Options", [field], bases=(kind,))  # type: ignore[arg-type]
        start = shown(**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)})
    if isinstance(default, ReproduceConfig):
        for flag in ("--network", "--method", "--submit-option"):
            argv = _gather(argv, flag)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                shown,
                prog=prog,
                default=start,
                args=argv,
                return_unknown_args=True,
                description=" ".join(description.split()),
            )
    except SystemExit as end:
        if end.code:
            raise InputError(_one_sentence(said.getvalue())) from None
        raise
    if unknown:
        _refuse(unknown, default)
    return kind(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)})


def _one_sentence(box: str) -> str:
    """Take the sentence out of the frame that tyro draws around an error."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    return " ".join(lines[: lines.index("")] if "" in lines else lines).rstrip(".")


def _refuse(unknown: list[str], default: Any) -> None:
    """Raise for an option that does not exist, with the near name."""
    word = unknown[0]
    names = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(default)} - {"--method"}
    if isinstance(default, Config):
        names |= {"--config", "--seeds"}
        names |= {f"--method.{f.name.replace('_', '-')}" for f in dataclasses.fields(default.method)}  # type: ignore[arg-type]
    if word.startswith("--"):
        raise InputError(f'unknown option "{word}"{suggest(word.split("=")[0], names)}')
    raise InputError(f'"{word}" follows no option; options start with --')
