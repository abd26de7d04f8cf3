"""Temperature scaling of the deployed student, kept in the run folder for `codistill predict`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codistill.config import Checkpoint
from codistill.evaluation import fit_temperature
from codistill.runs import DataInfo, read_record, write_record
from codistill.training import Run, curve_loader, deployed_scores
from codistill.utils import InputError


def temperature_key(checkpoint: Checkpoint) -> str:
    """Return the key of data.json that holds the temperature of a checkpoint's weights."""
    return "temperature" if checkpoint == "last" else f"temperature_{checkpoint}"


def calibrate_student(run: Run, folder: Path, checkpoint: Checkpoint) -> float:
    """Fit the temperature on the run's validation images, write it to data.json and return it.

    Raises:
        InputError: the run has no validation images.
    """
    validation = curve_loader(run) if len(run.splits.val) else None
    if validation is None:
        raise InputError("--calibrate fits on validation images, and this run kept none (--val-fraction 0)")
    temperature = fit_temperature(*deployed_scores(run, validation))
    data_info = read_record(folder / "data.json", DataInfo) or run.data.metadata()
    write_record(folder / "data.json", {**data_info, temperature_key(checkpoint): temperature})
    return temperature


def read_temperature(info: Mapping[str, Any] | None, checkpoint: Checkpoint) -> float:
    """Return the temperature that was fitted to a checkpoint's weights; 1 where none was."""
    return 1.0 if info is None else info.get(temperature_key(checkpoint), 1.0)
