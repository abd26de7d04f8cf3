"""Sends a run's metrics to a viewer: TensorBoard, or a module with wandb's interface (wandb itself, trackio)."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codistill.config import Config
from codistill.runs.record_files import read_record
from codistill.runs.records import EpochLine, TrackerState
from codistill.utils import InputError, write_json


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Return the numbers in nested dictionaries and lists as (path, number) pairs.

    >>> flatten({"train": {"loss": 2, "top1": [50.0, 60.0]}})
    [('train/loss', 2.0), ('train/top1/0', 50.0), ('train/top1/1', 60.0)]
    """
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            pairs += flatten({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            pairs.append((prefix + name, float(value)))
    return pairs


def find_tracker(kind: str) -> Any:
    """Import a viewer and return its module, None for `none`.

    Raises:
        InputError: the viewer is not installed.
    """
    if kind == "none":
        return None
    try:
        return importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError:
        raise InputError(f"--tracker {kind} needs: pip install 'codistill[{kind}]'") from None


class Tracker:
    """Logs every epoch's metrics once, also where a killed run does epochs again; `none` logs nothing.

    Args:
        kind: The viewer.
        config: The resolved config; names the run folder.
        epoch: The first epoch that will be logged; curves of earlier parts of the run continue.

    Raises:
        InputError: the viewer is not installed.
    """

    def __init__(self, kind: str, config: Config, epoch: int = 0) -> None:
        self.writer: Any = None
        """TensorBoard's writer."""
        self.module: Any = None
        """A module with wandb's `log` and `finish`."""
        folder = Path(str(config.out))
        module = find_tracker(kind)
        if module is None:
            return
        if kind == "tensorboard":  # which hides what an earlier part of the run logged from this epoch on
            self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)
            return
        self.module = module
        self.state_path = folder / "tracker.json"
        self.state: TrackerState = read_record(self.state_path, TrackerState) or {
            "id": secrets.token_hex(8),
            "epochs": 0,
        }
        kwargs: dict[str, Any] = {"project": "codistill", "name": str(folder), "config": config.to_dict()}
        kwargs["resume"] = "allow"  # one run in the viewer, however often this one is continued
        if kind == "wandb":  # which would ask for an account
            mode = os.environ.get("WANDB_MODE", "offline")
            kwargs |= {"id": self.state["id"], "dir": str(folder), "mode": mode}
        module.init(**kwargs)

    def log(self, line: EpochLine) -> None:
        """Log every number of an epoch."""
        if self.writer is not None:
            for name, value in flatten(line):
                self.writer.add_scalar(name, value, line["epoch"])
        if self.module is not None and line["epoch"] >= self.state["epochs"]:
            self.module.log(dict(flatten(line)), step=line["epoch"])
            self.state["epochs"] = line["epoch"] + 1
            write_json(self.state_path, self.state)

    def close(self) -> None:
        """Flush what is pending."""
        if self.writer is not None:
            self.writer.close()
        if self.module is not None:
            self.module.finish()
