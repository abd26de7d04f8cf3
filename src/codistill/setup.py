"""Everything a run works with, built from its config: device, data, peers, method, optimiser.

`setup` builds it, `load_run` builds it and fills in the weights of a run folder.
"""

from __future__ import annotations

import dataclasses
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codistill import mesh_state
from codistill.checkpoint import load_state, restore_rng
from codistill.config import Checkpoint, Config, Device, InputError, MethodConfig
from codistill.data import ImageSet, Loader, Splits
from codistill.data.loader import Augmentation
from codistill.execution import choose_execution, stack
from codistill.feeding import DTYPES, load_images, make_loader
from codistill.guard import FiniteGuard
from codistill.imports import check_imports, names_of
from codistill.json_files import read_json
from codistill.losses import wide_dtype
from codistill.mean_teacher import MeanTeacher
from codistill.mesh import Mesh
from codistill.mesh_peers import MeshPeers, refuse_foreign
from codistill.method_configs import KDConfig
from codistill.methods import Method, build_method
from codistill.mixing import mixes_images
from codistill.peers import BranchPeers, Peers, build_peers
from codistill.sync_bn import synchronise
from codistill.teacher import load_teacher
from codistill.tuning import freeze, make_optimizers


@dataclass
class Training:
    """Everything a run works with."""

    config: Config
    device: torch.device
    data: ImageSet
    splits: Splits
    loader: Loader
    peers: Peers
    method: Method
    optimizers: list[torch.optim.Optimizer]
    """One over everything, or one a member where the method alternates."""
    guard: FiniteGuard
    teacher: nn.Module | None = None
    ema: MeanTeacher | None = None
    execution: str = "loop"
    frozen: list[nn.Module] = field(default_factory=list)
    """Modules that stay as they are, running statistics included."""
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    """Figures of the best test epoch (protocol paper only)."""
    best_validation: dict[str, Any] | None = None
    """Figures of the best validation epoch, whose checkpoint is best.pt (where there is a validation part)."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    mesh: Mesh | None = None
    """The place among several processes, where there are."""

    def state(self) -> dict[str, Any] | None:
        """Return all that a continuation needs, on whatever mesh; only the first rank gets it."""
        if self.mesh is not None:
            return mesh_state.gathered(self, self.mesh)
        return {
            "peers": self.peers.state_dict(),
            "method": self.method.state_dict(),
            "execution": self.execution,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizers": self._optimizer_states(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "best_validation": self.best_validation,
            "skipped": self.guard.skipped,
            "sums": self.sums,
        }

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """Return the optimisers' states in the one form that every execution and mesh reads: an entry a member."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return states if self.peers.runner is None else [self.peers.runner.split_optimizer(s) for s in states]

    def _own_form(self, held: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimiser's saved state as this execution has it.

        Raises:
            InputError: it is a stacked run's of schema 1, whose optimiser was not yet kept a member.
        """
        runner, count = self.peers.runner, [len(group["params"]) for group in optimizer.param_groups]
        same = [len(group["params"]) for group in held["param_groups"]] == count
        if runner is None and not same:
            raise InputError(
                "--resume: the checkpoint was written with --execution stacked by an early version; give it"
            )
        return held if same or runner is None else runner.join_optimizer(held)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, on this mesh or another."""
        if self.mesh is not None:
            mesh_state.load(self, self.mesh, state)
            return
        self.peers.load_state_dict(state["peers"])
        self.method.load_state_dict(state["method"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(self._own_form(held, optimizer))
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.best, self.best_validation = state["best"], state.get("best_validation")
        self.guard.go_on(state.get("skipped", 0))
        wide = wide_dtype(self.device)
        held = {n: v.to(wide) if v.is_floating_point() else v for n, v in state["sums"].items()}
        self.sums = {name: value.to(self.device) for name, value in held.items()}
        restore_rng(state["rng"])


def pick_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes a GPU if there is one.

    Raises:
        InputError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; give --device auto")
    return torch.device(name)


def setup(
    config: Config,
    teacher: nn.Module | None = None,
    execution: str | None = None,
    mesh: Mesh | None = None,
    fresh: bool = True,
    data: ImageSet | None = None,
    held: dict[str, Any] | None = None,
) -> Training:
    """Build data, peers, method and optimiser of a resolved config.

    Args:
        config: A resolved config.
        teacher: A trained network for a method that needs one, instead of the one its config names.
        execution: What an earlier part of this run chose, where the config leaves the choice open.
        mesh: The place among several processes, where there are.
        fresh: Whether `pretrained` and `weights` are to be read; not where a checkpoint is loaded anyway.
        data: Images given from Python, instead of those that the config names.
        held: What the run's folder says of its images already (data.json).

    Raises:
        InputError: some part of the config cannot be had.
    """
    assert isinstance(config.method, MethodConfig)
    device = pick_device(config.device) if mesh is None else mesh.device
    if config.dtype == "float64" and wide_dtype(device) is not torch.float64:
        raise InputError(f"--dtype float64: {device.type} has none; give --device cpu, or another --dtype")
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic and device.type == "cuda":  # else its matrix products refuse; read at their first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # networks and data of users may draw from these
    random.seed(config.seed)
    data, splits = load_images(config, data, held)
    peers, method = _peers_and_method(config, data, mesh, fresh)
    peers.to(device=device, dtype=DTYPES[config.dtype])
    if device.type == "mps":  # where convolutions of channels_last ran backward 30 times slower (pytorch #193349)
        config = dataclasses.replace(config, channels_last=False)
    if config.channels_last:
        peers.to(memory_format=torch.channels_last)  # pyrefly: ignore
    method.to(device, DTYPES[config.dtype])
    if "teacher" in method.needs:
        assert isinstance(config.method, KDConfig)
        teacher = load_teacher(config.method, data, config.model) if teacher is None else teacher
        teacher.to(device=device, dtype=DTYPES[config.dtype]).eval().requires_grad_(False)
        if config.channels_last:
            teacher.to(memory_format=torch.channels_last)  # pyrefly: ignore
    ema = MeanTeacher(peers, method.ema_decay) if "ema" in method.needs else None
    local = peers.local if isinstance(peers, MeshPeers) else peers
    frozen = freeze(local, config.freeze)
    if ema is not None:
        frozen += ema.counterparts(peers, frozen)
    if isinstance(peers, MeshPeers):
        peers.count_trained()
    if ema is not None and isinstance(ema.peers, MeshPeers):
        ema.peers.only_logits = True
    vary = config.augment
    augmentation = Augmentation(data.pad * vary, data.flip and vary, config.cutout, data.from_files and vary)
    views = peers.num_peers if "views" in method.needs else 1
    part = (data.x_train[splits.train], data.y_train[splits.train])
    loader = make_loader(config, data, part, device, augmentation, views)
    if mesh is not None:
        place = (0, 1) if mixes_images(config) else (mesh.data_index, mesh.num_data)
        loader.share(*place, mesh.own)
        execution = "loop"
    batch = loader.first()
    if execution is None or (mesh is None and config.execution in ("loop", "stacked")):
        execution = choose_execution(config, peers, method, batch)
    if execution == "stacked":
        stack(peers, ema, batch)
    if config.accumulate > 1 and (method.whole_batch or method.update == "alternating"):
        why = "steps one member after the other" if method.update == "alternating" else "hears the whole batch at once"
        raise InputError(f"--accumulate: {method.name} {why} as it is set up here; drop --accumulate")
    optimizers = make_optimizers(config, local, method, method.update == "alternating")
    guard = FiniteGuard([peers, method, *([ema] if ema else [])], optimizers, device, mesh, config.skip_nonfinite)
    return Training(
        config,
        device,
        data,
        splits,
        loader,
        peers,
        method,
        optimizers,
        guard,
        teacher,
        ema,
        execution,
        frozen,
        mesh=mesh,
    )


def _peers_and_method(config: Config, data: ImageSet, mesh: Mesh | None, fresh: bool) -> tuple[Peers, Method]:
    """Build the peers (on a mesh the rank's own) and the method that hears all of them."""
    assert isinstance(config.method, MethodConfig)
    start = config if fresh else dataclasses.replace(config, pretrained=False, weights=None)
    local = build_peers(start, len(data.classes), data.channels, data.image_size, mesh.own if mesh else None)
    for index in range(local.num_peers):
        local.member(index).recompute = config.checkpoint_activations
    local.autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    if mesh is None:
        peers = local
        method = build_method(config.method, peers, config.seed)
    else:
        if config.sync_bn and mesh.num_data > 1:
            synchronise(local, mesh)
        peers = MeshPeers(local, mesh)
        peers.autocast = local.autocast
        method = build_method(config.method, peers, config.seed)
        peers.serve(method)
    if isinstance(local, BranchPeers):
        local.set_rescale(method.rescale_trunk)
    return peers, method


def curve_loader(t: Training) -> Loader | None:
    """Return the set that is looked at during training: validation, or the test set under the papers' protocol."""
    if t.config.protocol == "paper":
        return test_loader(t)
    if not len(t.splits.val):
        return None
    return part_loader(t, t.splits.val)


def test_loader(t: Training) -> Loader:
    """Return the test set."""
    return _sharded(t, t.data.x_test, t.data.y_test)


def part_loader(t: Training, part: Any) -> Loader:
    """Return a part of the training set (indices), in order and as it is."""
    return _sharded(t, t.data.x_train[part], t.data.y_train[part])


def _sharded(t: Training, images: Any, labels: Any) -> Loader:
    """Return a loader that keeps the order; on a mesh, of this rank's part of the samples, every one on one rank."""
    if t.mesh is not None:
        first, last = t.mesh.shard(len(labels))[t.mesh.data_index :][:2]
        images, labels = images[first:last], labels[first:last]
    return make_loader(t.config, t.data, (images, labels), t.device)


def deployed_network(t: Training) -> nn.Module:
    """Return what `Config.deploy` names, as one network in evaluation mode."""
    if t.config.deploy == "ensemble":
        return t.method.deploy_ensemble(t.peers).eval()
    refuse_foreign(t.peers, deployed_index(t))
    if t.config.deploy == "ema":
        assert t.ema is not None
        return t.ema.export_member(t.method.deployed).eval()
    index = deployed_index(t)
    return (t.method.deploy(t.peers) if index == t.method.deployed else t.peers.export_member(index)).eval()


def deployed_index(t: Training) -> int:
    """Return the number of the member (or of the mean teacher) that is deployed."""
    return int(t.config.deploy) if t.config.deploy.isdigit() else t.method.deployed


def deployed_name(t: Training) -> str:
    """Return it in words: `member 3`, `ensemble`, `mean teacher 0`."""
    if t.config.deploy == "ensemble":
        return "ensemble"
    return f"{'mean teacher' if t.config.deploy == 'ema' else 'member'} {deployed_index(t)}"


def deployed_figures(t: Training, figures: dict[str, Any], ema_figures: dict[str, Any] | None) -> dict[str, float]:
    """Pick the deployed network's figures out of those of all members."""
    names = [name for name in ("top1", "top5", "nll", "ece") if name in figures]
    if t.config.deploy == "ensemble":
        return {name: figures[f"ensemble_{name}"] for name in names}
    index = deployed_index(t)
    source = ema_figures if t.config.deploy == "ema" and ema_figures is not None else figures
    return {name: source[name][index] for name in names}


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    """Return how many numbers a module's parameters hold, or those that are trained; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def numbers_trained_and_deployed(t: Training) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of those that are deployed."""
    if isinstance(t.peers, MeshPeers) and t.mesh is not None and t.mesh.num_peer > 1:
        counts = t.peers.parameter_counts
        trained = sum(t.peers.trained_counts) + count_parameters(t.method, trained=True)
        whole = sum(counts) + count_parameters(t.method)
        return trained, whole if t.config.deploy == "ensemble" else counts[deployed_index(t)]
    trained = count_parameters(t.peers, trained=True) + count_parameters(t.method, trained=True)
    return trained, count_parameters(deployed_network(t))


def load_run(
    path: str | Path,
    data_dir: str | None = None,
    device: Device = "auto",
    checkpoint: Checkpoint = "last",
    allow_import: bool = False,
    data: ImageSet | None = None,
) -> Training:
    """Build the peers of a run folder with the weights of a checkpoint, for evaluation and export.

    Args:
        path: The run folder.
        data_dir: Where the data lies now; default where the run found it.
        device: Where to run.
        checkpoint: The newest good one, or the best on validation.
        allow_import: Run the code that the folder names, where its network is one's own (package.module:callable).
        data: The images, where they were given from Python.

    Raises:
        InputError: there is no such run, its checkpoint is missing or damaged, its images are not what they were,
            or it names code.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise InputError(f"{path} is no run folder (it has no config.json)")
    config = Config.from_file(path)
    check_imports(names_of(config), path, allow_import)
    config = dataclasses.replace(config, device=device, data_dir=data_dir or config.data_dir, mesh=None).resolved()
    state = load_state(path, checkpoint)
    held = read_json(path / "data.json", "mean", "std")
    t = setup(config, execution=state.get("execution"), fresh=False, data=data, held=held)
    t.load_state(state)
    return t


def load_without_images(
    path: str | Path, device: Device = "auto", why: str = "", checkpoint: Checkpoint = "last"
) -> Training:
    """Load a run whose own images are not to be had, or not wanted; noise of their shape stands in for them.

    Args:
        path: The run folder.
        device: Where to run.
        why: The reason, in words.
        checkpoint: The newest good one, or the best on validation.

    Raises:
        InputError: there is no such run, or it does not say of what shape its images were.
    """
    held = read_json(Path(path) / "data.json", "name", "image_size", "channels", "classes")
    if held is None:
        return load_run(path, device=device, checkpoint=checkpoint)
    size = held["image_size"]
    noise = np.random.default_rng(0).integers(0, 256, (64, size, size, held["channels"]), dtype=np.uint8)
    labels = np.arange(64) % len(held["classes"])
    parts, classes, fit = (noise, labels, noise, labels), tuple(held["classes"]), held.get("fit", "stretch")
    stand_in = ImageSet(held["name"], *parts, classes, fit=fit, stand_in=why or "not asked for")
    return load_run(path, device=device, checkpoint=checkpoint, data=stand_in)
