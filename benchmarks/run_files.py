"""Files of a run, a comparison or a published table, of which one is changed before a command reads them.

A part of `fuzz.py`: the cases, and how one is run, in this process or through the real command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from PIL import Image

from codistill.cli.main import main
from codistill.config.config import Config, ReproduceConfig
from codistill.reproduce import workers
from codistill.runs.checkpoint import write_checkpoint

SEEN: Counter[str] = Counter()
"""Number of cases by outcome."""
WORDS = st.sampled_from(
    ["", "auto", "none", "okddip", "pcl", "kdcl", "kd", "ensemble", "ema", "0", "1", "2", "3", "-1", "1e400", "nan",
     "inf", "0.5", "resnet8", "timm:", ":x", "os:path", "hf:", "torchvision:resnet18,x", "digits", "npz:", "folder:",
     "npz:/dev/null", "folder:/dev/null", "layer2", "data=1,peer=2", "data=0", "branches", "networks", "bfloat16",
     "float16", "cuda", "true", "None", "[", "{}", "--", "-", "=", "\u2028", "\x1b[31m", "9" * 400, "x" * 300]
)  # fmt: skip
STRINGS = st.one_of(WORDS, st.text(max_size=12))
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([10**9, 2**31, 2**63, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-320, 1e308]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS)
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(STRINGS, v, max_size=2)), max_leaves=4
)


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
READING = ("report", "predict", "evaluate", "export")
"""Commands that leave every file of a run as it is."""
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


def run_here(words: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all that it printed."""
    output = io.StringIO()
    signal.alarm(60)  # a command that waits ends in this program's death
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        signal.alarm(0)
    return code, output.getvalue()


def run_command_line(words: list[str]) -> tuple[int, str]:
    """Run a command as a process of its own."""
    command = [sys.executable, "-m", "codistill", *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def contents(folder: Path, changed: Path) -> dict[str, bytes]:
    """Return the files of a folder but the one that was changed."""
    files = (file for file in folder.rglob("*") if file.is_file() and file != changed)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def try_run_files(case: tuple[str, str, str, tuple[str, list[int], Any]], originals: Path, run: Any = run_here) -> None:
    """Change one file of a run or grid, and run a command that reads it; no other file of it may get lost."""
    folder, name, words, (kind, path, new) = case
    with tempfile.TemporaryDirectory() as place:
        names = {key: Path(place) / key for key in ("run", "grid", "table")}
        shutil.copytree(originals / folder, names[folder])
        shutil.copy(originals / "image.png", place)
        change_file(names[folder] / name, kind, path, new)
        kept = contents(names[folder], names[folder] / name)
        before = Path.cwd()
        os.chdir(place)
        try:
            code, said = run(words.format(small=RUN_SMALL, **names).split())
        finally:
            os.chdir(before)
        SEEN[f"exit code {code}"] += 1
        assert "Traceback" not in said, said[-2000:]
        assert "a bug in codistill" not in said, said[-2000:]
        assert code in (0, 1, 2), code
        if code == 2 and words.startswith("export"):
            assert not [*Path(place).glob("student*")], "a refused export left files"
        now = contents(names[folder], names[folder] / name)
        lost = [file for file in kept if file not in now or (words.startswith(READING) and now[file] != kept[file])]
        assert not lost, f"lost or changed: {lost}; exit code {code}; {said[-500:]}"


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
