"""Checks of run folders that `kills.py` makes after every kill: every file readable, and two folders equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from codistill.runs import read_epoch_lines
from codistill.runs.checkpoint import list_checkpoints, load_checkpoint


def unreadable(folder: Path) -> list[str]:
    """Return the files of a folder that cannot be read; an unfinished last line of metrics.jsonl is allowed."""
    bad = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".pt":
                load_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "metrics.jsonl":
                read = len(read_epoch_lines(path))
                if read < len(path.read_text().splitlines()) - 1:
                    bad.append(str(path))
        except (ValueError, OSError) as error:
            bad.append(f"{path}: {error}")
    return bad


def behind(folder: Path, done: int, steps: int) -> int:
    """Return the number of finished steps that a resumed run repeats."""
    newest = next(iter(list_checkpoints(folder)), None)
    if newest is None:
        return done
    state = load_checkpoint(newest)
    return done - (state["epoch"] * steps + state["step"])


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Return the path of the first difference of two states, None if they are equal; times and paths are ignored."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        keys = (one.keys() | other.keys()) - {"seconds", "cost", "file", "s per run"}
        return next((d for k in sorted(keys, key=str) if (d := difference(one[k], other[k], f"{path}/{k}"))), None)
    elif isinstance(one, list | tuple):
        same = len(one) == len(other)
        found = next((d for i, v in enumerate(one) if same and (d := difference(v, other[i], f"{path}/{i}"))), None)
        if found:
            return found
    else:
        same = one == other or (one != one and other != other)
    return None if same else path


def differing(one: Path, other: Path) -> str | None:
    """Return the first difference of two finished runs, None if they are equal."""
    if (one / "metrics.jsonl").read_text() != (other / "metrics.jsonl").read_text():
        return f"{one}: metrics"
    for name in ("last.pt", "last-1.pt", "best.pt"):
        if found := difference(load_checkpoint(one / name), load_checkpoint(other / name)):
            return f"{one}: {name}{found}"
    for name in ("result.json", "details.json", "data.json"):
        if found := difference(*(json.loads((p / name).read_text()) for p in (one, other))):
            return f"{one}: {name}{found}"
    return None
