"""One training step: forward, the method's loss, backward, update. Nothing here waits for the device.

`train_step` prepares the batch and records the figures. In between, `joint_step` updates all members at once
(`compute_gradients`, then the optimizer), or `alternating_step` one after the other.
Shapes: P peers, V views (1, or one per peer), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from codistill.distributed import MeshPeers
from codistill.methods import TrainingStep
from codistill.peers import NetworkPeers, PeerOutputs
from codistill.training.peer_step import forward_with_teachers, keep_inactive, take_turns
from codistill.training.run import Run
from codistill.training.sam import compute_sam_gradients

Terms = dict[str, Tensor]


def train_step(run: Run, views_VBCHW: Tensor, targets_B: Tensor, weight: float) -> Terms:
    """Do one step and return the method's terms.

    Args:
        run: What is trained; its sums are increased, `progress.step` is left to the caller.
        views_VBCHW: What the run's loader yields: on a mesh this rank's rows, or the full batch where images are mixed.
        targets_B: Labels of the full batch; `P x B`, where every member has its own images.
        weight: The ramp's value, `run.method.weight_at(epoch)`.
    """
    mesh, progress, number = run.mesh, run.progress, run.steps_done
    full_batch, labels_B = run.method.needs_full_batch, targets_B
    if run.mixer.makes_soft_labels:
        views_VBCHW, targets_B = run.mixer(views_VBCHW, labels_B, progress.epoch, progress.step)
    mesh.begin_step(labels_B.shape[-1], number)
    rows = mesh.local_rows()
    if run.mixer.mixes_images:  # until here every rank has the full batch
        views_VBCHW = views_VBCHW[:, rows]
    if not full_batch:
        targets_B, labels_B = take_rows(targets_B, rows), labels_B[..., rows]
    place = TrainingStep(number, progress.epoch, ends_epoch=progress.step + 1 == len(run.loader))
    run.method.before_step(run.peers, place)
    step = alternating_step if run.method.update_mode == "alternating" else joint_step
    terms, hits_P = step(run, views_VBCHW, targets_B, labels_B, weight)
    run.guard.advance()
    run.method.after_step(run.peers, dataclasses.replace(place, good=~run.guard.bad))
    if run.method.inner_interval and progress.step % run.method.inner_interval == 0:
        run.method.run_inner_steps(run.peers, views_VBCHW, targets_B, run.optimizers[0])
    if run.ema is not None:
        run.ema.update(run.peers, number, ~run.guard.bad)
    if run.previous is not None:
        run.previous.rows = len(labels_B)
    if run.average is not None:  # the weights of a skipped step are those before it, so it counts
        run.average.update(run.peers, number, run.guard.flag == 0)
    run.guard.snapshot_if_skipping()
    add_to_sums(run, terms, hits_P, mesh.num_counted(full_batch=full_batch))
    return terms


def joint_step(
    run: Run, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[Terms, Tensor]:
    """Update all members at once on the gradients of the batch.

    Returns:
        The terms of the batch, and every member's number of correct guesses `P`; with `run.graph`, the next step
        overwrites both.
    """
    (optimizer,) = run.optimizers
    if run.config.sam_rho:
        compute = partial(compute_gradients, run, views_VBCHW, targets_B, labels_B, weight)
        terms, hits_P = compute_sam_gradients(run, compute)
    elif run.graph is None:
        terms, hits_P = compute_gradients(run, views_VBCHW, targets_B, labels_B, weight)
    else:
        variant = 0 if run.previous is None else run.previous.rows
        compute = partial(compute_gradients, run)
        terms, hits_P = run.graph(compute, views_VBCHW, targets_B, labels_B, weight, variant)
    run.guard.update_flag(terms)
    if run.guard.should_step():
        members = [(p, run.peers.local.member(k)) for k, p in enumerate(run.mesh.local_members)]
        with keep_inactive(members, optimizer, terms.get("active_P") if run.method.pauses_members else None):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms, hits_P


def compute_gradients(
    run: Run, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float | Tensor
) -> tuple[Terms, Tensor]:
    """Run forward and backward of the batch, in `--accumulate` microbatches; the gradients are left in the parameters.

    Returns:
        The terms of the batch, and every member's number of correct guesses `P`.
    """
    (optimizer,) = run.optimizers
    parameters = parameters_of(optimizer)
    batch = labels_B.shape[-1]
    count = max(min(run.config.accumulate, batch // 2), 1)  # BatchNorm needs two samples in each
    split_targets = targets_B.tensor_split(count, axis_of_rows(targets_B))
    microbatches = zip(views_VBCHW.tensor_split(count, 1), split_targets, labels_B.tensor_split(count, -1))
    microbatch_terms, fractions, hits = [], [], []
    for views, targets, labels in microbatches:
        outputs = forward_all(run, views)
        terms = run.method(outputs, targets, weight)
        fractions.append(labels.shape[-1] / batch)
        weighted_loss(run, terms["loss"], fractions[-1]).backward(inputs=parameters)
        microbatch_terms.append({name: value.detach() for name, value in terms.items()})
        if run.previous is not None:  # then the batch is one part
            run.previous.store(views, targets, outputs.logits_PBC)
        upright_PBC = outputs.logits_PBC.detach()[:, :: run.method.rows_per_image]
        hits.append((upright_PBC.argmax(-1) == labels).sum(-1))
    reduce_gradients(run, parameters)
    terms, hits_P = combine_microbatches(microbatch_terms, fractions), sum_of(hits)
    return keep_own_figures(run, terms, hits_P) if run.members_apart else (terms, hits_P)


def alternating_step(
    run: Run, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[Terms, Tensor]:
    """Update one member after the other (see `take_turns`); a member's figures are those of its turn."""
    assert isinstance(run.peers, NetworkPeers | MeshPeers)  # branches are never updated in turn
    live = forward_all(run, views_VBCHW)
    losses, distill_terms, hits = [], [], []
    with run.guard.rollback_if_bad():
        for p, terms in enumerate(take_turns(run.peers, run.method, live, views_VBCHW, targets_B, weight)):
            is_local = p in run.mesh.local_members
            optimizer = run.optimizers[p - run.mesh.local_members.start] if is_local else None
            if optimizer is not None:
                parameters = parameters_of(optimizer)
                weighted_loss(run, terms["loss_P"][p]).backward(inputs=parameters)
                reduce_gradients(run, parameters)
            run.guard.update_flag(terms)
            if optimizer is not None:
                if run.guard.should_step():
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(terms["loss_P"][p].detach())
            distill_terms.append(terms["distill_P"][p])
            hits.append((live.logits_PBC[p].detach().argmax(-1) == labels_B).sum())
    return {"loss": torch.stack(losses).sum(), "distill_P": torch.stack(distill_terms)}, torch.stack(hits)


