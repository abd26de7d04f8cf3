"""The options of a run as one class, and how they are read and written.

The same classes are the command line (their attribute docstrings are its help), the config file and the reference
page. Nothing here imports torch, so that `codistill --help` starts fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from codistill.config.checks import check_mesh, check_options, check_peers
from codistill.config.methods import METHODS, MethodConfig, TeacherConfig, UnimportedConfig, method_config
from codistill.config.old_names import OLD_OPTIONS, accept_old_options
from codistill.config.options import Checkpoint, Device, Options
from codistill.config.ranges import LIMIT
from codistill.utils import InputError, MachineError, check_method_import, current_network_name, read_file, suggest

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
    "slug",
]


SCHEMA = 1
"""Number of the schema of config.json, which it holds under `schema`."""


@accept_old_options
@dataclass
class Config(Options):
    """One training run: `codistill.train(Config(method="okddip", model="resnet32", data="cifar100"))`.

    The fields are the command line's options. Values are checked, and defaults that depend on others filled in, by
    `resolved`, which `train` calls.

    Raises:
        InputError: from `resolved`, where a value is out of range or two contradict each other.

    >>> config = Config("okddip", "resnet8", "digits", epochs=20).resolved()
    >>> config.peers, config.milestones, config.out
    (4, (10, 15), 'runs/digits-okddip-networks-resnet8-seed0')
    """

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {
            *("out", "resume", "data_dir", "device", "tracker", "data_workers", "skip_corrupt"),
            *("checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints", "skip_nonfinite"),
            *("mesh", "collective_timeout", "checkpoint_activations", "execution", "cuda_graph", "log_every_steps"),
        }
    )
    """Options in which a run and its continuation may differ; they do not change what is trained."""

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            self.method = method_config(self.method)
        names = (self.model,) if isinstance(self.model, str) else self.model
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(
                "model takes names of networks, such as resnet8 or package.module:callable; give networks themselves "
                "to codistill.NetworkPeers"
            )
        if not isinstance(self.data, str):
            raise InputError("data takes the name of a data set; give images themselves to codistill.train(..., data=)")
        if isinstance(self.out, os.PathLike):
            self.out = os.fspath(self.out)
        self.model = tuple(current_network_name(name) for name in names)
        self.branch_at = (self.branch_at,) if isinstance(self.branch_at, str) else tuple(self.branch_at)
        self.fan_out = tuple(self.fan_out)
        self.freeze = (self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze)

    def resolved(self) -> Config:
        """Return this config with every default that depends on other options filled in, and checked.

        Raises:
            InputError: a value is out of range, or two values contradict each other.
        """
        check_options(self)
        method = self.method.resolved(self.epochs)
        full = dataclasses.replace(self, method=method)
        topology = full.topology = self.topology or method.topologies[0]
        peers = full.peers = self.peers if self.peers is not None else self._default_peers()
        check_peers(full, peers)
        check_mesh(full, peers)
        if full.deploy == "ema" and full.keeps_average and full.ema_decay is None:
            full.ema_decay = 0.999
        if full.deploy == "swa" and full.swa_start is None:
            full.swa_start = 0.75
        if full.protocol == "paper":
            full.val_fraction = 0.0
        if full.milestones is None:
            halves = (max(full.epochs // 2, 1), max(full.epochs * 3 // 4, 1))
            full.milestones = halves if full.schedule == "step" else ()
        full.out = full.out and os.path.expanduser(full.out)
        if full.out is None:
            name = "-".join(slug(part) for part in [full.data, method.name, topology, *full.model])
            full.out = f"runs/{name}-seed{full.seed}"
        return full

    def _default_peers(self) -> int:
        if self.fan_out:
            return math.prod(self.fan_out)
        return len(self.model) if len(self.model) > 1 else self.method.default_peers

    def augmentation_options(self) -> dict[str, Any]:
        """Return the options that say how training images are changed at random."""
        return {name: getattr(self, name) for name in ("augment", "cutout", "auto_augment", "random_erasing")}

    def network_names(self) -> list[str]:
        """Return the names of all networks, a teacher's included."""
        teacher = self.method.teacher_model if isinstance(self.method, TeacherConfig) else None
        return [*self.model, *([teacher] if teacher else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` takes them back."""
        values = dataclasses.asdict(self)
        options = self.method.options if isinstance(self.method, UnimportedConfig) else values["method"]
        values["method"] = {"name": self.method.import_name or self.method.name, **options}
        return values

    @classmethod
    def from_dict(
        cls,
        values: dict[str, Any],
        source: object = "--config",
        *,
        allow_import: bool = False,
        known: Iterable[str] = (),
        without_code: bool = False,
    ) -> Config:
        """Build a config from plain values, as in a config file.

        Args:
            values: The options; `method` is a name, or a table with the name and the method's options.
            source: Where they come from, for messages.
            allow_import: Import an own method (package.module:Class) that the values name.
            known: Names of own methods that the caller has from elsewhere.
            without_code: Import no own method; the config can be shown, but not trained.

        Raises:
            InputError: a key is unknown, a value has the wrong type, or the method is code that nobody asked for.
        """
        values = dict(values)
        schema = values.pop("schema", SCHEMA)
        if type(schema) is int and schema > SCHEMA:
            raise InputError(f"--config: it was written by a newer codistill (schema {schema}); upgrade codistill")
        method = values.pop("method", "okddip")
        options = dict(method) if isinstance(method, dict) else {"name": method}
        name = options.pop("name", "okddip")
        if not isinstance(name, str):
            raise InputError(f"--config: method = {name!r} does not fit; it takes a method's name, or a table with one")
        if ":" in name:
            if without_code:
                return cls(method=UnimportedConfig(name=name, options=options), **_checked(cls, values, ""))
            check_method_import(name, source, allow_import, known)
        base = method_config(name)
        return cls(method=type(base)(**_checked(type(base), options, "method.")), **_checked(cls, values, ""))

    @classmethod
    def from_file(cls, path: str | Path, **imports: Any) -> Config:
        """Read a JSON or TOML file, or the `config.json` of a run folder.

        Args:
            path: The file or folder.
            imports: `allow_import`, `known` and `without_code` of `from_dict`.

        Raises:
            InputError: the file is missing, is not JSON or TOML, holds an unknown key, or names a method that is code.
        """
        given = path
        path = Path(path).expanduser()
        path = path / "config.json" if os.path.isdir(path) else path
        data = read_file(path)
        if data is None:
            raise InputError(f"--config: cannot read {path} (No such file or directory)")
        try:
            text = data.decode("utf-8-sig")
            values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--config: {path} is not valid {path.suffix[1:] or 'JSON'} ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"--config: {path} holds no table of options")
        try:
            return cls.from_dict(values, given, **imports)
        except InputError as error:
            raise InputError(f"{str(error).removeprefix('--config: ')}, in {path}") from None


def slug(name: str, *, lower: bool = False) -> str:
    """Return a name that any file system takes.

    Args:
        name: Any text; a name of a network, for example.
        lower: Use lower-case letters, digits, dots and hyphens only, as in the folders of a grid.

    >>> slug("timm:resnet18"), slug("OKDDip, ResNet_32", lower=True)
    ('timm-resnet18', 'okddip-resnet-32')
    """
    if lower:
        name = re.sub("[_+/]", "-", name.lower())
    return re.sub(r"[^A-Za-z0-9._+]+", lambda found: "_" if "/" in found[0] else "-", name).strip("-_.") or "x"


def _checked(cls: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Check names and types of `values` against the dataclass `cls`; lists become tuples."""
    hints = get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    checked = {}
    for given, value in values.items():
        key = OLD_OPTIONS.get(given, given)
        if key not in kinds:
            raise InputError(f'--config: unknown option "{prefix}{key}"{suggest(key, kinds)}')
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, kinds[key]):
            kind = getattr(kinds[key], "__name__", None) or str(kinds[key]).replace("typing.", "")
            raise InputError(f"--config: {prefix}{key} = {value!r} does not fit; it takes {kind}")
        checked[key] = value
    return checked


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a plain value fits an annotation."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, parts[0]) for v in value)
    if isinstance(value, int) and abs(value) >= LIMIT:
        return False
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


@accept_old_options
@dataclass
class CompareConfig(Config):
    """Several methods on the same data, with baselines of equal cost, over seeds."""

    topology: Literal["networks", "branches", "both"] | None = None  # type: ignore[assignment]
    """Whole networks as peers, branches on one shared trunk, or both; default each method's own."""
    seeds: int = 3
    """Number of seeds, counted from `first_seed`."""
    first_seed: int = 0
    """The first seed: choose options on some seeds, and compare on others."""
    baselines: tuple[Literal["ema", "swa", "sam", "longer", "randaugment", "trivialaugment", "erasing"], ...] = ()
    """Rows of one network that exchanges nothing: a moving average of its weights, SWA, SAM, as many times the epochs
    as there are peers, RandAugment, TrivialAugment, or random erasing."""
    workers: int = 1
    """Number of runs that train at the same time on this machine, each on one CPU thread."""
    out: str | None = None
    """Folder of the grid; runs that it already holds are not trained again. Default runs/compare-DATA."""

    def seed_range(self) -> range:
        """Return the seeds of every row."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass
class ReproduceConfig:
    """Train a published table again: its cells, their baselines of equal cost, over seeds, under a stated protocol."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {
            *("network", "method", "baselines", "seeds", "data_dir", "workers"),
            *("submit", "submit_option", "print_commands", "device", "out"),
        }
    )
    """Options that may change when a table's folder is continued."""

    network: tuple[str, ...] = ()
    """Only these networks of the table (repeat the option); default all, under --scale smoke the first."""
    method: tuple[str, ...] = ()
    """Only these methods of the table (repeat the option), with their baselines; default all."""
    baselines: bool = True
    """Train the baselines of equal cost, also those that the published table leaves out."""
    seeds: int = 3
    """Number of seeds: 0 .. n-1."""
    data_dir: str | None = None
    """Folder of the images, to read from or download to; for ImageNet the folder that holds train and val."""
    scale: Literal["smoke", "short", "full"] = "full"
    """smoke: digits and a tiny network, nothing is downloaded; short: a tenth of the epochs, a fifth of the images;
    full: the paper's. Only full is compared with the paper's numbers."""
    protocol: Literal["honest", "paper"] = "honest"
    """honest: the test set is read once, at the last epoch; paper: last and best test epoch, each in its column."""
    workers: int | None = None
    """Number of runs at the same time, each on one CPU thread or one GPU; default one per GPU, or one."""
    submit: Literal["none", "slurm", "local"] = "none"
    """Submit each run through submitit (pip install submitit): as a SLURM job, or as a local process."""
    submit_option: tuple[str, ...] = ()
    """NAME=VALUE for submitit (repeat the option), as in slurm_partition=gpu or gpus_per_node=1."""
    print_commands: bool = False
    """Print one shell line per run, teachers first, and train nothing."""
    device: Device = "auto"
    """Device to train on; auto uses a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast."""
    out: str | None = None
    """Folder of the runs and of the table; runs that it already holds are not trained again. Default
    runs/TABLE-SCALE-PROTOCOL."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReproduceConfig:
        """Build the options from plain values; those of other versions are left out.

        Raises:
            InputError: a value has the wrong type.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**_checked(cls, {name: value for name, value in values.items() if name in names}, ""))
