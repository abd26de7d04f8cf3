"""Every setting of codistill, as dataclasses on the standard library alone.

The same classes are the command line (their attribute docstrings are its help), the config file and the reference
page. Nothing here imports torch, so that `codistill --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from codistill.config.checks import LARGEST, check_mesh, check_numbers, check_peers
from codistill.config.methods import METHODS, MethodConfig, method_config
from codistill.utils.errors import InputError, MachineError, suggest

__all__ = [
    "METHODS",
    "Checkpoint",
    "CompareConfig",
    "Config",
    "Device",
    "InputError",
    "MachineError",
    "MethodConfig",
    "ReproduceConfig",
    "method_config",
]

Device = Literal["auto", "cpu", "cuda", "mps"]
Checkpoint = Literal["last", "best"]


@dataclass
class Config:
    """One training run: `codistill.train(Config(method="okddip", model="resnet32", data="cifar100"))`."""

    method: MethodConfig | str = "okddip"
    """The method, by name or as its config."""
    model: tuple[str, ...] | str = ("resnet32",)
    """The network: a built-in name, timm:NAME, torchvision:NAME, hf:PATH or package.module:callable, with options after
    commas (torchvision:mobilenet_v2,width_mult=0.5); several make peers of different sizes, one a peer."""
    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, npz:PATH (x_train, y_train, x_test, y_test), or folder:PATH."""
    data_dir: str | None = None
    """Where the data set lies or is downloaded to: torchvision's layout, or DIR/cifar100.npz; default ./data."""
    train_per_class: int | None = None
    """Train on that many images a class only (after the validation split), drawn once, the same for every seed."""
    val_fraction: float = 0.1
    """Part of the training set kept for validation: deterministic, balanced over classes, the same for every seed."""
    image_size: int | None = None
    """Height and width that the images of a folder become; default their own, or 224 where files' sizes differ."""
    data_pipeline: Literal["auto", "resident", "files"] = "auto"
    """Images of a folder are decoded once into memory (resident), or by worker processes in every epoch (files): random
    resized crops to train on, centre crops to judge by. auto: files from 2 GiB of decoded images on."""
    data_workers: int | None = None
    """Processes that decode image files; 0 decodes in the training process. Default one a CPU, 8 at most."""
    skip_corrupt: bool = False
    """Where an image file cannot be read, leave it out (or let the next one of its class stand in, with files)."""
    balanced_sampling: bool = False
    """Draw every class equally often in an epoch, which keeps its length."""
    normalise: str | None = None
    """imagenet, dataset, or means and deviations of pixels / 255 (0.5,0.5,0.5,0.25,0.25,0.25). Default: what a
    pretrained network was trained with, else the data set's own."""
    pretrained: bool = False
    """Start from the weights that the network's library offers; every peer gets a new classifier head."""
    weights: str | None = None
    """Start from this file of weights (.safetensors or a state dict); every peer gets a new classifier head."""
    channels: Literal[1, 3] | None = None
    """Channels the networks take: gray images are repeated to 3, colour is made gray for 1. Default: the data set's, or
    3 for torchvision's networks and pretrained ones of transformers."""
    augment: bool = True
    """Random crops (and flips, where the data set allows them), drawn anew for every sample, view and epoch."""
    cutout: int = 0
    """Side in pixels of a random square set to the mean colour (0 = off)."""

    topology: Literal["networks", "branches"] | None = None
    """Whole networks as peers, or branches on one shared trunk; default the method's own."""
    branch_at: tuple[str, ...] = ()
    """First module that every branch has for itself, by its path; several make a tree. Default: the paper's place."""
    fan_out: tuple[int, ...] = ()
    """Number of children at each `--branch-at`; their product is the number of peers."""
    peers: int | None = None
    """Number of peers, the leader included; default the method's own."""
    deploy: str = "member"
    """What is deployed and judged: member (the method's own), a member's number, ensemble, or ema (pcl alone)."""
    protocol: Literal["honest", "paper"] = "honest"
    """honest: choose on validation, read the test set once, last; paper: train on all, last and best test epoch."""

    epochs: int = 300
    """Passes over the training set."""
    batch_size: int = 128
    """Samples a step."""
    accumulate: int = 1
    """Parts in which a batch is run before its one step: less memory; BatchNorm normalises each part by itself."""
    lr: float = 0.1
    """Learning rate at the start."""
    lr_base_batch: int | None = None
    """Samples a step that --lr is meant for; another --batch-size scales the rate in proportion. Default: as given."""
    schedule: Literal["step", "cosine"] = "step"
    """step: x0.1 at every milestone; cosine: half a cosine down to 0."""
    milestones: tuple[int, ...] | None = None
    """Epochs (counted from 0) from which the rate is ten times smaller; default 1/2 and 3/4 of the epochs."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum, as the papers have it; adamw, as networks with attention want it (with --lr 0.001 or less)."""
    head_lr: float = 1.0
    """Factor on the learning rate of the classifier heads: 10 is usual where the rest is pretrained."""
    freeze: tuple[str, ...] = ()
    """Modules that stay as they are, by their paths; trunk: what branches share, or all but the heads of networks."""
    label_smoothing: float = 0.0
    """Part of every label that is spread over all classes."""
    mixup: float = 0.0
    """Strength (the Beta distribution's parameter) of mixing pairs of images and labels; 0 = off, 0.2 is usual."""
    cutmix: float = 0.0
    """Strength of pasting a rectangle of another image, labels mixed by area; 0 = off, 1 is usual."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up at the start."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of it."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter, as the papers have it."""

    seed: int = 0
    """Seed of initialisation, order and augmentation. The splits do not depend on it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is autocast: weights, classifier heads and losses stay float32."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    channels_last: bool = True
    """Keep images and convolutions in NHWC order (1.2x faster on a CPU)."""
    execution: Literal["auto", "loop", "stacked", "measure"] = "auto"
    """How peers run in training: loop, one after the other; stacked, as one network (equal peers; wins where launches
    cost more than the arithmetic); auto takes loop; measure is an old name of auto."""
    checkpoint_activations: bool = False
    """Keep no activations of a network between forward and backward but run it again there: less memory, a third more
    arithmetic (networks only)."""
    deterministic: bool = False
    """Use deterministic kernels only (on a CPU with one thread runs repeat bit for bit anyway)."""

    mesh: str | None = None
    """data=D,peer=P: D x P processes (torchrun starts them); D of them share out each batch, P of them the peers."""
    sync_bn: bool = False
    """Normalise by the statistics of the whole batch, over all processes of the axis `data`, not of each one's part."""
    collective_timeout: float = 600.0
    """Seconds after which a process that waits for another one in vain ends the job."""

    out: str | None = None
    """Run folder; default runs/DATA-METHOD-TOPOLOGY-MODEL-seedN."""
    resume: str | None = None
    """auto: continue in --out if it holds this run; or the path of a run folder to continue in."""
    checkpoint_every_epochs: int = 1
    """Epochs between two checkpoints."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints (0 = only at the end of epochs)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; where one is damaged, the one before it is used."""
    skip_nonfinite: int = 0
    """How many steps may be skipped whose loss or gradients are not finite; at the next one the run stops."""
    log_every_steps: int = 50
    """Steps between two looks at the loss; between them the device is never waited for."""
    eval_every_epochs: int = 1
    """Epochs between two evaluations on the curve's set (validation; the test set under --protocol paper)."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also write the metrics for this viewer (extras of the same names: pip install codistill[tensorboard]). wandb is
    offline unless WANDB_MODE says otherwise; trackio keeps its own folder, TRACKIO_DIR."""

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            self.method = method_config(self.method)
        self.model = (self.model,) if isinstance(self.model, str) else tuple(self.model)
        self.branch_at = (self.branch_at,) if isinstance(self.branch_at, str) else tuple(self.branch_at)
        self.fan_out = tuple(self.fan_out)
        self.freeze = (self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze)

    def resolved(self) -> Config:
        """Return this config with every default that depends on the rest filled in, and checked.

        Raises:
            InputError: a value is out of range, or two values contradict each other.
        """
        full = dataclasses.replace(self, method=dataclasses.replace(self.method))  # type: ignore[type-var]
        method = full.method
        assert isinstance(method, MethodConfig)
        if not full.model:
            raise InputError("--model names no network; give one, as in --model resnet32")
        if "\0" in (full.out or ""):
            raise InputError("--out holds a character of number 0, which no folder's name can; give another")
        check_numbers(full)
        topology = full.topology or method.topologies[0]
        full.topology = topology  # type: ignore[assignment]
        if full.peers is None:
            full.peers = len(full.model) if len(full.model) > 1 else method.default_peers
            full.peers = math.prod(full.fan_out) if full.fan_out else full.peers
        check_peers(full, method)
        check_mesh(full)
        if full.protocol == "paper":
            full.val_fraction = 0.0
        if full.milestones is None:
            full.milestones = (
                (max(full.epochs // 2, 1), max(full.epochs * 3 // 4, 1)) if full.schedule == "step" else ()
            )
        if getattr(method, "ramp_epochs", 0.0) is None:
            method.ramp_epochs = full.epochs * 80 / 300 if method.default_ramp() else 0.0  # type: ignore[attr-defined]
        if full.out is None:
            name = "-".join(slug(part) for part in [full.data, method.name, topology, *full.model])
            full.out = f"runs/{name}-seed{full.seed}"
        return full

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` takes them back."""
        values = dataclasses.asdict(self)
        assert isinstance(self.method, MethodConfig)
        values["method"] = {"name": self.method.name, **values["method"]}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Build a config from plain values, as in a config file.

        Raises:
            InputError: a key is unknown, or a value has the wrong type.
        """
        values = dict(values)
        method = values.pop("method", "okddip")
        options = dict(method) if isinstance(method, dict) else {"name": method}
        name = options.pop("name", "okddip")
        if not isinstance(name, str):
            raise InputError(f"--config: method = {name!r} does not fit; it takes a method's name, or a table with one")
        base = method_config(name)
        return cls(method=type(base)(**_checked(type(base), options, "method.")), **_checked(cls, values, ""))

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Read a JSON or TOML file, or the `config.json` of a run folder.

        Raises:
            InputError: the file is missing, is not JSON or TOML, or holds an unknown key.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            text = path.read_text()
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise InputError(f"--config: cannot read {path} ({error.strerror or error})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"--config: {path} is not valid {path.suffix[1:] or 'JSON'} ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"--config: {path} holds no table of options")
        return cls.from_dict(values)


def slug(name: str) -> str:
    """Return a name that any file system takes: `timm:resnet18` becomes `timm-resnet18`."""
    return re.sub(r"[^A-Za-z0-9._+]+", lambda found: "_" if "/" in found[0] else "-", name).strip("-_.") or "x"


def _checked(cls: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check names and types of `values` against the dataclass `cls`; lists become tuples."""
    kinds = {name: kind for name, kind in get_type_hints(cls).items() if get_origin(kind) is not ClassVar}
    checked = {}
    for key, value in values.items():
        if key not in kinds:
            raise InputError(f'--config: unknown option "{prefix}{key}"{suggest(key, kinds)}')
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, kinds[key]):
            kind = getattr(kinds[key], "__name__", None) or str(kinds[key]).replace("typing.", "")
            raise InputError(f"--config: {prefix}{key} = {value!r} does not fit; it takes {kind}")
        checked[key] = value
    return checked


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a plain value fits an annotation."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, parts[0]) for v in value)
    if isinstance(value, int) and abs(value) >= LARGEST:
        return False
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


@dataclass
class CompareConfig(Config):
    """Several methods on the same data, with baselines of equal cost, over seeds."""

    topology: Literal["networks", "branches", "both"] | None = None  # type: ignore[assignment]
    """Whole networks as peers, branches on one shared trunk, or a row for each; default every method's own."""
    seeds: int = 3
    """Number of seeds: 0 .. n-1."""
    workers: int = 1
    """Runs that train side by side on this machine, each on one CPU thread."""
    out: str | None = None
    """Folder of the grid; runs that it already holds are not trained again. Default runs/compare-DATA."""


@dataclass
class ReproduceConfig:
    """Make a published table anew: its cells, their baselines of equal cost, over seeds, under a stated protocol."""

    network: tuple[str, ...] = ()
    """Only these networks of the table (repeat the option); default all, under --scale smoke the first."""
    method: tuple[str, ...] = ()
    """Only these methods of the table (repeat the option), with what they are compared with; default all."""
    baselines: bool = True
    """Train the baselines of equal cost, also those that the published table leaves out."""
    seeds: int = 3
    """Number of seeds: 0 .. n-1."""
    data_dir: str | None = None
    """Where the images lie or are downloaded to; for ImageNet the folder that holds train and val."""
    scale: Literal["smoke", "short", "full"] = "full"
    """smoke: digits and a tiny network, nothing is downloaded; short: a tenth of the epochs, a fifth of the images;
    full: the paper's. Only full is compared with the paper's numbers."""
    protocol: Literal["honest", "paper"] = "honest"
    """honest: the test set is read once, at the last epoch; paper: last and best test epoch, each in its column."""
    workers: int | None = None
    """Runs side by side, each on one CPU thread or one GPU; default one a GPU, or one."""
    submit: Literal["none", "slurm", "local"] = "none"
    """Hand each run to submitit (pip install codistill[slurm]): a SLURM job each, or a process of this machine."""
    submit_option: tuple[str, ...] = ()
    """NAME=VALUE for submitit (repeat the option), as in slurm_partition=gpu or gpus_per_node=1."""
    print_commands: bool = False
    """Print one shell line a run, teachers first, and train nothing."""
    device: Device = "auto"
    """Where to train; auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast."""
    out: str | None = None
    """Folder of the runs and of the table; what it holds is not trained again. Default runs/TABLE-SCALE-PROTOCOL."""


def names_of(config: Config) -> list[str]:
    """Return the names of networks in a config, a teacher's too."""
    teacher = getattr(config.method, "teacher_model", None)
    return [*config.model, *([teacher] if teacher else [])]
