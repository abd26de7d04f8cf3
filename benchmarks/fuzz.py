"""Run codistill with random configs, config files, command lines and run files: none may end in a traceback.

    python benchmarks/fuzz.py --cases 10000

Each case is parsed, resolved and, if the run is small, built (data, networks, method, optimizer) as in training. The
result must be a config, or one sentence with exit code 2 (1 for a failure of the machine). Run files are those of a
run, of a comparison and of a published table, of which one is changed before a command reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from codistill.cli import commands
from codistill.cli.main import main
from codistill.cli.options import COMMANDS, Parsed
from codistill.config.config import Config, ReproduceConfig
from codistill.config.methods import METHODS
from codistill.reproduce import workers
from codistill.runs.checkpoint import write_checkpoint
from codistill.training.build import build_run
from codistill.utils.errors import InputError

SEEN: Counter[str] = Counter()
"""Number of cases by outcome."""
FIELDS = [f.name for f in dataclasses.fields(Config)]
_WORDS = st.sampled_from(
    ["", "auto", "none", "okddip", "pcl", "kdcl", "kd", "ensemble", "ema", "0", "1", "2", "3", "-1", "1e400", "nan",
     "inf", "0.5", "resnet8", "timm:", ":x", "os:path", "hf:", "torchvision:resnet18,x", "digits", "npz:", "folder:",
     "npz:/dev/null", "folder:/dev/null", "layer2", "data=1,peer=2", "data=0", "branches", "networks", "bfloat16",
     "float16", "cuda", "true", "None", "[", "{}", "--", "-", "=", "\u2028", "\x1b[31m", "9" * 400, "x" * 300]
)  # fmt: skip
_STRINGS = st.one_of(_WORDS, st.text(max_size=12))
_NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([10**9, 2**31, 2**63, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-320, 1e308]),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _STRINGS)
VALUES = st.recursive(
    _SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(_STRINGS, v, max_size=2)), max_leaves=4
)
_OPTIONS = sorted({f.name for c in METHODS.values() for f in dataclasses.fields(c)})
_METHOD = st.one_of(
    st.sampled_from([*METHODS]),
    VALUES,
    st.builds(
        lambda name, rest: {"name": name, **rest},
        st.sampled_from([*METHODS]),
        st.dictionaries(st.sampled_from(_OPTIONS), VALUES, max_size=3),
    ),
)
_SMALL = {"model": ["resnet8"], "data": "digits", "train_per_class": 6, "batch_size": 16, "epochs": 2, "device": "cpu"}
_WILD = st.builds(
    lambda method, own, more: {**own, "method": method, **more},
    _METHOD,
    st.sampled_from([{}, _SMALL]),
    st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=6)), VALUES, max_size=4),
)
_SHARE = st.floats(0, 1.1)
_LIKELY_VALUES = {
    "topology": st.sampled_from(["networks", "branches", None]), "peers": st.integers(1, 4), "lr": st.floats(0, 1e30),
    "momentum": _SHARE, "weight_decay": _SHARE, "val_fraction": _SHARE, "label_smoothing": _SHARE, "mixup": _SHARE,
    "cutmix": _SHARE, "cutout": st.integers(-1, 40), "image_size": st.sampled_from([None, 7, 8, 16]),
    "channels": st.sampled_from([None, 1, 2, 3]), "batch_size": st.integers(0, 70), "epochs": st.integers(0, 2**32),
    "train_per_class": st.integers(0, 100), "deploy": st.sampled_from(["member", "ema", "0", "3", "\u00b2"]),
    "protocol": st.sampled_from(["honest", "paper"]), "optimizer": st.sampled_from(["sgd", "adamw"]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float64"]), "execution": st.sampled_from(["loop", "stacked"]),
    "fan_out": st.lists(st.integers(0, 4), max_size=2), "freeze": st.lists(st.sampled_from(["trunk", "layer1", "x"])),
    "branch_at": st.lists(st.sampled_from(["layer1", "layer2", "layer3", "", "."]), max_size=2),
    "milestones": st.lists(st.integers(0, 9), max_size=2), "warmup_epochs": st.floats(0, 9),
    "head_lr_scale": st.floats(0, 9),
}  # fmt: skip
CONFIGS = st.one_of(
    _WILD,
    st.builds(
        lambda method, more: {**_SMALL, "method": method, **more},
        st.sampled_from([*METHODS]),
        st.dictionaries(st.sampled_from([*_LIKELY_VALUES]), st.none(), max_size=5).flatmap(
            lambda names: st.fixed_dictionaries({name: _LIKELY_VALUES[name] for name in names})
        ),
    ),
)
FILES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"[" * 100_000, b"{}", b"null", b"[]", b"\xff\xfe", b'{"method": {"name": {}}}', b"a = [[[[["]),
    CONFIGS.map(lambda values: json.dumps(values).encode("utf-8", "surrogatepass")),
)
_FLAGS = st.sampled_from(
    [f"--{name.replace('_', '-')}" for name in FIELDS]
    + [f"--method.{name.replace('_', '-')}" for name in _OPTIONS]
    + [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(ReproduceConfig)]
    + [
        "--config",
        "--seeds",
        "--json",
        "--top",
        "--split",
        "--checkpoint",
        "--allow-import",
        "--no-augment",
        "-o",
        "-x",
    ]
)
_TYPED = st.one_of(_WORDS, st.text(st.characters(blacklist_characters="\0"), max_size=8), _NUMBERS.map(str))
_PAIR = st.one_of(
    st.builds(lambda flag, value: [flag, value], _FLAGS, _TYPED),
    st.builds(lambda flag, value: [f"{flag}={value}"], _FLAGS, _TYPED),
    st.builds(lambda word: [word], _TYPED),
)
_LIKELY = st.sampled_from(
    ["--peers 3", "--peers 4", "--topology branches", "--topology networks", "--method.temperature 2", "--lr 0.5",
     "--dtype bfloat16", "--dtype float64", "--deploy ensemble", "--deploy 1", "--mixup 0.2", "--cutout 3",
     "--freeze trunk", "--optimizer adamw", "--fan-out 2 2", "--branch-at layer2 layer3", "--protocol paper",
     "--no-augment", "--channels 3",
     "--execution stacked", "--checkpoint-activations", "--val-fraction 0", "--label-smoothing 0.9", "--deterministic"]
).map(str.split)  # fmt: skip
_TRAIN = st.builds(
    lambda method, likely, more: ["train", method, *_small_words(), *(w for p in (*likely, *more) for w in p)],
    st.sampled_from([*METHODS]),
    st.lists(_LIKELY, max_size=4),
    st.lists(_PAIR, max_size=1),
)
COMMAND_LINES = st.one_of(
    _TRAIN,
    st.builds(
        lambda command, words, pairs: [command, *words, *(word for pair in pairs for word in pair)],
        st.one_of(st.sampled_from(["train"] * 3 + [*COMMANDS]), _TYPED),
        st.lists(st.one_of(st.sampled_from([*METHODS, "okddip_table2", "digits", "models"]), _TYPED), max_size=2),
        st.lists(_PAIR, max_size=4),
    ),
)


def _small_words() -> list[str]:
    """Return the options of a run that is built quickly."""
    return [word for key, value in _SMALL.items() for word in (f"--{key.replace('_', '-')}", str(value).strip("[']"))]


def small(config: Config) -> bool:
    """Return whether a run is built quickly and without a download."""
    networks = all(name == "resnet8" for name in config.model)
    size = (config.peers or 0) <= 4 and (config.image_size or 8) <= 32
    return networks and size and config.data == "digits" and config.mesh is None and not config.pretrained


def set_up(config: Config) -> None:
    """Build the run as training does before its first step."""
    resolved = config.resolved()
    SEEN["resolved"] += 1
    if small(resolved):
        build_run(resolved)
        SEEN["set up"] += 1


def try_config(values: dict[str, Any]) -> None:
    """Make a config of any values, resolve it and build its run."""
    try:
        config = Config.from_dict(values)
        assert json.loads(json.dumps(config.to_dict())) is not None
        set_up(config)
    except InputError:
        SEEN["refused"] += 1


def try_file(content: bytes, place: Path, suffix: str) -> None:
    """Read a config file of any content."""
    path = place / f"config{suffix}"
    path.write_bytes(content)
    try:
        set_up(Config.from_file(path))
    except InputError:
        SEEN["refused"] += 1


def try_command_line(words: list[str]) -> None:
    """Run a command line; `train` only builds its run, and grids do nothing."""
    output = io.StringIO()
    run_command = commands.run_command

    def set_up_only(name: str, parsed: Parsed) -> int:
        if name == "train":
            set_up(parsed.options)
        return 0 if name in ("train", "compare", "reproduce", "demo") else run_command(name, parsed)

    commands.run_command = set_up_only
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(words)
    except SystemExit as end:  # help
        code = int(end.code or 0)
    finally:
        commands.run_command = run_command
    SEEN[f"exit code {code}"] += 1
    assert code in (0, 1, 2), code
    assert "Traceback" not in output.getvalue()


# -- files of a run ----------------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


WILD_VALUES = st.one_of(
    st.sampled_from([None, True, 0, 1, -1, 2**31, 10**9, 2**63, 10**400, 0.5, float("nan"), float("inf"), "",
                     "x", "nan", "\ud800", "x" * 20_000, [], {}, [None], [[]], {"a": 1}, "--x; touch y", "=1+1",
                     "\x1b[31m"]),
    VALUES,
)  # fmt: skip
CHANGES = st.one_of(
    st.tuples(st.just("replace"), st.lists(st.integers(0, 60), min_size=1, max_size=5), WILD_VALUES),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 60), min_size=1, max_size=5), st.none()),
    st.tuples(st.just("add"), st.lists(st.integers(0, 60), max_size=4), WILD_VALUES),
    st.tuples(st.just("cut"), st.lists(st.integers(0, 10_000), min_size=1, max_size=1), st.none()),
    st.tuples(st.just("flip"), st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.none()),
    st.tuples(
        st.just("bytes"),
        st.just([]),
        st.one_of(st.binary(max_size=30), st.sampled_from([b"[" * 200_000, b"\xef\xbb\xbf{}", b"{}", b"null", b"NaN"])),
    ),
    st.tuples(st.just("schema"), st.just([]), st.sampled_from([0, 2, 99, None, "1", 10**30])),
    st.tuples(st.sampled_from(["fifo", "folder", "missing", "blank line"]), st.just([]), st.none()),
)
RUN = ("config.json", "data.json", "environment.json", "result.json", "details.json", "metrics.jsonl", "last.pt")
GRID = ("grid.json", "table.json", "failures.json", "one-plain-network/seed0/result.json")
RUN_COMMANDS = (
    "report {run} -o out.html",
    "predict {run} image.png",
    "evaluate {run} --json --per-class --device cpu",
    "export {run} --out student.safetensors",
    "train --config {run} --out {run} --resume auto",
    "train okddip {small} --out {run} --resume auto",
    "train kd {small} --peers 1 --out anew --method.teacher {run}",
)
GRID_COMMANDS = (
    "report {grid} -o out.html",
    "compare independent {small} --seeds 1 --out {grid}",
    "export {grid}/one-plain-network/seed0 --out student.safetensors",
)
TABLE_COMMANDS = ("report {table} -o out.html", "reproduce okddip_table2 --scale smoke --seeds 1 --out {table}")
RUN_FILES = st.one_of(
    st.tuples(st.just("run"), st.sampled_from(RUN), st.sampled_from(RUN_COMMANDS), CHANGES),
    st.tuples(st.just("grid"), st.sampled_from(GRID), st.sampled_from(GRID_COMMANDS), CHANGES),
    st.tuples(st.just("table"), st.just("grid.json"), st.sampled_from(TABLE_COMMANDS), CHANGES),
)
RUN_SMALL = "--model resnet8 --data digits --train-per-class 2 --batch-size 20 --epochs 1 --device cpu --peers 3"


def make_run_folders(place: Path) -> None:
    """Train the run, the comparison and the grid.json of a published table that cases change."""
    words = RUN_SMALL.split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", "okddip", *words, "--branch-at", "fc", "--topology", "branches", "--out", "run"]) == 0
        assert main(["compare", "independent", *words, "--seeds", "1", "--out", "grid"]) == 0
    options = dataclasses.asdict(ReproduceConfig(scale="smoke", seeds=1, network=("resnet32",)))
    (place / "table").mkdir()
    grid_info = {"kind": "reproduce", "table": "okddip_table2", "options": options}
    (place / "table" / "grid.json").write_text(json.dumps(grid_info))
    shutil.copytree(place / "grid" / "one-plain-network", place / "table" / "resnet32-baseline")
    Image.new("L", (8, 8)).save(place / "image.png")


def change_values(values: Any, kind: str, path: list[int], new: Any) -> Any:
    """Replace, delete or add a value somewhere in nested lists and dictionaries; `path` picks the place."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else []
    if kind == "add" and not path:
        return {**values, "more": new} if isinstance(values, dict) else [values, new]
    if not keys:
        return new
    key = keys[(path or [0])[0] % len(keys)]
    copy = dict(values) if isinstance(values, dict) else list(values)
    if len(path) > 1:
        copy[key] = change_values(copy[key], kind, path[1:], new)
    elif kind == "delete":
        del copy[key]
    else:
        copy[key] = new
    return copy


