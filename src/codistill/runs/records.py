"""Typed records of the files of a run and of a grid, which `read_record` checks against these types.

They are dictionaries at run time. Lists of figures have one entry per member. Accuracies are percentages, negative
log-likelihoods (`nll`) are nats, calibration errors (`ece`) are fractions. Keys that some version of codistill did not
write are `NotRequired`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta
from torch import Tensor

if TYPE_CHECKING:
    Measured = float
else:

    class _FloatCheck(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, float)

    class Measured(metaclass=_FloatCheck):
        """A measured figure: a float, NaN where the file has null, because the run diverged."""


Count = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(max_length=10_000)]


class StudentFigures(TypedDict):
    """Figures of the deployed student on one set."""

    top1: Measured
    nll: Measured
    ece: Measured
    top5: NotRequired[Measured]
    """Only for more than ten classes."""


class BestEpoch(StudentFigures):
    """Figures of the deployed student at its best epoch."""

    epoch: Count
    """Counted from 0."""


class Figures(TypedDict):
    """Figures of all members and of their ensemble on one set (`PeerMetrics.compute`)."""

    samples: Count
    top1: Annotated[list[Measured], Meta(min_length=1)]
    nll: list[Measured]
    ece: list[Measured]
    ensemble_top1: Measured
    ensemble_nll: Measured
    ensemble_ece: Measured
    diversity: Measured
    disagreement: Measured
    both_wrong: Measured
    error_correlation: NotRequired[Measured]
    top5: NotRequired[list[Measured]]
    ensemble_top5: NotRequired[Measured]


class RunFigures(TypedDict):
    """Figures of a run on one set: members, mean teachers where the method has them, deployed student."""

    members: Figures
    ema: Figures | None
    swa: NotRequired[Figures | None]
    student: StudentFigures


class TrainFigures(TypedDict):
    """Means over the samples of one training epoch."""

    loss: Measured
    top1: list[Measured]
    distill: list[Measured]


class EpochLine(TypedDict):
    """One line of metrics.jsonl."""

    epoch: Count
    """Counted from 0."""
    lr: Measured
    weight: Measured
    """Weight of the distillation loss."""
    train: TrainFigures
    skipped_steps: NotRequired[Count]
    method: NotRequired[dict[str, list[Any]]]
    """Figures of the method by name: one number, or one list of numbers, per member."""
    val: NotRequired[Figures]
    val_student: NotRequired[StudentFigures]
    val_ema: NotRequired[Figures]
    val_swa: NotRequired[Figures]
    test: NotRequired[Figures]
    test_student: NotRequired[StudentFigures]
    test_ema: NotRequired[Figures]
    test_swa: NotRequired[Figures]


class Cost(TypedDict):
    """What training and deploying cost; on a mesh only `measured_on` is known."""

    measured_on: NotRequired[str]
    training_flops_a_sample: NotRequired[float | None]
    training_passes: NotRequired[float | None]
    """The same in passes (forward and backward) of the plain network that is deployed."""
    samples_seen: NotRequired[Count]
    flops_an_image: NotRequired[float]
    ms_an_image: NotRequired[float]
    ms_an_image_of_64: NotRequired[float]
    peak_mb: NotRequired[float | None]
    training_peak_mb: NotRequired[float | None]


class RunResult(TypedDict):
    """What result.json holds: the figures of a complete run."""

    deployed: Name
    """`member 3`, `ensemble`, `mean teacher 0`, `EMA of member 3` or `SWA of member 3`."""
    student: StudentFigures
    protocol: Name
    epochs: Count
    test: Figures
    parameters_trained: Count
    parameters_deployed: Count
    seconds: Measured
    split: NotRequired[str]
    augmentation: NotRequired[str]
    execution: NotRequired[str]
    cost: NotRequired[Cost]
    test_ema: NotRequired[Figures]
    test_swa: NotRequired[Figures]
    best_validation: NotRequired[BestEpoch]
    best_test: NotRequired[BestEpoch]


class ReliabilityBin(TypedDict):
    """The images whose highest probability lies in one of 15 equal intervals."""

    samples: Count
    confidence: Measured
    accuracy: Measured


class Details(TypedDict, total=False):
    """What details.json holds; a run that is not complete has none."""

    deployed: Name
    classes: list[Name]
    reliability: list[ReliabilityBin]
    ensemble_reliability: list[ReliabilityBin]
    confusion: list[list[Count]]
    """A row per true class, a column per predicted class."""


class Environment(TypedDict, total=False):
    """What environment.json holds: where a run was trained."""

    codistill: Name
    git_commit: Name | None
    """Of the checkout of codistill; None for an installed package."""
    user_git_commit: Name | None
    """Of the working folder, where it is another checkout."""
    command: str
    started: Name
    python: Name
    torch: Name
    torchvision: Name
    numpy: Name
    machine: Name
    cpus: int | None
    threads: int
    gpu: Name | None


class DataInfo(TypedDict):
    """What data.json holds: how images become inputs, and what outputs mean."""

    name: Name
    classes: Annotated[list[Name], Meta(min_length=1, max_length=1_000_000)]
    channels: Annotated[int, Meta(ge=1, le=256)]
    image_size: Annotated[int, Meta(ge=1, le=16_384)]
    mean: list[float]
    std: list[float]
    fit: NotRequired[Literal["crop", "stretch"]]
    """Missing in early run folders."""
    bits: NotRequired[int]
    """Bits that image files of 16 bits a pixel use, where fewer."""
    checksum: NotRequired[Name]
    temperature: NotRequired[float]
    """Fitted by `evaluate --calibrate` to the newest checkpoint."""
    temperature_best: NotRequired[float]
    """Fitted to best.pt."""


class StudentMetadata(TypedDict, total=False):
    """What the metadata of an exported student holds, as far as a teacher needs it."""

    model: Name
    classes: list[Name]
    mean: list[float]
    std: list[float]


class GridRow(TypedDict):
    """One row of a comparison."""

    label: Name
    baseline: Name | None


class GridInfo(TypedDict):
    """What grid.json holds: the rows of a comparison, or the options with which a published table is trained."""

    kind: Literal["compare", "reproduce"]
    title: NotRequired[str]
    seeds: NotRequired[Annotated[int, Meta(ge=1, le=100_000)]]
    first_seed: NotRequired[Annotated[int, Meta(ge=0, le=10**9)]]
    summary: NotRequired[list[str]]
    cells: NotRequired[Annotated[list[GridRow], Meta(max_length=10_000)]]
    table: NotRequired[Name]
    options: NotRequired[dict[str, Any]]


class TrackerState(TypedDict):
    """What tracker.json holds: the run's name in a viewer, and how many epochs it has been given."""

    id: Name
    epochs: Annotated[int, Meta(ge=0)]


class TableFile(TypedDict):
    """What table.json holds: the table of a grid as text."""

    title: str
    rows: Annotated[list[dict[str, str]], Meta(min_length=1)]
    notes: NotRequired[list[str]]
    failures: NotRequired[list[str]]


class CheckpointState(TypedDict):
    """What a checkpoint holds; `write_checkpoint` adds `schema` and `rng`, `load_newest` adds `file`."""

    peers: dict[str, Tensor]
    method: dict[str, Any]
    ema: dict[str, Tensor] | None
    average: NotRequired[dict[str, Tensor]]
    """Of the weights, deployed by `--deploy ema` or `swa`."""
    optimizers: list[dict[str, Any]]
    epoch: Count
    step: Count
    """Steps done in this epoch."""
    seconds: float
    best: BestEpoch | None
    sums: dict[str, Tensor]
    execution: NotRequired[Literal["loop", "stacked"]]
    best_validation: NotRequired[BestEpoch | None]
    skipped: NotRequired[Any]
    schema: NotRequired[int]
    rng: NotRequired[dict[str, Any]]
    file: NotRequired[str]
