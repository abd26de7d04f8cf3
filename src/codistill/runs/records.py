"""Typed records of what a run writes: the lines of metrics.jsonl, result.json, data.json and the checkpoint.

They are dictionaries at run time, exactly as in the files. Lists have one entry per member. Accuracies are percentages,
negative log-likelihoods (`nll`) are nats, calibration errors (`ece`) are fractions.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from torch import Tensor


class StudentFigures(TypedDict):
    """Figures of the deployed student on one set."""

    top1: float
    nll: float
    ece: float
    top5: NotRequired[float]
    """Only for more than ten classes."""


class BestEpoch(StudentFigures):
    """Figures of the deployed student at its best epoch."""

    epoch: int
    """Counted from 0."""


class Figures(TypedDict):
    """Figures of all members and of their ensemble on one set (`PeerMetrics.compute`)."""

    samples: int
    top1: list[float]
    nll: list[float]
    ece: list[float]
    ensemble_top1: float
    ensemble_nll: float
    ensemble_ece: float
    diversity: float
    disagreement: float
    both_wrong: float
    error_correlation: NotRequired[float]
    top5: NotRequired[list[float]]
    ensemble_top5: NotRequired[float]


class RunFigures(TypedDict):
    """Figures of a run on one set: members, mean teachers where the method has them, deployed student."""

    members: Figures
    ema: Figures | None
    student: StudentFigures


class TrainFigures(TypedDict):
    """Means over the samples of one training epoch."""

    loss: float
    top1: list[float]
    distill: list[float]


class EpochLine(TypedDict):
    """One line of metrics.jsonl."""

    epoch: int
    """Counted from 0."""
    lr: float
    weight: float
    """Weight of the distillation loss."""
    train: TrainFigures
    skipped_steps: NotRequired[int]
    method: NotRequired[dict[str, list[float]]]
    val: NotRequired[Figures]
    val_student: NotRequired[StudentFigures]
    val_ema: NotRequired[Figures]
    test: NotRequired[Figures]
    test_student: NotRequired[StudentFigures]
    test_ema: NotRequired[Figures]


class Cost(TypedDict):
    """What training and deploying cost; on a mesh only `measured_on` is known."""

    measured_on: str
    training_flops_a_sample: NotRequired[int | None]
    samples_seen: NotRequired[int]
    flops_an_image: NotRequired[int]
    ms_an_image: NotRequired[float]
    ms_an_image_of_64: NotRequired[float]
    peak_mb: NotRequired[float | None]
    training_peak_mb: NotRequired[float | None]


class RunResult(TypedDict):
    """What result.json holds: the figures of a complete run."""

    deployed: str
    """`member 3`, `ensemble` or `mean teacher 0`."""
    student: StudentFigures
    protocol: str
    epochs: int
    test: Figures
    parameters_trained: int
    parameters_deployed: int
    split: str
    augmentation: str
    seconds: float
    execution: str
    cost: NotRequired[Cost]
    test_ema: NotRequired[Figures]
    best_validation: NotRequired[BestEpoch]
    best_test: NotRequired[BestEpoch]


class DataInfo(TypedDict):
    """What data.json holds: how images become inputs, and what outputs mean."""

    name: str
    classes: list[str]
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    fit: NotRequired[str]
    """`crop` or `stretch`; missing in early run folders."""
    bits: NotRequired[int]
    """Bits that image files of 16 bits a pixel use, where fewer."""
    checksum: NotRequired[str]
    temperature: NotRequired[float]
    """Fitted by `evaluate --calibrate` to the newest checkpoint."""
    temperature_best: NotRequired[float]
    """Fitted to best.pt."""


class CheckpointState(TypedDict):
    """What a checkpoint holds; `write_checkpoint` adds `schema` and `rng`, `load_newest` adds `file`."""

    peers: dict[str, Tensor]
    method: dict[str, Any]
    ema: dict[str, Tensor] | None
    optimizers: list[dict[str, Any]]
    execution: str
    epoch: int
    step: int
    """Steps done in this epoch."""
    seconds: float
    best: BestEpoch | None
    sums: dict[str, Tensor]
    best_validation: NotRequired[BestEpoch | None]
    skipped: NotRequired[Any]
    schema: NotRequired[int]
    rng: NotRequired[dict[str, Any]]
    file: NotRequired[str]
