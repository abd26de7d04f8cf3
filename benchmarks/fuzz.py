"""Run codistill with random configs, config files, command lines and run files: none may end in a traceback.

    python benchmarks/fuzz.py --cases 10000
    python benchmarks/fuzz.py --only "run files, command line" --cases 200

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
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from codistill.cli import commands
from codistill.cli.main import main
from codistill.cli.options import COMMANDS, Parsed
from codistill.config.config import Config, ReproduceConfig
from codistill.config.methods import METHODS
from codistill.training.build import build_run
from codistill.utils.errors import InputError
from run_files import (
    NUMBERS,
    RUN_FILES,
    SEEN,
    VALUES,
    WORDS,
    make_run_folders,
    only_reading,
    run_command_line,
    try_run_files,
)

FIELDS = [f.name for f in dataclasses.fields(Config)]
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
_TYPED = st.one_of(WORDS, st.text(st.characters(blacklist_characters="\0"), max_size=8), NUMBERS.map(str))
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
    parser.add_argument("--only", choices=["run files", "run files, command line"])
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
        if options.only == "run files, command line":  # each case is a process of its own, and grids train
            through = lambda case: try_run_files(case, Path(folder), run_command_line)  # noqa: E731
            failed += search("run files", RUN_FILES, through, options.cases, options.seed)
        if options.only is None:
            failed += sum(search(n, s, w, options.cases * share // 10, options.seed) for n, s, w, share in parts)
        return failed


if __name__ == "__main__":
    sys.exit(main_())
