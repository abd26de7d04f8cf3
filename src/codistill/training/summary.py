"""What a run reports: its description at the start, evaluations, and the contents of result.json and details.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from codistill.config import Config, images_per_class
from codistill.data import Loader
from codistill.distributed import MeshPeers, describe_imbalance
from codistill.evaluation import (
    PeerMetrics,
    evaluate_peers,
    forward_flops,
    inference_cost,
    inner_step_flops,
    plain_training_flops,
    training_flops,
)
from codistill.peers import PeerOutputs, Peers, TailAverage, eval_mode
from codistill.training.loaders import part_loader
from codistill.training.run import Run
from codistill.training.student import (
    count_trained_and_deployed,
    deployed_figures,
    deployed_index,
    deployed_name,
    deployed_network,
    deploys_average,
)
from codistill.utils import DTYPES, InputError, out_of_memory, physical_memory

MAX_CLASSES_IN_DETAIL = 100  # a confusion matrix of more classes is unreadable

LARGEST_SMALL_SIZE = 96
"""Side of images up to which the built-in networks, which are made for 32 x 32, raise no warning."""


def describe_run(run: Run, checkpoint: str | None = None) -> list[str]:
    """Describe a run in a few sentences, and warn of unfavorable settings.

    Args:
        run: What is trained.
        checkpoint: The file from which training continues, if it does.

    Raises:
        InputError: this machine's memory is too small for the images.
    """
    config = run.config
    members = f"{run.peers.num_peers} {config.topology}" if run.peers.num_peers > 1 else "1 network"
    trained, deployed = count_trained_and_deployed(run)
    where = str(run.device) if run.mesh.world == 1 else f"{run.mesh.world} x {run.device.type} as {config.mesh}"
    notes = [
        f"{config.method.name}: {members} of {' + '.join(config.model)}, {trained:,} parameters trained; "
        f"deployed: {deployed_name(run)} ({deployed:,})",
        f"{config.data}: {run.splits.describe(run.data)}; augmentation: "
        f"{run.data.describe_augmentation(**config.augmentation_options())}; protocol {config.protocol}",
        f"{config.epochs} epochs of {len(run.loader)} steps, batch {config.batch_size}, lr {config.lr:g}, "
        f"{config.schedule}{' at ' + ' '.join(map(str, config.milestones)) if config.milestones else ''}; "
        f"{config.dtype} on {where}, execution {run.execution}{', CUDA graph' if run.graph else ''}, "
        f"seed {config.seed}",
    ]
    if "partition" in run.method.needs:
        notes.append(
            f"each peer trains on its own {run.loader.num_samples:,} of the {len(run.splits.train):,} training images, "
            "once an epoch"
        )
    if config.sam_rho:
        notes.append(f"SAM with rho {config.sam_rho:g}: every step takes two forwards and two backwards")
    notes.append(_describe_classes(run.data.classes))
    notes += [*run.data.provenance.messages, *run.notes]
    class_imbalance = run.data.imbalance(run.splits.train)
    count = images_per_class(config.sampler)
    if count:
        notes.append(
            f"every batch holds {count} images of each of {config.batch_size // count} classes, drawn anew, "
            f"{len(run.loader)} batches an epoch{f', though {class_imbalance}' if class_imbalance else ''}"
        )
    elif config.balanced_sampling:
        notes.append(f"every class is drawn equally often{f', though {class_imbalance}' if class_imbalance else ''}")
    elif class_imbalance is not None:
        notes.append(f"{class_imbalance}; --balanced-sampling draws all equally often")
    if run.method.ramp_epochs:
        notes.append(f"distillation weight ramps up to {run.method.weight:g} over {run.method.ramp_epochs:g} epochs")
    _warn_of_settings(run)
    if checkpoint is not None:
        notes.append(f"resumed at epoch {run.progress.epoch}, step {run.progress.step}, from {checkpoint}")
    return notes


def _describe_classes(classes: tuple[str, ...]) -> str:
    """Return the number of classes and the first names.

    >>> _describe_classes(("ant", "bee"))
    '2 classes: ant, bee'
    """
    more = f", ... {classes[-1]}" if len(classes) > 11 else ""
    return f"{len(classes):,} classes: {', '.join(classes[: 10 if more else 11])}{more}"


def _warn_of_size(run: Run) -> None:
    """Warn of networks for small images that are trained on large ones, with an estimate of the memory.

    Raises:
        InputError: on a CPU, a single network's activations need more memory than this machine has.
    """
    config, size = run.config, run.data.image_size
    small = [name for name in config.model if ":" not in name]
    if size <= LARGEST_SMALL_SIZE or not small or run.mesh.world > 1:
        return
    image = torch.zeros(1, 1, run.data.channels, size, size, device=run.device, dtype=DTYPES[config.dtype])
    image = image.expand(1, run.method.rows_per_image, *image.shape[2:])
    megabytes = activation_bytes(run.peers, image) / 1e6
    together = -(-config.batch_size // config.accumulate)
    memory = physical_memory() if run.device.type == "cpu" and not config.checkpoint_activations else None
    if memory is not None and megabytes / run.peers.num_peers * together > memory / 1e6:
        raise InputError(
            f"--image-size: the activations of one {small[0]} at {size} x {size} take about "
            f"{megabytes / run.peers.num_peers * together / 1e3:,.1f} GB for {together} images, and this machine has "
            f"{memory / 1e9:,.1f}; give a smaller --image-size or --batch-size"
        )
    warnings.warn(
        f"{small[0]} is made for images of about 32 x 32: at {size} x {size} the activations of all peers take about "
        f"{megabytes:,.0f} MB an image, {megabytes * config.batch_size / 1e3:,.1f} GB for a batch of "
        f"{config.batch_size}; take a network for large images, such as torchvision:resnet18, or a smaller "
        "--image-size",
        stacklevel=4,
    )


def activation_bytes(peers: Peers, views_VBCHW: Tensor) -> int:
    """Return the bytes that a forward of all peers keeps for its backward, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in peers.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with eval_mode(peers), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = peers(views_VBCHW)  # kept until here, so that no memory is used twice
    del outputs
    return sum(count for place, count in kept.items() if place not in parameters)


