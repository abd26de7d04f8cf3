"""Sends a run's metrics to a viewer: TensorBoard, or a module with wandb's interface (wandb itself, trackio)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codistill.config import Config
from codistill.runs.records import EpochLine
from codistill.utils import InputError


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


class Tracker:
    """Logs every epoch's metrics; `none` logs nothing.

    Args:
        kind: The viewer.
        config: The resolved config; names the run folder.

    Raises:
        InputError: the viewer is not installed.
    """

    def __init__(self, kind: str, config: Config) -> None:
        self.writer: Any = None
        """TensorBoard's writer."""
        self.module: Any = None
        """A module with wandb's `log` and `finish`."""
        folder = Path(str(config.out))
        if kind == "none":
            return
        name = "torch.utils.tensorboard" if kind == "tensorboard" else kind
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise InputError(f"--tracker {kind} needs: pip install {kind}") from None
        if kind == "tensorboard":
            self.writer = module.SummaryWriter(str(folder / "tensorboard"))
            return
        self.module = module
        kwargs: dict[str, Any] = {"project": "codistill", "name": str(folder), "config": config.to_dict()}
        if kind == "wandb":  # which would ask for an account
            kwargs |= {"dir": str(folder), "mode": os.environ.get("WANDB_MODE", "offline")}
        module.init(**kwargs)

    def log(self, line: EpochLine) -> None:
        """Log every number of an epoch."""
        if self.writer is not None:
            for name, value in flatten(line):
                self.writer.add_scalar(name, value, line["epoch"])
        if self.module is not None:
            self.module.log(dict(flatten(line)), step=line["epoch"])

    def close(self) -> None:
        """Flush what is pending."""
        if self.writer is not None:
            self.writer.close()
        if self.module is not None:
            self.module.finish()
