"""Temperature scaling of the deployed student, kept in the run folder for `codistill predict`."""

from __future__ import annotations

from pathlib import Path

from codistill.config.config import Checkpoint
from codistill.evaluation.calibration import fit_temperature
from codistill.training.loaders import curve_loader
from codistill.training.run import Run
from codistill.training.student import deployed_scores
from codistill.utils.errors import InputError
from codistill.utils.files import read_json, write_json


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
    data_info = read_json(folder / "data.json") or run.data.metadata()
    write_json(folder / "data.json", data_info | {temperature_key(checkpoint): temperature})
    return temperature
