"""One step of the loop: forward, the method's loss, backward, update; the host waits for nothing here.

Shapes: P peers, V views, B batch, C classes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from codistill.data.mixup import mix_batch, mixes_images, wants_soft_labels
from codistill.distributed.peers import MeshPeers
from codistill.peers.base import PeerOutputs
from codistill.peers.networks import NetworkPeers
from codistill.training.run import Run


def train_step(run: Run, views_VBCHW: Tensor, targets_B: Tensor, weight: float) -> dict[str, Tensor]:
    """Do one step and return the method's terms; the host waits for nothing here."""
    count, number, labels_B = len(targets_B), run.epoch * len(run.loader) + run.step, targets_B
    if wants_soft_labels(run.config):
        views_VBCHW, targets_B = mix_batch(
            run.config, run.peers.num_classes, views_VBCHW, labels_B, run.epoch, run.step
        )
    if run.mesh is not None:
        run.mesh.open(count, number)
        count, own = run.mesh.num_counted(run.method.needs_full_batch), run.mesh.own_rows()
        if mixes_images(run.config):  # until here the rank has had the whole batch
            views_VBCHW = views_VBCHW[:, own]
        if not run.method.needs_full_batch:
            targets_B, labels_B = targets_B[own], labels_B[own]
    if run.method.update_mode == "alternating":
        terms, hits_P = _alternate(run, views_VBCHW, targets_B, labels_B, weight)
    else:
        terms, hits_P = _jointly(run, views_VBCHW, targets_B, labels_B, weight)
    run.guard.count()
    counted = run.guard.counted
    if run.ema is not None:
        run.ema.update(run.peers, number, ~run.guard.bad)
    run.guard.keep()
    if count:  # on a mesh, samples that other ranks count too are counted by one of them
        run.sums["loss"] += counted(terms["loss"].detach().to(run.sums["loss"].dtype)) * count
        run.sums["hits_P"] += counted(hits_P)
        run.sums["distill_P"] += counted(terms["distill_P"].to(run.sums["loss"].dtype)) * count
        if run.guard.limit:
            run.sums["skipped"] = (
                run.sums.get("skipped", torch.zeros_like(run.guard.skipped)) + run.guard.passed_over() * count
            )
    for name in filter(of_samples, terms):  # every rank keeps the sum, so that all can be added up
        total = counted(terms[name].sum(0, dtype=run.sums["loss"].dtype))
        run.sums[name] = run.sums.get(name, torch.zeros_like(total)) + total * bool(count)
    return terms


def of_samples(name: str) -> bool:
    """Say whether a term holds a row a sample (its letters begin with B): a method's attention, gate or weights."""
    return name.rpartition("_")[2].startswith("B")


def outputs_of(run: Run, views_VBCHW: Tensor) -> PeerOutputs:
    """Run the peers, and whatever else the method needs to hear."""
    outputs = run.peers(views_VBCHW)
    if run.ema is not None:
        outputs.ema_logits_PBC = run.ema(views_VBCHW).logits_PBC
    if run.teacher is not None:
        autocast = run.peers.autocast
        with torch.no_grad(), torch.autocast(run.device.type, autocast, enabled=autocast is not None):
            outputs.teacher_logits_BC = run.teacher(views_VBCHW[0]).to(outputs.logits_PBC.dtype)
    return outputs


def _backward(run: Run, loss: Tensor, optimizer: torch.optim.Optimizer, last: bool = True) -> None:
    """Add up the gradients of what `optimizer` holds, and of nothing else; on a mesh, at `last`, those of all ranks."""
    wanted = [p for group in optimizer.param_groups for p in group["params"]]
    if run.mesh is None:
        loss.backward(inputs=wanted)
        return
    (loss * run.mesh.weight(run.method.needs_full_batch)).backward(inputs=wanted)
    if not last:
        return
    if run.method.needs_full_batch:  # every rank's loss is of the whole batch, so each has found the whole already
        for parameter in run.method.parameters():
            if parameter.grad is not None:
                parameter.grad /= run.mesh.num_data
    run.mesh.sum_gradients(wanted)