def forward_all(run: Run, views_VBCHW: Tensor) -> PeerOutputs:
    """Forward all peers, and the EMA and external teachers and the averaged weights that the method needs.

    Args:
        run: What is trained.
        views_VBCHW: One view, or those that the method needs; rotated here, where it needs rotations.
    """
    outputs = forward_with_teachers(run.peers, run.method, views_VBCHW, run.ema, run.teacher, run.previous)
    gathers = run.peers.training and run.method.needs_full_batch
    if outputs.teacher_logits_BC is not None and gathers and isinstance(run.peers, MeshPeers):
        outputs.teacher_logits_BC = run.peers.gather_rows(outputs.teacher_logits_BC)
    return outputs


def axis_of_rows(targets: Tensor) -> int:
    """Return the axis of a batch's rows: the last one of class numbers, the last but one of soft labels."""
    return -2 if targets.is_floating_point() else -1


def take_rows(targets: Tensor, rows: slice) -> Tensor:
    """Return some rows of class numbers or soft labels, of one batch or one for each member."""
    return targets[..., rows, :] if targets.is_floating_point() else targets[..., rows]


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(0)


def keep_own_figures(run: Run, terms: Terms, hits_P: Tensor) -> tuple[Terms, Tensor]:
    """Set the figures of other ranks' members to 0: this rank has none of their outputs. They add up along `peer`."""
    own_P = torch.zeros_like(terms["loss_P"])
    own_P[run.mesh.local_members.start : run.mesh.local_members.stop] = 1.0
    kept = {name: terms[name] * own_P for name in ("loss_P", "ce_P", "distill_P")}
    return {"loss": kept["loss_P"].sum(), **kept}, hits_P * own_P.to(hits_P.dtype)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer updates; backward adds gradients to these alone."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def weighted_loss(run: Run, loss: Tensor, fraction: float = 1.0) -> Tensor:
    """Return the loss times its microbatch's fraction of the rows and, on a mesh, the rank's part of the batch."""
    for factor in (fraction, run.mesh.loss_weight(full_batch=run.method.needs_full_batch)):
        loss = loss if factor == 1.0 else loss * factor
    return loss


def reduce_gradients(run: Run, parameters: list[Tensor]) -> None:
    """Sum the gradients of all data ranks; where every rank has the full batch, the method's are whole already."""
    if run.mesh.num_data > 1 and run.method.needs_full_batch:
        for parameter in run.method.parameters():
            if parameter.grad is not None:
                parameter.grad /= run.mesh.num_data
    run.mesh.sum_gradients(parameters)


def combine_microbatches(microbatch_terms: list[Terms], fractions: list[float]) -> Terms:
    """Return the terms of a batch from those of its microbatches: rows are concatenated, means weighted."""
    if len(microbatch_terms) == 1:
        return microbatch_terms[0]
    combined = {}
    for name, first in microbatch_terms[0].items():
        values = [terms[name] for terms in microbatch_terms]
        if is_per_sample(name):
            combined[name] = torch.cat(values)
        elif first.dim() < 2:  # a number, or one per peer
            combined[name] = torch.stack([value * fraction for value, fraction in zip(values, fractions)]).sum(0)
    return combined


def add_to_sums(run: Run, terms: Terms, hits_P: Tensor, count: int) -> None:
    """Add the step's figures to the epoch's sums.

    Args:
        run: Its sums are increased.
        terms: The step's terms.
        hits_P: Correct guesses.
        count: Samples that this rank counts; 0 where another rank counts them.
    """
    sums, guard = run.progress.sums, run.guard
    dtype = sums["loss"].dtype
    if count:
        sums["loss"] += guard.mask_bad(terms["loss"].detach().to(dtype)) * count
        sums["hits_P"] += guard.mask_bad(hits_P)
        sums["distill_P"] += guard.mask_bad(terms["distill_P"].to(dtype)) * count
    if guard.limit:  # every rank keeps this sum too: a rank without it would exchange other sums than the rest
        once = not (run.members_apart and run.mesh.peer_index)  # else every rank of the axis `peer` adds them
        skipped = guard.skipped_mask() * (count * once)
        sums["skipped"] = sums.get("skipped", torch.zeros_like(guard.skipped)) + skipped
    for name in filter(is_per_sample, terms):  # every rank keeps the sum, so that all can be added
        total = guard.mask_bad(terms[name].sum(0, dtype=dtype))
        sums[name] = sums.get(name, torch.zeros_like(total)) + total * bool(count)


def is_per_sample(name: str) -> bool:
    """Return whether a term has a row per sample (its shape letters begin with B): attention, a gate, weights."""
    return name.rpartition("_")[2].startswith("B")
