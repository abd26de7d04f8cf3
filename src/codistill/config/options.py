"""The options of a run, in sections; their attribute docstrings are the help of the command line.

`Config` inherits from all sections, so that outside it is flat: `config.lr`, `Config(lr=0.1)`, `--lr 0.1`. Code that
needs one section takes that section's class: `def make_loader(options: DataOptions)`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from codistill.config.method_base import MethodConfig, Topology
from codistill.config.methods import OKDDipConfig
from codistill.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_1_SECOND,
    EACH_AT_LEAST_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    FROM_0_TO_1000,
    FROM_8_TO_16,
    FROM_8_TO_4096,
    SEED,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Checkpoint = Literal["last", "best"]


if TYPE_CHECKING:

    class MethodField:
        """Declares to type checkers that the field `method` takes a name too, and is always read as a config."""

        def __get__(self, instance: object, owner: object = None) -> MethodConfig: ...
        def __set__(self, instance: object, value: MethodConfig | str) -> None: ...


@dataclass
class NetworkOptions:
    """What is trained: the method, and the networks."""

    if TYPE_CHECKING:
        method: MethodField = MethodField()
    else:
        method: MethodConfig = field(default_factory=OKDDipConfig)
    """The method, by name or as its config."""
    model: tuple[str, ...] | str = ("resnet32",)
    """The network: a built-in name, timm:NAME, torchvision:NAME, hf:PATH or package.module:callable, with options after
    commas (torchvision:mobilenet_v2,width_mult=0.5). Several names, one per peer, train peers of different sizes."""
    _: KW_ONLY
    pretrained: bool = False
    """Start from the weights that the network's library offers; every peer gets a new classifier head."""
    weights: str | None = None
    """Start from this file of weights (.safetensors or a state dict); every peer gets a new classifier head."""
    channels: Literal[1, 3] | None = None
    """Input channels of the networks: gray images are repeated to 3, color images are converted to gray for 1. Default:
    the data set's, or 3 for torchvision's networks and pretrained ones of transformers."""


