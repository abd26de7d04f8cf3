"""The run folder: resolved config, environment, metrics, checkpoints; everything written atomically.

config.json        what --config takes to repeat the run
data.json          classes, channels, size and normalising of the images: what predict needs; and their checksum
environment.json   versions, hardware, git commit, command
metrics.jsonl      one line an epoch
last.pt            the newest checkpoint: weights, optimiser, position, every random state; loads with weights_only
details.json       what a report draws: reliability by bins, confusion of the deployed member
result.json        the final figures; it exists exactly when the run is complete
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill.config import Config, InputError, MachineError, MethodConfig

SCHEMA = 1
# What may differ between a run and its continuation without changing its result.
_FREE = {
    *("out", "resume", "data_dir", "checkpoint_every_epochs", "checkpoint_every_steps", "tracker", "device"),
    *("mesh", "collective_timeout", "checkpoint_activations", "data_workers", "skip_corrupt"),
}


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file so that a reader finds the old or the new one whole, whatever happens.

    Raises:
        MachineError: the disk is full or the folder cannot be written to.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise MachineError(f"cannot write {path}: {error.strerror or error}; what was there is kept") from None


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


class RunFolder:
    """One run's folder.

    Args:
        config: The resolved config; `config.out` names the folder.
        resume: Whether to continue what the folder holds.

    Raises:
        InputError: the folder holds another run, or this one and `resume` is not asked for.
    """

    def __init__(self, config: Config) -> None:
        assert config.out is not None
        resume = config.resume
        self.path = Path(resume if resume not in (None, "auto") else config.out)
        self.config = config
        held = self.path / "config.json"
        if resume not in (None, "auto") and not held.exists():
            raise InputError(f"--resume {resume}: there is no run there (no config.json)")
        if held.exists():
            self._compare(Config.from_file(held), asked=resume is not None)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"--out {self.path} exists and is no run of codistill; name a new or empty folder")
        self.checkpoint_path = self.path / "last.pt"

    def _compare(self, held: Config, asked: bool) -> None:
        theirs, ours = held.to_dict(), self.config.to_dict()
        keys = sorted(ours, key=lambda k: k == "method")  # last: its ramp follows from the epochs
        differing = [k for k in keys if k not in _FREE and json.dumps(ours[k]) != json.dumps(theirs.get(k))]
        if differing:
            key = differing[0]
            flag = "--resume" if asked else "--out"
            was, now = theirs.get(key), ours[key]
            if key == "method" and isinstance(was, dict) and was.get("name") == now.get("name"):
                key = "method." + next(k for k in now if now[k] != was.get(k))
                was, now = was.get(key[7:]), now[key[7:]]
            else:
                was, now = (v.get("name") if isinstance(v, dict) else v for v in (was, now))
            raise InputError(
                f"{flag}: {self.path} holds another run (--{key.replace('_', '-')} was {was}, now {now}); "
                "name another --out, or repeat the run with its own options"
            )
        if not asked:
            raise InputError(
                f"--out {self.path} holds this run already; continue it with --resume auto, or name another"
            )

    @property
    def complete(self) -> bool:
        """Whether the run has ended and its result is written."""
        return (self.path / "result.json").exists()

    def begin(self) -> None:
        """Write what describes the run, once."""
        if not (self.path / "config.json").exists():
            write_json(self.path / "environment.json", environment(self.config))
            write_json(self.path / "config.json", self.config.to_dict() | {"resume": None})

    def read(self, name: str) -> Any:
        """Return what one of the folder's JSON files holds, None where there is none yet."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def describe(self, about: dict[str, Any]) -> None:
        """Write what the networks take and name (data.json), once."""
        if not (self.path / "data.json").exists():
            write_json(self.path / "data.json", about)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MachineError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None

    def lines(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl."""
        return read_lines(self.path / "metrics.jsonl")

    def keep_lines(self, epochs: int) -> None:
        """Drop the lines of epochs after the first `epochs`: a resumed run writes them again."""
        kept = [line for line in self.lines() if line["epoch"] < epochs]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path / "metrics.jsonl", lambda stream: stream.write(text.encode()))

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, with every random state, atomically."""
        state = {"schema": SCHEMA, **state, "rng": rng_state()}
        write_atomically(self.checkpoint_path, lambda stream: torch.save(state, stream))

    def load(self) -> dict[str, Any] | None:
        """Return the newest checkpoint, or None where there is none yet."""
        return load_checkpoint(self.checkpoint_path) if self.checkpoint_path.exists() else None


class SilentFolder(RunFolder):
    """The run folder as ranks other than the first see it: they check and write nothing."""

    def __init__(self, config: Config) -> None:
        assert config.out is not None
        self.path = Path(config.resume if config.resume not in (None, "auto") else config.out)
        self.config = config
        self.checkpoint_path = self.path / "last.pt"

    def begin(self) -> None:
        """Write nothing."""

    def log(self, line: dict[str, Any]) -> None:
        """Write nothing."""

    def keep_lines(self, epochs: int) -> None:
        """Write nothing."""

    def save(self, state: dict[str, Any]) -> None:
        """Write nothing."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that a kill left unfinished is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises:
        InputError: it is missing, damaged, or was written by a newer codistill.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; is {path.parent} a run folder whose training has begun?") from None
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or "schema" not in state:
        raise InputError(f"{path} is no checkpoint of codistill")
    if state["schema"] > SCHEMA:
        raise InputError(f"{path} was written by a newer codistill (schema {state['schema']}); upgrade codistill")
    return state


def rng_state() -> dict[str, Any]:
    """Return every random state as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put every random state back."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def environment(config: Config) -> dict[str, Any]:
    """Describe what the run ran on."""
    import torchvision

    from codistill import __version__

    assert isinstance(config.method, MethodConfig)
    return {
        "codistill": __version__,
        "git_commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_commit() -> str | None:
    """Return the commit of the checkout codistill runs from, with a `+` if it was changed; None outside one."""
    folder = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=5)  # noqa: E731
        commit = run("rev-parse", "HEAD")
        if commit.returncode:
            return None
        return commit.stdout.strip() + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return (path, number) pairs of nested figures."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            pairs += flatten({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + name, float(value)))
    return pairs