def _warn_of_settings(run: Run) -> None:
    """Warn (on the main rank) of a ramp or a warm-up longer than the run, of large images, and of unequal ranks."""
    epochs, is_main = run.config.epochs, run.mesh.rank == 0
    reached = run.method.weight_at(epochs - 1)
    if run.method.ramp_epochs and reached < 0.99 and is_main:
        warnings.warn(
            f"the distillation weight only reaches {reached:.3g} of its full value in {epochs} epochs; "
            "shorten --method.ramp-epochs",
            stacklevel=3,
        )
    _warn_of_size(run)
    warning = _describe_warmup(run.config)
    if warning is not None and is_main:
        warnings.warn(warning, stacklevel=3)
    if isinstance(run.peers, MeshPeers):
        warning = describe_imbalance(run.peers, run.loader.sample_batch()[0][:1])
        if warning is not None and is_main:
            warnings.warn(warning, stacklevel=3)


def _describe_warmup(config: Config) -> str | None:
    """Return a sentence about a warm-up that does not end before the run or a milestone does, None for any other."""
    warmup = config.warmup_epochs
    if not warmup:
        return None
    if warmup >= config.epochs:
        return (
            f"the warm-up of {warmup:g} epochs does not end within the {config.epochs} epochs; shorten --warmup-epochs"
        )
    missed = [m for m in config.milestones or () if m <= warmup] if config.schedule == "step" else []
    if missed:
        numbers = ", ".join(map(str, missed))
        return (
            f"the warm-up of {warmup:g} epochs does not end before the milestone {numbers}, so the peak learning "
            "rate is never reached; shorten --warmup-epochs, or give later --milestones"
        )
    return None


def evaluate_run(run: Run, loader: Loader) -> dict[str, Any]:
    """Return the figures of the `members`, of their averages (`ema` or `swa`) and of the deployed `student`."""
    members = evaluate_peers(run.peers, run.method, loader, run.mesh).compute()
    average, figures = run.evaluated_average, None
    if average is not None:
        figures = evaluate_peers(average.peers, run.method, loader, run.mesh).compute()
    found = {"members": members, "ema": None, "student": deployed_figures(run, members, figures)}
    return found | {run.config.average_key: figures}


@torch.inference_mode()
def holdout_outputs(run: Run) -> tuple[Tensor, Tensor]:
    """Return every member's logits on the holdout, `P x N x C`, in evaluation mode, and the labels `N`."""
    loader = part_loader(run, run.splits.holdout)
    with eval_mode(run.peers):
        batches = [run.peers(views).logits_PBC for views, _ in loader.epoch()]
    none = run.loader.scale_C.new_zeros(run.peers.num_peers, 0, run.peers.num_classes)
    logits_PNC = run.mesh.gather_samples(torch.cat([none, *batches], 1), len(run.splits.holdout))
    return logits_PNC, torch.from_numpy(run.data.y_train[run.splits.holdout]).to(run.device)