@dataclass
class DataOptions:
    """The images, how they are split, read and augmented."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, npz:PATH (x_train, y_train, x_test, y_test), or folder:PATH."""
    data_dir: str | None = None
    """Folder of the data set, to read from or download to: torchvision's layout, or DIR/cifar100.npz; default
    ./data."""
    train_per_class: Annotated[int | None, AT_LEAST_1] = None
    """Train on only this many images per class (taken after the validation split), the same for every seed."""
    val_fraction: Annotated[float, FROM_0_BELOW_1] = 0.1
    """Fraction of the training set kept for validation: deterministic, balanced over classes, the same for every
    seed."""
    image_size: Annotated[int | None, FROM_8_TO_4096] = None
    """Height and width to which the images of a folder are resized; default their own, or 224 if they differ."""
    data_pipeline: Literal["auto", "resident", "files"] = "auto"
    """resident: decode the images of a folder once, into memory; files: decode them in worker processes in every epoch,
    with random resized crops for training and center crops for evaluation. auto: files if the decoded images take 2 GiB
    or more."""
    data_workers: Annotated[int | None, FROM_0_TO_1000] = None
    """Processes that decode image files; 0 decodes in the training process. Default: one per CPU, at most 8."""
    bits: Annotated[int, FROM_8_TO_16] = 16
    """Bits that image files of 16 bits a pixel use: 12 for many cameras and microscopes, whose images are black
    otherwise."""
    skip_corrupt: bool = False
    """Leave out image files that cannot be read (with files, the next image of the same class replaces one)."""
    balanced_sampling: bool = False
    """Draw every class equally often in an epoch; the length of the epoch stays the same."""
    sampler: str = "uniform"
    """uniform: every image once an epoch; pairs:M: every batch holds M images of each of batch size / M classes, drawn
    anew for each batch, in as many whole batches as the images fill."""
    normalize: str | None = None
    """imagenet, dataset, or means and standard deviations of pixels / 255 (0.5,0.5,0.5,0.25,0.25,0.25). Default: those
    that a pretrained network was trained with, else the data set's own."""
    augment: bool = True
    """Random crops (and flips, if the data set allows them), drawn again for every sample, view and epoch."""
    flip: bool = True
    """Swap left and right at random, if the data set allows it; --no-flip for images where the side matters."""
    cutout: Annotated[int, AT_LEAST_0] = 0
    """Side in pixels of a random square set to the mean color (0 = off)."""
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations on each training image, after crop and flip: two at one magnitude, or one at a random one."""
    random_erasing: Annotated[float, FROM_0_TO_1] = 0.0
    """Probability that a random rectangle of a training image is set to the mean color; 0 = off, 0.25 is usual."""
    label_smoothing: Annotated[float, FROM_0_BELOW_1] = 0.0
    """Part of every label that is spread over all classes."""
    mixup: Annotated[float, AT_LEAST_0] = 0.0
    """Strength (the Beta distribution's parameter) of mixing pairs of images and labels; 0 = off, 0.2 is usual."""
    cutmix: Annotated[float, AT_LEAST_0] = 0.0
    """Strength of pasting a rectangle of another image, labels mixed by area; 0 = off, 1 is usual."""


@dataclass
class PeerOptions:
    """How many peers there are, what they share, and which of them is deployed."""

    topology: Topology | None = None
    """Whole networks as peers, branches on one shared trunk, or twins, one network run twice on a batch; default the
    method's own."""
    branch_at: tuple[str, ...] = ()
    """Path of the first module that every branch has its own copy of; several paths make a tree. Default: the place
    that the paper uses."""
    fan_out: Annotated[tuple[int, ...], EACH_AT_LEAST_1] = ()
    """Number of children at each `--branch-at`; their product is the number of peers."""
    peers: Annotated[int | None, AT_LEAST_1] = None
    """Number of peers, the leader included; default the method's own."""
    deploy: str = "member"
    """What is deployed and evaluated: member (the method's own), its number, ensemble, or an average of its weights,
    ema or swa (of pcl, ema is its mean teacher)."""
    ema_decay: Annotated[float | None, FROM_0_BELOW_1] = None
    """Largest decay of the average that --deploy ema deploys; it grows as (step + 1) / (step + 10). Default 0.999."""
    swa_start: Annotated[float | None, FROM_0_BELOW_1] = None
    """Part of the epochs after which --deploy swa averages the weights at the end of each epoch. Default 0.75, as in
    the paper."""
    swa_lr: Annotated[float | None, ABOVE_0] = None
    """Learning rate, kept constant, of the epochs that --deploy swa averages. Default half of --lr, as in the authors'
    code for wide ResNets."""


@dataclass
class OptimOptions:
    """The length of the training, its batches, learning rate and optimizer."""

    epochs: Annotated[int, AT_LEAST_1] = 300
    """Passes over the training set."""
    batch_size: Annotated[int, AT_LEAST_1] = 128
    """Samples per step."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """Number of parts that a batch is split into before its one step: less memory; BatchNorm normalizes each part
    separately."""
    lr: Annotated[float, ABOVE_0] = 0.1
    """Initial learning rate."""
    lr_base_batch: Annotated[int | None, AT_LEAST_1] = None
    """Batch size that --lr is meant for; with another --batch-size the rate is scaled in proportion. Default: the rate
    is not scaled."""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 at every milestone; cosine: half a cosine down to 0."""
    milestones: Annotated[tuple[int, ...] | None, EACH_AT_LEAST_1] = None
    """Epochs (counted from 0) from which the rate is ten times smaller; default 1/2 and 3/4 of the epochs."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, as in the papers; adamw, for networks with attention (with --lr 0.001 or less)."""
    head_lr_scale: Annotated[float, ABOVE_0] = 1.0
    """Factor on the learning rate of the classifier heads: 10 is usual if the rest is pretrained."""
    freeze: tuple[str, ...] = ()
    """Paths of modules that are not trained; trunk: what branches share, or all but the heads of networks."""
    warmup_epochs: Annotated[float, AT_LEAST_0] = 0.0
    """Epochs of linear warm-up at the start."""
    momentum: Annotated[float, FROM_0_BELOW_1] = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    weight_decay: Annotated[float, AT_LEAST_0] = 5e-4
    """Weight decay on every parameter, as in the papers."""
    sam_rho: Annotated[float, AT_LEAST_0] = 0.0
    """Sharpness-aware minimization (SAM): take each gradient at weights moved so far up the loss; 0 = off, 0.05 to 0.1
    in the paper. Doubles the forwards and backwards."""


@dataclass
class MeshOptions:
    """How a run is spread over processes."""

    mesh: str | None = None
    """data=D,peer=P: D x P processes (started by torchrun); each batch is split over D of them, the peers over P."""
    sync_bn: bool = False
    """Normalize by the statistics of the whole batch, over all processes of the axis `data`, instead of each process's
    part."""
    collective_timeout: Annotated[float, AT_LEAST_1_SECOND] = 600.0
    """Seconds that a process waits for another one, and for a batch of image files, before the job ends."""


@dataclass
class RunOptions:
    """How a run is computed, evaluated and recorded."""

    protocol: Literal["honest", "paper"] = "honest"
    """honest: choose on validation, read the test set once, at the end; paper: train on all images, report the last and
    the best test epoch."""
    seed: Annotated[int, SEED] = 0
    """Seed of initialization, order and augmentation. The splits do not depend on it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is autocast: weights, classifier heads and losses stay float32."""
    device: Device = "auto"
    """Device to train on; auto uses a GPU if there is one."""
    channels_last: bool = True
    """Keep images and convolutions in NHWC order (1.2x faster on a CPU)."""
    execution: Literal["auto", "loop", "stacked", "measure"] = "auto"
    """How peers run in training: loop, one after the other; stacked, as one network (equal peers only; faster if kernel
    launches cost more than the arithmetic); auto stacks equal networks of this package where that is faster: on an
    NVIDIA GPU if no convolution has more than 64 input channels, on a CPU in float32 if batch size x height x width is
    at most 8192; measure is an old name of auto."""
    cuda_graph: bool = True
    """On an NVIDIA GPU, record a step's forward and backward once and replay them as a CUDA graph: the same numbers,
    without the cost of launching thousands of kernels. Not used with --mesh, --checkpoint-activations, --sam-rho or
    alternating updates. Turn it off for a network whose forward changes from step to step by Python code of its own."""
    checkpoint_activations: bool = False
    """Recompute the activations of a network in the backward pass instead of keeping them: less memory, a third more
    arithmetic (networks only)."""
    deterministic: bool = False
    """Use deterministic kernels only (on a CPU with one thread runs are bitwise repeatable anyway)."""
    out: str | None = None
    """Run folder; default runs/DATA-METHOD-TOPOLOGY-MODEL-seedN."""
    resume: str | None = None
    """auto: continue in --out if it holds this run; or the path of a run folder to continue in."""
    checkpoint_every_epochs: Annotated[int, AT_LEAST_1] = 1
    """Epochs between two checkpoints."""
    checkpoint_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between two checkpoints (0 = only at the end of epochs)."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """Number of newest checkpoints to keep; if one is damaged, the one before it is used."""
    skip_nonfinite: Annotated[int, AT_LEAST_0] = 0
    """Number of steps with a non-finite loss or gradient that may be skipped; the next one stops the run."""
    log_every_steps: Annotated[int, AT_LEAST_1] = 50
    """Steps between two reads of the loss; in between, the host does not wait for the device."""
    eval_every_epochs: Annotated[int, AT_LEAST_1] = 1
    """Epochs between two evaluations on the validation set (the test set under --protocol paper)."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also write the metrics for this viewer (pip install it by the same name). wandb runs offline unless WANDB_MODE is
    set; trackio writes to its own folder, TRACKIO_DIR."""


@dataclass
class Options(RunOptions, MeshOptions, OptimOptions, PeerOptions, DataOptions, NetworkOptions):
    """All sections; the last base's fields come first, so `Config("okddip", "resnet8", "digits")` works."""

    @property
    def keeps_average(self) -> bool:
        """Whether the run keeps an average of the weights of its own, for deployment alone."""
        return self.deploy == "swa" or (self.deploy == "ema" and not self.method.keeps_ema)

    @property
    def average_key(self) -> str:
        """What averages are called in records: ema, or swa."""
        return "swa" if self.deploy == "swa" else "ema"

    @property
    def first_averaged_epoch(self) -> int | None:
        """The first epoch that `--deploy swa` averages, counted from 0; None without it."""
        start = 0.75 if self.swa_start is None else self.swa_start
        return int(start * self.epochs + 1e-9) if self.deploy == "swa" else None
