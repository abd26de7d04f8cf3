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
from codistill.training.run import Training


def train_step(t: Training, views_VBCHW: Tensor, targets_B: Tensor, weight: float) -> dict[str, Tensor]:
    """Do one step and return the method's terms; the host waits for nothing here."""
    count, number, labels_B = len(targets_B), t.epoch * len(t.loader) + t.step, targets_B
    if wants_soft_labels(t.config):
        views_VBCHW, targets_B = mix_batch(t.config, t.peers.num_classes, views_VBCHW, labels_B, t.epoch, t.step)
    if t.mesh is not None:
        t.mesh.open(count, number)
        count, own = t.mesh.counted(t.method.whole_batch), t.mesh.own_rows()
        if mixes_images(t.config):  # until here the rank has had the whole batch
            views_VBCHW = views_VBCHW[:, own]
        if not t.method.whole_batch:
            targets_B, labels_B = targets_B[own], labels_B[own]
    if t.method.update == "alternating":
        terms, hits_P = _alternate(t, views_VBCHW, targets_B, labels_B, weight)
    else:
        terms, hits_P = _jointly(t, views_VBCHW, targets_B, labels_B, weight)
    t.guard.count()
    counted = t.guard.counted
    if t.ema is not None:
        t.ema.update(t.peers, number, ~t.guard.bad)
    t.guard.keep()
    if count:  # on a mesh, samples that other ranks count too are counted by one of them
        t.sums["loss"] += counted(terms["loss"].detach().to(t.sums["loss"].dtype)) * count
        t.sums["hits_P"] += counted(hits_P)
        t.sums["distill_P"] += counted(terms["distill_P"].to(t.sums["loss"].dtype)) * count
        if t.guard.limit:
            t.sums["skipped"] = t.sums.get("skipped", torch.zeros_like(t.guard.skipped)) + t.guard.passed_over() * count
    for name in filter(of_samples, terms):  # every rank keeps the sum, so that all can be added up
        total = counted(terms[name].sum(0, dtype=t.sums["loss"].dtype))
        t.sums[name] = t.sums.get(name, torch.zeros_like(total)) + total * bool(count)
    return terms


def of_samples(name: str) -> bool:
    """Say whether a term holds a row a sample (its letters begin with B): a method's attention, gate or weights."""
    return name.rpartition("_")[2].startswith("B")


def outputs_of(t: Training, views_VBCHW: Tensor) -> PeerOutputs:
    """Run the peers, and whatever else the method needs to hear."""
    outputs = t.peers(views_VBCHW)
    if t.ema is not None:
        outputs.ema_logits_PBC = t.ema(views_VBCHW).logits_PBC
    if t.teacher is not None:
        autocast = t.peers.autocast
        with torch.no_grad(), torch.autocast(t.device.type, autocast, enabled=autocast is not None):
            outputs.teacher_logits_BC = t.teacher(views_VBCHW[0]).to(outputs.logits_PBC.dtype)
    return outputs


def _backward(t: Training, loss: Tensor, optimizer: torch.optim.Optimizer, last: bool = True) -> None:
    """Add up the gradients of what `optimizer` holds, and of nothing else; on a mesh, at `last`, those of all ranks."""
    wanted = [p for group in optimizer.param_groups for p in group["params"]]
    if t.mesh is None:
        loss.backward(inputs=wanted)
        return
    (loss * t.mesh.weight(t.method.whole_batch)).backward(inputs=wanted)
    if not last:
        return
    if t.method.whole_batch:  # every rank's loss is of the whole batch, so each has found the whole already
        for parameter in t.method.parameters():
            if parameter.grad is not None:
                parameter.grad /= t.mesh.num_data
    t.mesh.sum_gradients(wanted)


def _update(t: Training, optimizer: torch.optim.Optimizer | None, terms: dict[str, Tensor]) -> None:
    t.guard.watch(terms)
    if optimizer is not None:
        if t.guard.lets_pass():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _jointly(
    t: Training, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step all members at once on the gradients of the batch, which runs in as many parts as `--accumulate` says."""
    parts, optimizer = min(t.config.accumulate, len(labels_B)), t.optimizers[0]
    shares, heard, hits = [], [], []
    batches = zip(views_VBCHW.tensor_split(parts, 1), targets_B.tensor_split(parts), labels_B.tensor_split(parts))
    for number, (views, targets, labels) in enumerate(batches, 1):
        outputs = outputs_of(t, views)
        terms = t.method(outputs, targets, weight)
        shares.append(len(labels) / len(labels_B))
        _backward(t, terms["loss"] if parts == 1 else terms["loss"] * shares[-1], optimizer, number == parts)
        heard.append({name: value.detach() for name, value in terms.items()})
        hits.append((outputs.logits_PBC.detach().argmax(-1) == labels).sum(-1))
    terms = heard[0] if parts == 1 else _of_parts(heard, shares)
    _update(t, optimizer, terms)
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
    t: Training, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step one member after the other, each on fresh predictions of all; its figures are those of its turn.

    What a member says changes by its own step alone, so each runs twice at most: with gradient for its own turn, and
    after its step for those who come later.
    """
    outputs, turns, hits = outputs_of(t, views_VBCHW), [], []
    logits_PBC = outputs.logits_PBC.detach().clone()
    said = dataclasses.replace(outputs, logits_PBC=logits_PBC, features=[f.detach() for f in outputs.features])
    with t.guard.undoing():
        for p in range(t.peers.num_peers):
            optimizer = _optimizer_of(t, p)
            if p:
                assert isinstance(t.peers, NetworkPeers | MeshPeers)
                t.peers.refresh(said, views_VBCHW, p - 1)
            terms = t.method(_in_turn(said, outputs, p), targets_B, weight)
            if optimizer is not None:
                _backward(t, terms["loss_P"][p], optimizer)
            _update(t, optimizer, terms)
            turns.append((terms["loss_P"][p].detach(), terms["distill_P"][p]))
            hits.append((outputs.logits_PBC[p].detach().argmax(-1) == labels_B).sum())
    loss_P, distill_P = (torch.stack(values) for values in zip(*turns))
    return {"loss": loss_P.sum(), "distill_P": distill_P}, torch.stack(hits)


def _in_turn(said: PeerOutputs, live: PeerOutputs, p: int) -> PeerOutputs:
    """Return what all have said, member p with the graph of its forward."""
    z_PBC, features = said.logits_PBC, [live.features[p] if q == p else f for q, f in enumerate(said.features)]
    logits_PBC = torch.cat((z_PBC[:p], live.logits_PBC[p : p + 1], z_PBC[p + 1 :]))
    return dataclasses.replace(said, logits_PBC=logits_PBC, features=features)


def _optimizer_of(t: Training, member: int) -> torch.optim.Optimizer | None:
    """Return the optimiser of a member; None where the member lives on another rank."""
    own = range(len(t.optimizers)) if t.mesh is None else t.mesh.own
    return t.optimizers[member - own.start] if member in own else None
