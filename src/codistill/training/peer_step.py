"""The parts of a training step that every loop shares: forward with teachers, members in turn, paused members.

They know peers and a method, and no loop: `training.step` uses them, and `PeerTraining` for the trainers of others.
Nothing here waits for the device. Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from codistill.data import rotate_images
from codistill.distributed import MeshPeers
from codistill.methods import Method, Terms
from codistill.peers import (
    MeanTeacher,
    NetworkPeers,
    PeerOutputs,
    Peers,
    SnapshotTeacher,
    Views,
    autocast_of,
    call_network,
    device_of,
)
from codistill.training.previous_batch import PreviousBatch


def make_mean_teacher(peers: Peers, method: Method, steps_per_epoch: int) -> MeanTeacher | None:
    """Return the teachers made of the peers' earlier weights, None for a method without them."""
    if "ema" not in method.needs:
        return None
    interval = method.snapshot_interval(steps_per_epoch)
    return SnapshotTeacher(peers, interval) if interval else MeanTeacher(peers, method.ema_decay)


def forward_with_teachers(
    peers: Peers,
    method: Method,
    views: Views,
    ema: MeanTeacher | None = None,
    teacher: nn.Module | None = None,
    previous: PreviousBatch | None = None,
) -> PeerOutputs:
    """Forward all peers, and the EMA and external teachers and the averaged weights that the method needs.

    Args:
        peers: All members.
        method: What trains them.
        views: One view, or those that the method needs; images are rotated here, where it needs rotations.
        ema: Mean or snapshot teachers.
        teacher: A trained network.
        previous: The batch of the step before.
    """
    if "rotations" in method.needs:
        views = rotate_images(views if isinstance(views, Tensor) else torch.stack([*views]))
    own_views = views[: peers.num_peers]  # the hybrid's comes after those of the members
    outputs = peers(own_views) if previous is None else previous(peers, views)
    if isinstance(ema, SnapshotTeacher) and "partition" in method.needs:
        outputs.others_logits_QPBC = ema.outputs_of_others(own_views)
    elif ema is not None:
        outputs.ema_logits_PBC = ema(own_views).logits_PBC
    if "hybrid" in method.needs:
        with torch.set_grad_enabled(torch.is_grad_enabled() and method.hybrid_has_gradient):
            outputs.hybrid_logits_BC = peers.hybrid_logits(views[-1], method.hybrid_shares())
    if teacher is not None:
        with torch.no_grad(), autocast_of(device_of(views[0]), peers.autocast):
            outputs.teacher_logits_BC = call_network(teacher, views[0]).to(outputs.logits_PBC.dtype)
    return outputs


def take_turns(
    peers: NetworkPeers | MeshPeers,
    method: Method,
    live: PeerOutputs,
    views: Any,
    targets_B: Tensor,
    weight: float,
) -> Iterator[Terms]:
    """Yield the terms of one member after the other, each against the current outputs of all.

    The caller steps on `terms["loss_P"][p]` in turn p, before it asks for the next. A member's outputs change by its
    own update alone, so each runs twice at most: with gradient for its own turn, and after its update for the members
    whose turn is later. The loss is computed outside autocast, like the heads.

    Args:
        peers: Whole networks; branches are never updated in turn.
        method: It alternates.
        live: The outputs of all members, with their graphs.
        views: What they were computed from.
        targets_B: The labels.
        weight: The ramp's value.
    """
    outputs = dataclasses.replace(
        live, logits_PBC=live.logits_PBC.detach().clone(), features=[f.detach() for f in live.features]
    )
    for p in range(peers.num_peers):
        if p:
            peers.refresh(outputs, views, p - 1)
        with torch.autocast(live.logits_PBC.device.type, enabled=False):
            terms = method(with_live_member(outputs, live, p), targets_B, weight)
        yield terms


def with_live_member(outputs: PeerOutputs, live: PeerOutputs, p: int) -> PeerOutputs:
    """Return the current outputs, member p's with the graph of its forward."""
    z_PBC, features = outputs.logits_PBC, [live.features[p] if q == p else f for q, f in enumerate(outputs.features)]
    logits_PBC = torch.cat((z_PBC[:p], live.logits_PBC[p : p + 1], z_PBC[p + 1 :]))
    return dataclasses.replace(outputs, logits_PBC=logits_PBC, features=features)


@contextmanager
def keep_inactive(
    members: Sequence[tuple[int, nn.Module]], optimizer: torch.optim.Optimizer, active_P: Tensor | None
) -> Iterator[None]:
    """Put back the weights and the optimizer's state of members that are not active after the steps made within.

    Chosen on the device, like `FiniteGuard.rollback_if_bad`; costs a copy of the parameters and of the state. A weight
    of 0 would not do: decay and momentum move a member whose gradient is 0.

    Args:
        members: Pairs of a member's number and the member.
        optimizer: It makes the steps. State that it does not have yet counts as zeros.
        active_P: Who steps, on the device; None: everyone.
    """
    if active_P is None:
        yield
        return
    trained = [(p, parameter) for p, member in members for parameter in member.parameters() if parameter.requires_grad]
    with torch.no_grad():
        before = {id(x): x.clone() for _, parameter in trained for x in _with_state(optimizer, parameter)}
    yield
    with torch.no_grad():
        for p, parameter in trained:
            for x in _with_state(optimizer, parameter):
                old = before.get(id(x))
                x.copy_(torch.where(active_P[p], x, torch.zeros_like(x) if old is None else old))


def _with_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return a parameter and its tensors in the optimizer's state."""
    return [parameter, *(x for x in optimizer.state.get(parameter, {}).values() if isinstance(x, Tensor))]