def change_file(file: Path, kind: str, path: list[int], new: Any) -> None:
    """Change one file; the state of a checkpoint is changed within its file, which gets a valid checksum again."""
    data = file.read_bytes() if file.exists() else b"{}"
    if kind in ("fifo", "folder", "missing"):
        file.unlink(missing_ok=True)
        if kind != "missing":
            (os.mkfifo if kind == "fifo" else os.mkdir)(file)
    elif kind in ("bytes", "cut", "flip", "blank line"):
        content = bytearray(data if kind != "bytes" else new)
        if kind == "cut":
            del content[path[0] % (len(content) + 1) :]
        elif kind == "blank line":
            content = bytearray(b"\n \n{\n") + content
        for place in path if kind == "flip" else ():
            content[place % len(content)] ^= 1 + place % 255
        file.write_bytes(content)
    elif file.suffix == ".pt":
        state = torch.load(file, weights_only=True)
        state = {**state, "schema": new} if kind == "schema" else change_values(state, kind, path, new)
        with contextlib.suppress(Exception), open(file, "wb") as stream:  # not every value can be written
            write_checkpoint(state, stream)
    else:
        values = json.loads(data.splitlines()[0] if file.suffix == ".jsonl" else data)
        values = {**values, "schema": new} if kind == "schema" else change_values(values, kind, path, new)
        file.write_text(json.dumps(values) + "\n", errors="surrogatepass")


