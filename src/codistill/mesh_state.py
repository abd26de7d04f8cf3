"""One checkpoint on every mesh: the state of a single process, put together from all ranks and taken apart again.

Members carry their numbers among all peers, and the optimiser's entries the numbers that its parameters would have in
one process, so that a checkpoint does not show on which mesh it was written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from codistill.checkpoint import restore_rng
from codistill.mesh import Mesh

if TYPE_CHECKING:
    from codistill.setup import Training

State = dict[str, Any]
MEMBER = re.compile(r"(?:^|(?<=\.))members\.(\d+)(?=\.)")


def gathered(t: Training, mesh: Mesh) -> State | None:
    """Return, on the first rank, what `Training.state` would return in one process; None elsewhere."""
    mesh.align([t.peers, *([t.ema] if t.ema else [])], t.method)
    sums = {name: mesh.sum_along_data(value) for name, value in t.sums.items()}
    part = {
        "peers": _renumbered(t.peers.state_dict(), mesh.own.start),
        "ema": None if t.ema is None else _renumbered(t.ema.state_dict(), mesh.own.start),
        "optimizers": [optimizer.state_dict() for optimizer in t.optimizers],
        "parameters": [len(list(member.parameters())) for member in t.peers.members],
    }
    parts = mesh.gather_peers(_on_host(part))
    if parts is None:
        return None
    state = {name: getattr(t, name) for name in ("execution", "epoch", "step", "seconds", "best", "best_validation")}
    return state | {
        "peers": {key: value for p in parts for key, value in p["peers"].items()},
        "method": t.method.state_dict(),
        "ema": None if t.ema is None else {key: value for p in parts for key, value in p["ema"].items()},
        "optimizers": _joined(parts, alternating=t.method.update == "alternating"),
        "sums": sums,
        "skipped": t.guard.skipped,
    }


def load(t: Training, mesh: Mesh, state: State) -> None:
    """Take this rank's part of a checkpoint of any mesh."""
    counts = _member_parameters(t, mesh)
    t.peers.load_state_dict(_own_members(state["peers"], mesh))
    t.method.load_state_dict(state["method"])
    if t.ema is not None:
        t.ema.load_state_dict(_own_members(state["ema"], mesh))
    if t.method.update == "alternating":
        held = [state["optimizers"][p] for p in mesh.own]
    else:
        before, own = sum(counts[: mesh.own.start]), sum(counts[mesh.own.start : mesh.own.stop])
        held = [_cut(state["optimizers"][0], before, own, sum(counts))] if mesh.num_peer > 1 else state["optimizers"]
    for optimizer, values in zip(t.optimizers, held, strict=True):
        optimizer.load_state_dict(values)
    t.epoch, t.step, t.seconds, t.best = (state[name] for name in ("epoch", "step", "seconds", "best"))
    t.best_validation = state.get("best_validation")
    t.guard.go_on(state.get("skipped", 0))
    # Sums add up along `data`: one rank goes on with what there is, the others with nothing.
    t.sums = {n: v.to(t.device) * (mesh.data_index == 0) for n, v in state["sums"].items()}
    restore_rng({name: value for name, value in state["rng"].items() if name != "cuda"})
    if t.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"][0], t.device)  # the first rank's, which all hold in common


def _member_parameters(t: Training, mesh: Mesh) -> list[int]:
    """Return the number of parameter tensors of every member, on whichever rank."""
    told = mesh.everybodys([len(list(member.parameters())) for member in t.peers.members])
    return [count for counts in told[: mesh.num_peer] for count in counts]


def _renumbered(state: State, by: int) -> State:
    """Add `by` to the numbers of members in the names."""
    if not by:
        return dict(state)
    return {MEMBER.sub(lambda found: f"members.{int(found[1]) + by}", key, count=1): v for key, v in state.items()}


def _own_members(state: State, mesh: Mesh) -> State:
    """Pick this rank's members, numbered from 0."""
    if mesh.num_peer == 1:
        return state
    own = {}
    for key, value in state.items():
        found = MEMBER.search(key)
        assert found is not None, f"{key} belongs to no member"
        if int(found[1]) in mesh.own:
            own[key] = value
    return _renumbered(own, -mesh.own.start)


def _joined(parts: list[State], alternating: bool) -> list[State]:
    """Put the ranks' optimisers together: a list, one a member, or one over all members and then the method."""
    if alternating or len(parts) == 1:
        return [optimizer for part in parts for optimizer in part["optimizers"]]
    total = sum(sum(part["parameters"]) for part in parts)
    entries: State = {}
    before, length = 0, 0
    for part in parts:
        own = sum(part["parameters"])
        for index, entry in part["optimizers"][0]["state"].items():
            entries[index + before if index < own else index - own + total] = entry
        length = total + len(part["optimizers"][0]["param_groups"][0]["params"]) - own
        before += own
    group = parts[0]["optimizers"][0]["param_groups"][0] | {"params": list(range(length))}
    return [{"state": dict(sorted(entries.items())), "param_groups": [group]}]


def _cut(optimizer: State, before: int, own: int, total: int) -> State:
    """Take from an optimiser over all members the entries of `own` parameters after the first `before`."""
    entries = {}
    for index, entry in optimizer["state"].items():
        if before <= index < before + own:
            entries[index - before] = entry
        elif index >= total:
            entries[index - total + own] = entry
    group = optimizer["param_groups"][0]
    length = own + len(group["params"]) - total
    return {"state": entries, "param_groups": [group | {"params": list(range(length))}]}


def _on_host(value: Any) -> Any:
    """Move every tensor of nested containers to the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(v) for key, v in value.items()}
    return [_on_host(v) for v in value] if isinstance(value, list) else value