def _update(run: Run, optimizer: torch.optim.Optimizer | None, terms: dict[str, Tensor]) -> None:
    run.guard.watch(terms)
    if optimizer is not None:
        if run.guard.lets_pass():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _jointly(
    run: Run, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step all members at once on the gradients of the batch, which runs in as many parts as `--accumulate` says."""
    parts, optimizer = min(run.config.accumulate, len(labels_B)), run.optimizers[0]
    shares, heard, hits = [], [], []
    batches = zip(views_VBCHW.tensor_split(parts, 1), targets_B.tensor_split(parts), labels_B.tensor_split(parts))
    for number, (views, targets, labels) in enumerate(batches, 1):
        outputs = outputs_of(run, views)
        terms = run.method(outputs, targets, weight)
        shares.append(len(labels) / len(labels_B))
        _backward(run, terms["loss"] if parts == 1 else terms["loss"] * shares[-1], optimizer, number == parts)
        heard.append({name: value.detach() for name, value in terms.items()})
        hits.append((outputs.logits_PBC.detach().argmax(-1) == labels).sum(-1))
    terms = heard[0] if parts == 1 else _of_parts(heard, shares)
    _update(run, optimizer, terms)
    return terms, hits[0] if parts == 1 else torch.stack(hits).sum(0)


def _of_parts(heard: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """Return the terms of a batch from those of its parts: rows one after the other, means by their shares."""
    whole = {}
    for name, first in heard[0].items():
        values = [terms[name] for terms in heard]
        if of_samples(name):
            whole[name] = torch.cat(values)
        elif first.dim() < 2:  # a number, or one a peer
            whole[name] = torch.stack([value * share for value, share in zip(values, shares)]).sum(0)
    return whole


def _alternate(
    run: Run, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step one member after the other, each on fresh predictions of all; its figures are those of its turn.

    What a member says changes by its own step alone, so each runs twice at most: with gradient for its own turn, and
    after its step for those who come later.
    """
    outputs, turns, hits = outputs_of(run, views_VBCHW), [], []
    logits_PBC = outputs.logits_PBC.detach().clone()
    said = dataclasses.replace(outputs, logits_PBC=logits_PBC, features=[f.detach() for f in outputs.features])
    with run.guard.undoing():
        for p in range(run.peers.num_peers):
            optimizer = _optimizer_of(run, p)
            if p:
                assert isinstance(run.peers, NetworkPeers | MeshPeers)
                run.peers.refresh(said, views_VBCHW, p - 1)
            terms = run.method(_in_turn(said, outputs, p), targets_B, weight)
            if optimizer is not None:
                _backward(run, terms["loss_P"][p], optimizer)
            _update(run, optimizer, terms)
            turns.append((terms["loss_P"][p].detach(), terms["distill_P"][p]))
            hits.append((outputs.logits_PBC[p].detach().argmax(-1) == labels_B).sum())
    loss_P, distill_P = (torch.stack(values) for values in zip(*turns))
    return {"loss": loss_P.sum(), "distill_P": distill_P}, torch.stack(hits)


def _in_turn(said: PeerOutputs, live: PeerOutputs, p: int) -> PeerOutputs:
    """Return what all have said, member p with the graph of its forward."""
    z_PBC, features = said.logits_PBC, [live.features[p] if q == p else f for q, f in enumerate(said.features)]
    logits_PBC = torch.cat((z_PBC[:p], live.logits_PBC[p : p + 1], z_PBC[p + 1 :]))
    return dataclasses.replace(said, logits_PBC=logits_PBC, features=features)


def _optimizer_of(run: Run, member: int) -> torch.optim.Optimizer | None:
    """Return the optimiser of a member; None where the member lives on another rank."""
    own = range(len(run.optimizers)) if run.mesh is None else run.mesh.own
    return run.optimizers[member - own.start] if member in own else None