def try_run_files(case: tuple[str, str, str, tuple[str, list[int], Any]], originals: Path) -> None:
    """Change one file of a run or grid, and run a command that reads it; no other file of it may get lost."""
    folder, name, words, (kind, path, new) = case
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        names = {key: Path(place) / key for key in ("run", "grid", "table")}
        shutil.copytree(originals / folder, names[folder])
        shutil.copy(originals / "image.png", place)
        change_file(names[folder] / name, kind, path, new)
        before = Path.cwd()
        os.chdir(place)
        signal.alarm(60)  # a command that waits ends in this program's death
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                code = main(words.format(small=RUN_SMALL, **names).split())
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            signal.alarm(0)
            os.chdir(before)
        SEEN[f"exit code {code}"] += 1
        said = output.getvalue()
        assert "Traceback" not in said, said[-2000:]
        assert code in (0, 1, 2), code
        if code == 2 and words.startswith("export"):
            assert not [*Path(place).glob("student*")], "a refused export left files"


class NoTraining:
    """An executor that trains nothing: grids only read what they find."""

    def __init__(self, *_: Any) -> None: ...

    def has_capacity(self) -> bool:
        """Return True."""
        return True

    def start(self, config: Config) -> Config:
        """Return the config as the handle."""
        return config

    def poll(self, _: Config) -> tuple[None, str]:
        """Return that the run has no result."""
        return None, "not trained"

    def close(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def only_reading() -> Iterator[None]:
    """Let grids train nothing and reports do without plotly's script, and show the tracebacks of bugs."""
    plotly = SimpleNamespace(get_plotlyjs=lambda: "")
    with (
        mock.patch.dict(sys.modules, {"plotly": SimpleNamespace(offline=plotly), "plotly.offline": plotly}),
        mock.patch.dict(os.environ, {"CODISTILL_TRACEBACK": "1"}),
        mock.patch.object(workers, "Processes", NoTraining),
    ):
        yield


def search(name: str, strategy: Any, what: Any, cases: int, number: int) -> int:
    """Run `cases` random cases; print the smallest that fails and return 1, else 0."""
    run = given(strategy)(what)
    run = settings(max_examples=cases, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
                   suppress_health_check=[*HealthCheck])(run)  # fmt: skip
    began = time.perf_counter()
    SEEN.clear()
    try:
        seed(number)(run)()
        print(f"{name}: {cases} cases, {time.perf_counter() - began:.0f} s, no traceback; {dict(SEEN)}", flush=True)
        return 0
    except Exception as error:  # whatever a case may raise
        for one in getattr(error, "exceptions", [error]):
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(one.__traceback__)][-3:]
            notes = "".join(getattr(one, "__notes__", []))[:1000]
            print(f"{name}: {type(one).__name__}: {one} at {' '.join(frames)}; {notes}", flush=True)
        return 1


def main_() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["run files"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["CODISTILL_TRACEBACK"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_run_folders(Path(folder))
        read = lambda content: try_file(content, Path(folder), ".json" if len(content) % 2 else ".toml")  # noqa: E731
        parts = ("configs", CONFIGS, try_config, 4), ("files", FILES, read, 1)
        parts = *parts, ("command lines", COMMAND_LINES, try_command_line, 5)
        failed = 0
        if options.only in (None, "run files"):
            with only_reading():
                run_files = lambda case: try_run_files(case, Path(folder))  # noqa: E731
                failed += search("run files", RUN_FILES, run_files, options.cases, options.seed)
        if options.only is None:
            failed += sum(search(n, s, w, options.cases * share // 10, options.seed) for n, s, w, share in parts)
        return failed


if __name__ == "__main__":
    sys.exit(main_())
