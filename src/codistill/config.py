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

from codistill.errors import InputError, MachineError, suggest
from codistill.method_configs import METHODS, MethodConfig, method_config

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
LARGEST = 2**31


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
    """Height and width that the images of a folder are resized to."""
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
    cost more than the arithmetic); measure tries both; auto takes loop."""
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
        _check_numbers(full)
        topology = full.topology or method.topologies[0]
        full.topology = topology  # type: ignore[assignment]
        if full.peers is None:
            full.peers = len(full.model) if len(full.model) > 1 else method.default_peers
            full.peers = math.prod(full.fan_out) if full.fan_out else full.peers
        _check_peers(full, method)
        _check_mesh(full)
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


def _check_numbers(c: Config) -> None:
    """Raise for a number out of its range, naming the flag."""
    for part, prefix in ((c, ""), (c.method, "method.")):
        for name, value in vars(part).items():
            if any(isinstance(v, int) and abs(v) >= LARGEST for v in (value if isinstance(value, tuple) else [value])):
                raise InputError(f"--{prefix}{name.replace('_', '-')} is out of all range; give a number below 2^31")
    least_one = ("epochs", "batch_size", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs",
                 "keep_checkpoints")  # fmt: skip
    rules = [(n, getattr(c, n) >= 1, "at least 1") for n in least_one]
    rules += [
        ("train_per_class", c.train_per_class is None or c.train_per_class >= 1, "at least 1"),
        ("image_size", c.image_size is None or c.image_size >= 8, "at least 8"),
        ("lr_base_batch", c.lr_base_batch is None or c.lr_base_batch >= 1, "at least 1"),
        ("peers", c.peers is None or c.peers >= 1, "at least 1"),
        ("lr", math.isfinite(c.lr) and c.lr > 0, "a number above 0"),
        ("momentum", 0 <= c.momentum < 1, "from 0 to below 1"),
        ("weight_decay", math.isfinite(c.weight_decay) and c.weight_decay >= 0, "0 or more"),
        ("warmup_epochs", math.isfinite(c.warmup_epochs) and c.warmup_epochs >= 0, "0 or more"),
        ("val_fraction", 0 <= c.val_fraction < 1, "from 0 to below 1"),
        ("cutout", c.cutout >= 0, "0 or more"),
        ("head_lr", math.isfinite(c.head_lr) and c.head_lr > 0, "a number above 0"),
        ("label_smoothing", 0 <= c.label_smoothing < 1, "from 0 to below 1"),
        ("mixup", math.isfinite(c.mixup) and c.mixup >= 0, "0 or more"),
        ("cutmix", math.isfinite(c.cutmix) and c.cutmix >= 0, "0 or more"),
        ("checkpoint_every_steps", c.checkpoint_every_steps >= 0, "0 or more"),
        ("skip_nonfinite", c.skip_nonfinite >= 0, "0 or more"),
        ("seed", 0 <= c.seed < 2**31, "from 0 to 2147483647"),
        ("collective_timeout", math.isfinite(c.collective_timeout) and c.collective_timeout >= 1, "1 second or more"),
        ("milestones", all(m >= 1 for m in c.milestones or ()), "1 or more, each"),
        ("fan_out", all(f >= 1 for f in c.fan_out), "1 or more, each"),
    ]
    method = c.method
    for name, fine, words in (
        ("temperature", lambda v: v is None or (math.isfinite(v) and v > 0), "a number above 0"),
        ("weight", lambda v: math.isfinite(v) and v >= 0, "0 or more"),
        ("ramp_epochs", lambda v: v is None or (math.isfinite(v) and v >= 0), "0 or more"),
        ("entropy_weight", math.isfinite, "a number"),
        ("alpha", lambda v: v is None or 0 <= v <= 1, "from 0 to 1"),
        ("beta", lambda v: 0 <= v <= 1, "from 0 to 1"),
        ("ema_decay", lambda v: 0 <= v < 1, "from 0 to below 1"),
        ("holdout_fraction", lambda v: 0 < v < 1, "a number between 0 and 1"),
    ):
        if hasattr(method, name):
            rules.append((f"method.{name}", fine(getattr(method, name)), words))
    for name, fine, words in rules:
        if not fine:
            value = getattr(method, name[7:]) if name.startswith("method.") else getattr(c, name)
            raise InputError(f"--{name.replace('_', '-')} is {value}; give {words}")
    soft = [flag for flag in ("label_smoothing", "mixup", "cutmix") if getattr(c, flag)]
    target = getattr(method, "target", None) if getattr(method, "name", None) == "kdcl" else None
    if soft and target in ("naive", "linear", "minlogit"):
        raise InputError(
            f"--{soft[0].replace('_', '-')} makes labels soft, and kdcl's {target} target reads one hard label each; "
            "drop it, or give --method.target general"
        )
    if c.optimizer == "sgd" and c.nesterov and c.momentum == 0:
        raise InputError("--nesterov needs a momentum; give --momentum above 0, or --no-nesterov")


def _check_peers(c: Config, method: MethodConfig) -> None:
    """Raise where peers, models, topology and method contradict each other."""
    assert c.peers is not None
    if c.topology not in method.topologies:
        raise InputError(f"{method.name} needs a trunk, so it works on branches only; drop --topology {c.topology}")
    if c.peers < method.least_peers:
        what = " (auxiliary peers and the leader)" if method.name == "okddip" else ""
        raise InputError(f"--peers is {c.peers}; {method.name} needs at least {method.least_peers}{what}")
    numbers = [str(p) for p in range(c.peers)]
    if c.deploy not in ("member", "ensemble", "ema", *numbers):
        raise InputError(f"--deploy {c.deploy}: give member, ensemble, ema, or a number from 0 to {c.peers - 1}")
    if c.deploy == "ema" and method.name != "pcl":
        raise InputError(f"--deploy ema: {method.name} keeps no mean teachers; pcl does")
    if len(c.model) > 1 and len(c.model) != c.peers:
        raise InputError(f"--model is given {len(c.model)} times for --peers {c.peers}; give one, or one a peer")
    if c.topology == "branches":
        if len(c.model) > 1:
            raise InputError("--topology branches takes one --model: branches share a trunk; use --topology networks")
        if getattr(method, "update", None) == "alternating":
            raise InputError("--method.update alternating steps one network at a time; branches share a trunk, drop it")
    elif c.branch_at or c.fan_out:
        raise InputError("--branch-at and --fan-out shape branches; add --topology branches")
    if c.checkpoint_activations and (c.topology == "branches" or c.execution in ("stacked", "measure")):
        why = "branches share a trunk" if c.topology == "branches" else f"--execution {c.execution} runs them as one"
        raise InputError(f"--checkpoint-activations runs each network again by itself, but {why}; drop one of the two")
    if c.fan_out and math.prod(c.fan_out) != c.peers:
        raise InputError(
            f"--fan-out {' '.join(map(str, c.fan_out))} makes {math.prod(c.fan_out)} branches, not --peers {c.peers}"
        )
    if len(c.branch_at) > 1 and len(c.fan_out) != len(c.branch_at):
        raise InputError("--fan-out needs one number for each --branch-at")


def mesh_shape(mesh: str | None) -> tuple[int, int]:
    """Return (D, P) of `data=D,peer=P`; an axis that is not named has one process.

    Raises:
        InputError: the text is something else.

    >>> mesh_shape("data=2,peer=4")
    (2, 4)
    """
    sizes = {"data": 1, "peer": 1}
    named: set[str] = set()
    for part in (mesh or "").split(",") if mesh is not None else []:
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or axis in named or not size.isdecimal() or int(size) < 1:
            raise InputError(f'--mesh {mesh}: "{part}" is no axis; give data=D,peer=P with numbers of processes')
        named.add(axis)
        sizes[axis] = int(size)
    return sizes["data"], sizes["peer"]


def _check_mesh(c: Config) -> None:
    """Raise where the mesh does not fit the peers or the batch."""
    data, peer = mesh_shape(c.mesh)
    assert c.peers is not None
    if peer > 1 and c.topology == "branches":
        raise InputError(
            f"--mesh {c.mesh}: branches share a trunk, so they cannot be spread over the axis peer; "
            f"give --mesh data={data * peer}, or --topology networks"
        )
    if c.peers % peer:
        raise InputError(
            f"--mesh {c.mesh}: {c.peers} peers cannot be shared out evenly among {peer} processes; "
            f"give a peer=P that divides {c.peers}, or other --peers"
        )
    if data * peer > 1 and c.execution == "stacked":
        raise InputError("--execution stacked runs the peers as one network in one process; drop it, or --mesh")
    if data > c.batch_size:
        raise InputError(f"--mesh {c.mesh}: --batch-size {c.batch_size} leaves processes without samples; raise it")


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
