"""Everything a run works with, built from its config: device, data, peers, method, optimiser.

`setup` builds it, `load_run` builds it and fills in the weights of a run folder.
"""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codistill.config.config import Checkpoint, Config, Device
from codistill.config.methods import TeacherConfig
from codistill.data import ImageSet
from codistill.data.loader import Augmentation
from codistill.data.mixup import mixes_images
from codistill.distributed.mesh import Mesh
from codistill.distributed.peers import MeshPeers
from codistill.distributed.sync_batchnorm import synchronise
from codistill.methods import Method, build_method
from codistill.peers.base import Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.ema import MeanTeacher
from codistill.peers.from_config import build_peers
from codistill.runs.checkpoint import load_state
from codistill.training.execution import choose_execution, stack
from codistill.training.loaders import load_images, make_loader
from codistill.training.nonfinite_guard import FiniteGuard
from codistill.training.optim import freeze, make_optimizers
from codistill.training.run import Run
from codistill.training.teacher import load_teacher
from codistill.utils.allow_import import check_imports
from codistill.utils.device import DTYPES, accumulation_dtype, pick_device
from codistill.utils.errors import InputError
from codistill.utils.files import read_json


def setup(
    config: Config,
    teacher: nn.Module | None = None,
    execution: str | None = None,
    mesh: Mesh | None = None,
    fresh: bool = True,
    data: ImageSet | None = None,
    held: dict[str, Any] | None = None,
) -> Run:
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
    device = pick_device(config.device) if mesh is None else mesh.device
    if config.dtype == "float64" and accumulation_dtype(device) is not torch.float64:
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
        assert isinstance(config.method, TeacherConfig)
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
    if config.accumulate > 1 and (method.needs_full_batch or method.update_mode == "alternating"):
        why = (
            "steps one member after the other"
            if method.update_mode == "alternating"
            else "hears the whole batch at once"
        )
        raise InputError(f"--accumulate: {method.name} {why} as it is set up here; drop --accumulate")
    optimizers = make_optimizers(config, local, method, method.update_mode == "alternating")
    guard = FiniteGuard([peers, method, *([ema] if ema else [])], optimizers, device, mesh, config.skip_nonfinite)
    return Run(
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
        peers.serve("features" in method.needs, method.needs_full_batch)
    if isinstance(local, BranchPeers):
        local.set_rescale(method.rescale_trunk)
    return peers, method


def load_run(
    path: str | Path,
    data_dir: str | None = None,
    device: Device = "auto",
    checkpoint: Checkpoint = "last",
    allow_import: bool = False,
    data: ImageSet | None = None,
) -> Run:
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
    check_imports(config.network_names(), path, allow_import)
    config = dataclasses.replace(config, device=device, data_dir=data_dir or config.data_dir, mesh=None).resolved()
    state = load_state(path, checkpoint)
    held = read_json(path / "data.json", "mean", "std")
    run = setup(config, execution=state.get("execution"), fresh=False, data=data, held=held)
    run.load_state(state)
    return run


def load_without_images(
    path: str | Path, device: Device = "auto", why: str = "", checkpoint: Checkpoint = "last"
) -> Run:
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
