"""The options of the commands that have no config of their own, as dataclasses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from codistill.config import Checkpoint, Device


@dataclass
class EvaluateOptions:
    """Evaluate every member and the ensemble of a trained run."""

    split: Literal["test", "val"] = "test"
    """Which part of the run's data to evaluate on."""
    data: str | None = None
    """Evaluate on the test part of another data set, with the same classes and image size."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since training."""
    device: Device = "auto"
    """Device to run on."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""
    per_class: bool = False
    """Also print recall, precision and the most frequent wrong guess of the deployed student for every class."""
    confusion: str | None = None
    """Also write the deployed student's confusion matrix to this CSV file."""
    contact_sheet: str | None = None
    """Also write the deployed student's most confident mistakes, with their images and file names, to this PNG file."""
    calibrate: bool = False
    """Fit a temperature on the run's validation part, keep it for `predict`, and print calibration with and without."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass
class PredictOptions:
    """Classify image files with the deployed student; a folder means all images in it."""

    top: int = 5
    """Guesses per image, the most probable first."""
    json: bool = False
    """Print JSON instead of CSV."""
    batch_size: int = 64
    """Images per batch."""
    device: Device = "auto"
    """Device to run on."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""


@dataclass
class ExportOptions:
    """Write the deployed student."""

    out: str | None = None
    """File to write, default student.safetensors, .pt2 or .onnx in the run folder; the model card is put beside it."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """safetensors: weights; torch-export: a program for torch.export.load; onnx: with a free batch size."""
    license: str = "unknown"
    """License of the weights, as the Hub spells it (apache-2.0, mit, ...), for the model card."""
    checkpoint: Checkpoint = "last"
    """last: the newest good one; best: the best epoch on validation (runs with a validation part)."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since training."""


@dataclass
class ReportOptions:
    """Write one self-contained page about runs, grids and tables: no network is needed to read it."""

    out: str = "report.html"
    """File to write (also -o)."""
    title: str | None = None
    """Heading of the page; default the name of what it shows."""
    contact_sheets: bool = False
    """Also show, of the first run of each row, the deployed student's most confident mistakes on test images, which
    become part of the page. Needs the images, and loads the networks."""


@dataclass
class ListOptions:
    """List methods, models, data sets, published tables or branch points."""

    model: str = "resnet32"
    """Network whose branch points are listed."""
    image_size: int | None = None
    """Height and width of its images (branch-points); default the network's native size."""


@dataclass
class DemoOptions:
    """Train peers on real images, and compare them with baselines of equal cost."""

    data: str = "digits"
    """digits (needs no download), fashion-mnist or cifar100."""
    data_dir: str | None = None
    """Folder of the data set, which is downloaded there if it is missing; default ./data."""
    out: str | None = None
    """Folder of the runs; default demo/DATA."""
    seeds: int | None = None
    """Number of seeds; default the recipe's."""
    workers: int = 2
    """Runs trained at the same time."""


@dataclass
class CheckOptions:
    """Check this machine: every method's loss and gradients against stored figures, and a run of two steps."""

    device: Device = "auto"
    """Device to check."""


@dataclass
class CompletionOptions:
    """Print a shell's completion script."""