def run_result(run: Run, members: dict[str, Any], average: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of result.json, without the cost: figures of members, averages and student."""
    trained, deployed = count_trained_and_deployed(run)
    progress = run.progress
    figures: dict[str, Any] = {
        "deployed": deployed_name(run),
        "student": deployed_figures(run, members, average),
        "protocol": run.config.protocol,
        "epochs": run.config.epochs,
        "test": members,
        "parameters_trained": trained,
        "parameters_deployed": deployed,
        "split": run.splits.describe(run.data),
        "augmentation": run.data.describe_augmentation(**run.config.augmentation_options()),
        "seconds": round(progress.seconds, 3),
        "execution": run.execution,
    }
    if average is not None:
        figures[f"test_{run.config.average_key}"] = average
    if progress.best_validation is not None:
        figures["best_validation"] = progress.best_validation
    if progress.best is not None:
        figures["best_test"] = progress.best
    return figures


def measure_cost(run: Run, forward: Callable[[Tensor], PeerOutputs]) -> dict[str, Any]:
    """Measure what training and inference cost (keys as in result.json).

    On several ranks no process holds everything that is trained, so most figures are left out, as are those that a
    network cannot be measured for; the run is complete all the same.

    Args:
        run: What was trained.
        forward: Forwards the peers and teachers, as the training step does.
    """
    if run.mesh.world > 1:
        return {"measured_on": f"{run.mesh.world} x {run.device.type}"}
    size = (run.data.channels, run.data.image_size, run.data.image_size)
    zeros_VBCHW = torch.zeros(run.method.num_views, 2, *size, dtype=DTYPES[run.config.dtype], device=run.device)
    labels_B = torch.zeros(2, dtype=torch.int64, device=run.device)
    flops, passes, inference = None, None, {}
    try:
        inference = inference_cost(deployed_network(run), zeros_VBCHW[0, 0], run.peers.autocast)
        with nullcontext() if run.previous is None else run.previous.of_size(len(labels_B)):
            flops = training_flops(run.peers, run.method, forward, zeros_VBCHW, labels_B)
        flops = 2 * flops if run.config.sam_rho else flops
        others = flops_of_averaging(run, zeros_VBCHW) + flops_of_inner_steps(run, zeros_VBCHW, labels_B)
        flops = flops + others if others else flops
        plain = run.peers.export_member(deployed_index(run)).eval()
        passes = flops / plain_training_flops(plain, zeros_VBCHW[0, 0])
    except Exception as error:  # users' networks may raise anything: some have no backward in evaluation mode
        if out_of_memory(error) is not None:
            raise
    return {
        "training_flops_a_sample": flops,
        "training_passes": None if passes is None else round(passes, 3),
        "samples_seen": run.loader.num_samples * run.config.epochs,
        "measured_on": str(run.device.type),
        **inference,
    }


def flops_of_averaging(run: Run, views_VBCHW: Tensor) -> float:
    """Return the FLOPs per training sample of the forwards in which an average's statistics are computed anew."""
    if not isinstance(run.average, TailAverage):
        return 0.0
    epochs = sum(run.average.count(epoch) > 1 for epoch in range(run.config.epochs))
    return epochs / run.config.epochs * forward_flops(run.peers, views_VBCHW)


def flops_of_inner_steps(run: Run, views_VBCHW: Tensor, labels_B: Tensor) -> float:
    """Return the FLOPs per training sample of the steps that the method tries."""
    interval = run.method.inner_interval
    if not (interval and run.optimizers):
        return 0.0
    batches = len(run.loader)
    share = math.ceil(batches / interval) / batches
    return share * inner_step_flops(run.method, run.peers, views_VBCHW, labels_B, run.optimizers[0])


def collect_details(run: Run, members: PeerMetrics, average: PeerMetrics | None) -> dict[str, Any]:
    """Return the content of details.json: the student's reliability and confusion, the ensemble's reliability."""
    source = average if deploys_average(run) and average is not None else members
    row = -1 if run.config.deploy == "ensemble" else deployed_index(run)
    return {
        "deployed": deployed_name(run),
        "classes": list(run.data.classes),
        **source.details(row),
        "ensemble_reliability": members.details(-1)["reliability"] if run.peers.num_peers > 1 else [],
    }
