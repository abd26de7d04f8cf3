"""Building a run from its config: `build_run`."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from codistill.config import Config, TeacherConfig
from codistill.data import Augmentation, ImageSet, Loader, Splits
from codistill.distributed import Mesh, MeshPeers, MeshSnapshots, ProcessMesh, SingleProcess, convert_batchnorm
from codistill.methods import Method, build_method
from codistill.peers import (
    BranchPeers,
    NetworkPeers,
    Peers,
    TwinPeers,
    build_peers,
    check_mixable,
)
from codistill.training.copies import build_average, build_ema, move_to_device, prepare_remote_members
from codistill.training.execution import choose_execution, stack_peers
from codistill.training.loaders import load_images, make_loader, make_partitioned_loader
from codistill.training.nonfinite_guard import FiniteGuard
from codistill.training.optim import freeze_modules, make_optimizers
from codistill.training.previous_batch import PreviousBatch
from codistill.training.run import Run, zero_sums
from codistill.training.sam import check_sam
from codistill.training.step import parameters_of
from codistill.training.step_graph import StepGraph
from codistill.training.teacher import load_teacher
from codistill.training.trial import check_twins_differ, try_networks
from codistill.utils import DTYPES, InputError, accumulation_dtype, pick_device


def build_run(
    config: Config,
    teacher: nn.Module | None = None,
    *,
    execution: str | None = None,
    mesh: Mesh | None = None,
    load_weights: bool = True,
    for_training: bool = True,
    data: ImageSet | None = None,
    data_info: Mapping[str, Any] | None = None,
) -> Run:
    """Build data, peers, method and optimizers of a resolved config.

    Args:
        config: A resolved config.
        teacher: A trained network for a method that needs one, instead of the one its config names.
        execution: How the peers ran in an earlier part of this run, used where the config leaves the choice open.
        mesh: The ranks that train; default this process alone.
        load_weights: Read `pretrained` and `weights`; False where a checkpoint will be loaded anyway.
        for_training: Make optimizers, and stack the peers where they run so; False for evaluation, which needs neither
            (the first optimizer of a process takes a second, because torch then imports its compiler).
        data: Images given from Python, instead of those that the config names.
        data_info: The content of the run folder's data.json, where it exists.

    Raises:
        InputError: some part of the config cannot be used.
    """
    assert config.peers is not None
    mesh = SingleProcess(pick_device(config.device), config.peers) if mesh is None else mesh
    config = adapt_to_device(config, mesh.device)
    seed_everything(config, mesh.device)
    data, splits = load_images(config, data, data_info)
    peers, method = build_networks(config, data, mesh, load_weights=load_weights)
    if "teacher" in method.needs:
        teacher = build_teacher(config, data, mesh.device, teacher)
    notes: list[str] = []
    if not (mesh.sync_bn and mesh.num_data > 1):  # whose norms exchange statistics with the other ranks
        shape = (data.channels, data.image_size, data.image_size)
        config, notes = try_networks(config, peers.local, teacher, shape)
    loader = build_loader(config, data, splits, method, mesh)
    if for_training and isinstance(peers.local, TwinPeers) and "views" not in method.needs:
        check_twins_differ(peers.local, loader.sample_batch()[0][:16])
    ema, average = build_ema(config, data, peers, method, len(loader)), build_average(config, peers, len(loader))
    copies = [copy for copy in (ema, average) if copy is not None]
    frozen = freeze_modules(peers.local, config.freeze)
    frozen += [module for copy in copies for module in copy.counterparts(peers, frozen)]
    if isinstance(ema, MeshSnapshots):
        frozen += freeze_modules(ema.peers, config.freeze)
    prepare_remote_members(peers, copies)
    image_CHW = (data.channels, data.image_size, data.image_size)
    one_process = mesh.world == 1
    execution = choose_execution(config, peers, method, mesh.device, image_CHW, execution) if one_process else "loop"
    if execution == "stacked" and for_training:
        stack_peers(peers, ema, loader.sample_batch())
    optimizers = make_optimizers(config, peers.local, method) if for_training else []
    previous = build_previous(config, peers, method, loader, image_CHW) if for_training else None
    guarded = [peers, method, *copies, *([] if previous is None else [previous])]
    run = Run(
        config=config,
        mesh=mesh,
        data=data,
        splits=splits,
        loader=loader,
        peers=peers,
        method=method,
        optimizers=optimizers,
        guard=FiniteGuard(guarded, optimizers, mesh, config.skip_nonfinite),
        teacher=teacher,
        ema=ema,
        average=average,
        previous=previous,
        execution=execution,
        frozen=frozen,
        graph=build_graph(config, method, mesh, optimizers),
        notes=notes,
    )
    if run.members_apart:
        run.guard.terms_scale = mesh.num_peer
    run.progress.sums = zero_sums(run)
    return run


def build_graph(
    config: Config, method: Method, mesh: Mesh, optimizers: list[torch.optim.Optimizer]
) -> StepGraph | None:
    """Return what runs the training step as a CUDA graph; None where it runs eagerly, or nothing is trained."""
    if not optimizers or not can_capture_step(config, method, mesh):
        return None
    return StepGraph(parameters_of(optimizers[0]))


def can_capture_step(config: Config, method: Method, mesh: Mesh) -> bool:
    """Return whether the training step can be a CUDA graph: on one GPU, unless the config turns it off."""
    if mesh.device.type != "cuda" or mesh.world > 1 or not config.cuda_graph:
        return False
    # Recomputed activations save the random state on the host, which a capture refuses.
    return method.update_mode == "joint" and not config.checkpoint_activations and not config.sam_rho


def adapt_to_device(config: Config, device: torch.device) -> Config:
    """Return the config as the device can run it.

    Raises:
        InputError: the device lacks the dtype.
    """
    if config.dtype == "float64" and accumulation_dtype(device) is not torch.float64:
        raise InputError(f"--dtype float64: {device.type} has none; give --device cpu, or another --dtype")
    if device.type == "mps":  # where convolutions of channels_last ran backward 30 times slower (pytorch #193349)
        return dataclasses.replace(config, channels_last=False)
    return config


def seed_everything(config: Config, device: torch.device) -> None:
    """Seed torch, NumPy and Python, and switch deterministic algorithms on or off."""
    if config.deterministic or torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic and device.type == "cuda":  # else its matrix products refuse; read at their first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # users' networks and data may draw from these
    random.seed(config.seed)


def build_networks(config: Config, data: ImageSet, mesh: Mesh, *, load_weights: bool) -> tuple[Peers, Method]:
    """Build this rank's peers, and the method that trains all of them, on the device.

    Raises:
        InputError: the method cannot run in microbatches, and `--accumulate` asks for them.
    """
    source = config if load_weights else dataclasses.replace(config, pretrained=False, weights=None)
    classes, size = len(data.classes), data.image_size
    local = build_peers(source, classes, data.channels, size, mesh.local_members if mesh.num_peer > 1 else None)
    for index in range(local.num_peers):
        local.member(index).checkpoint_activations = config.checkpoint_activations
    local.autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    if mesh.sync_bn and mesh.num_data > 1 and isinstance(mesh, ProcessMesh):
        convert_batchnorm(local, mesh)
    peers = MeshPeers(local, mesh) if isinstance(mesh, ProcessMesh) else local
    method = build_method(config.method, peers, config.seed)
    method.targets_checked = True  # the data set's labels are checked when it is loaded
    if isinstance(peers, MeshPeers):
        peers.require(
            features="features" in method.needs,
            needs_full_batch=method.needs_full_batch,
            exits="exits" in method.needs,
            rows_per_image=method.rows_per_image,
            members_apart=method.exchanges_snapshots,
        )
    check_weights_can_be_averaged(method, local, mesh)
    check_inner_steps(method, mesh)
    check_previous_can_be_kept(config, method, mesh)
    check_sam(config, method)
    if method.update_mode == "alternating" and method.needs & {"exits", "rotations"}:
        raise InputError(f"{method.name} needs exits or rotations in a step of all members; set update_mode to joint")
    if isinstance(local, BranchPeers):
        local.set_rescale(method.rescale_trunk)
    if config.accumulate > 1 and (
        method.needs_full_batch or method.update_mode == "alternating" or method.remembers_batches
    ):
        reason = "updates one member after the other" if method.update_mode == "alternating" else "needs the full batch"
        raise InputError(f"--accumulate: {method.name} {reason} as it is configured here; drop --accumulate")
    move_to_device(peers, config, mesh.device)
    method.to(mesh.device, DTYPES[config.dtype])
    return peers, method


def check_weights_can_be_averaged(method: Method, local: Peers, mesh: Mesh) -> None:
    """Check the peers of a method that averages weights.

    Raises:
        InputError: they are no networks of one architecture, other ranks hold some, or they step in turn.
    """
    if not (method.mixes_weights or "hybrid" in method.needs):
        return
    if not isinstance(local, NetworkPeers):
        raise InputError(f"{method.name} averages the weights of whole networks; give --topology networks")
    if mesh.num_peer > 1:
        raise InputError(
            f"--mesh: {method.name} averages the weights of all peers, which each process then has to hold; give "
            f"--mesh data={mesh.world}"
        )
    if "hybrid" in method.needs and method.update_mode == "alternating":
        raise InputError(f"{method.name} needs the hybrid's logits in a step of all members; set update_mode to joint")
    check_mixable(local, method.name)


def check_inner_steps(method: Method, mesh: Mesh) -> None:
    """Check a run whose method tries inner steps.

    Raises:
        InputError: the batch or the peers are spread over processes.
    """
    if method.inner_interval and mesh.world > 1:
        raise InputError(
            f"--mesh: {method.name}, as it is configured here, tries steps with all networks on a whole batch; train "
            "in one process"
        )


def check_previous_can_be_kept(config: Config, method: Method, mesh: Mesh) -> None:
    """Check a run whose method needs the images of the step before.

    Raises:
        InputError: they are spread over processes or parts of a batch, or the method asks for other views too.
    """
    if "previous" not in method.needs:
        return
    if mesh.world > 1:
        raise InputError(f"--mesh: {method.name} sees the images of the step before again, in one process; drop --mesh")
    if config.accumulate > 1:
        raise InputError(f"--accumulate: {method.name} sees the images of the step before whole; drop --accumulate")
    if "views" in method.needs or method.update_mode == "alternating":
        raise InputError(f"method {method.name} needs previous; that takes one view for all members, and joint updates")


def build_previous(
    config: Config, peers: Peers, method: Method, loader: Loader, image_CHW: tuple[int, int, int]
) -> PreviousBatch | None:
    """Return what keeps a batch for the next step; None for a method that does not need it."""
    if "previous" not in method.needs:
        return None
    soft = bool(config.label_smoothing or config.mixup or config.cutmix)
    return PreviousBatch(peers, loader, image_CHW, soft_labels=soft)


def build_teacher(config: Config, data: ImageSet, device: torch.device, teacher: nn.Module | None) -> nn.Module:
    """Return the trained teacher, given or read from the file that the config names, in evaluation mode."""
    if not isinstance(config.method, TeacherConfig):
        raise InputError(f"{config.method.name} needs a teacher; derive its Config from codistill.config.TeacherConfig")
    teacher = load_teacher(config.method, data, config.model) if teacher is None else teacher
    move_to_device(teacher, config, device)
    return teacher.eval().requires_grad_(False)


def build_loader(config: Config, data: ImageSet, splits: Splits, method: Method, mesh: Mesh) -> Loader:
    """Return the loader of the training images; on a mesh each rank gets its rows and its members' views."""
    augment = config.augment
    augmentation = Augmentation(
        *(data.pad * augment, data.flip and augment, config.cutout, data.from_files and augment),
        policy=config.auto_augment,
        erasing=config.random_erasing,
    )
    views = method.num_views
    images, labels = data.x_train[splits.train], data.y_train[splits.train]
    if "partition" in method.needs:
        loader: Loader = make_partitioned_loader(
            config, data, (images, labels), mesh.device, augmentation, method.num_peers
        )
    else:
        loader = make_loader(config, data, (images, labels), mesh.device, augmentation, views)
    if mesh.world > 1:
        # Mixing needs the full batch on every rank; the step takes the rank's rows afterwards.
        shard = (0, 1) if config.mixup or config.cutmix else (mesh.data_index, mesh.num_data)
        loader.shard(*shard, mesh.local_members if mesh.num_peer > 1 else range(views))
    return loader
