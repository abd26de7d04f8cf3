"""One checkpoint on every mesh: the state of a single process, put together from all ranks and taken apart again.

Members carry their numbers among all peers, and the optimiser's entries the numbers that its parameters would have in
one process, so that a checkpoint does not show on which mesh it was written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from codistill.distributed.mesh import Mesh
from codistill.runs.checkpoint import restore_rng

if TYPE_CHECKING:
    from codistill.training.run import Run

State = dict[str, Any]
MEMBER = re.compile(r"(?:^|(?<=\.))members\.(\d+)(?=\.)")


def gathered(run: Run, mesh: Mesh) -> State | None:
    """Return, on the first rank, what `Training.state` would return in one process; None elsewhere."""
    mesh.align([run.peers, *([run.ema] if run.ema else [])], run.method)
    sums = {name: mesh.sum_along_data(value) for name, value in run.sums.items()}
    part = {
        "peers": _renumbered(run.peers.state_dict(), mesh.own.start),
        "ema": None if run.ema is None else _renumbered(run.ema.state_dict(), mesh.own.start),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
    }
    parts = mesh.gather_peers(_on_host(part))
    if parts is None:
        return None
    held = [p["optimizers"] for p in parts]
    if run.method.update_mode == "alternating" or mesh.num_peer == 1:
        optimizers = [optimizer for part in held for optimizer in part]
    else:
        optimizers = [_joined([part[0] for part in held], _shared(run))]
    state = {name: getattr(run, name) for name in ("execution", "epoch", "step", "seconds", "best", "best_validation")}
    return state | {
        "peers": {key: value for p in parts for key, value in p["peers"].items()},
        "method": run.method.state_dict(),
        "ema": None if run.ema is None else {key: value for p in parts for key, value in p["ema"].items()},
        "optimizers": optimizers,
        "sums": sums,
        "skipped": run.guard.skipped,
    }


def load(run: Run, mesh: Mesh, state: State) -> None:
    """Take this rank's part of a checkpoint of any mesh."""
    run.peers.load_state_dict(_own_members(state["peers"], mesh))
    run.method.load_state_dict(state["method"])
    if run.ema is not None:
        run.ema.load_state_dict(_own_members(state["ema"], mesh))
    if run.method.update_mode == "alternating":
        held = [state["optimizers"][p] for p in mesh.own]
    elif mesh.num_peer == 1:
        held = state["optimizers"]
    else:
        own = run.optimizers[0].state_dict()
        numbers = {scale: len(_group(own, scale)) - (_shared(run) if scale == 1.0 else 0) for scale in _scales([own])}
        held = [_cut(state["optimizers"][0], mesh.all_gather_object(numbers), mesh.peer_index, _shared(run))]
    for optimizer, values in zip(run.optimizers, held, strict=True):
        optimizer.load_state_dict(values)
    run.epoch, run.step, run.seconds, run.best = (state[name] for name in ("epoch", "step", "seconds", "best"))
    run.best_validation = state.get("best_validation")
    run.guard.go_on(state.get("skipped", 0))
    # Sums add up along `data`: one rank goes on with what there is, the others with nothing.
    run.sums = {n: v.to(run.device) * (mesh.data_index == 0) for n, v in state["sums"].items()}
    restore_rng({name: value for name, value in state["rng"].items() if name != "cuda"})
    if run.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"][0], run.device)  # the first rank's, which all hold in common


def _shared(run: Run) -> int:
    """Return the number of the method's own parameters that are trained, which every rank holds."""
    return sum(p.requires_grad for p in run.method.parameters())


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


def _joined(parts: list[State], shared: int) -> State:
    """Put the ranks' optimisers over all of their members and the method together as one process has them.

    Every group of parameters holds the members' share, in order, and the first one then the method's.

    Args:
        parts: The optimisers' states, one a rank of the axis `peer`.
        shared: Number of the method's parameters, which all ranks hold.
    """
    entries: dict[int, Any] = {}
    groups: list[State] = []
    length = 0
    for scale in _scales(parts):
        first = length
        places = [(part, _group(part, scale)) for part in parts]
        common = shared if scale == 1.0 else 0
        turns = [(part, indices[: len(indices) - common]) for part, indices in places]
        if common:
            turns.append((places[0][0], places[0][1][-common:]))
        for part, indices in turns:
            for index in indices:
                if index in part["state"]:
                    entries[length] = part["state"][index]
                length += 1
        template = next(group for part in parts for group in part["param_groups"] if _scale(group) == scale)
        groups.append(template | {"params": list(range(first, length))})
    return {"state": entries, "param_groups": groups}


def _cut(whole: State, counts: list[dict[float, int]], index: int, shared: int) -> State:
    """Take a rank's part of what `_joined` returns; `counts` tells how many parameters of members each rank has."""
    entries: dict[int, Any] = {}
    groups: list[State] = []
    length = 0
    for group in whole["param_groups"]:
        scale = _scale(group)
        common = shared if scale == 1.0 else 0
        before, own = sum(c.get(scale, 0) for c in counts[:index]), counts[index].get(scale, 0)
        first, params = length, group["params"]
        for held in [*params[before : before + own], *params[len(params) - common :]]:
            if held in whole["state"]:
                entries[length] = whole["state"][held]
            length += 1
        if length > first:
            groups.append(group | {"params": list(range(first, length))})
    return {"state": entries, "param_groups": groups}


def _scale(group: State) -> float:
    """Return what tells groups of parameters apart: the factor of their rate (1, or the heads' own)."""
    return group.get("lr_scale", 1.0)


def _scales(parts: list[State]) -> list[float]:
    """Return the groups there are on any rank, in the order that one process has them."""
    return sorted({_scale(group) for part in parts for group in part["param_groups"]}, key=lambda scale: scale != 1.0)


def _group(part: State, scale: float) -> list[int]:
    """Return the numbers of a group's parameters; none where a rank has no such group."""
    return [index for group in part["param_groups"] if _scale(group) == scale for index in group["params"]]


def _on_host(value: Any) -> Any:
    """Move every tensor of nested containers to the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_host(v) for key, v in value.items()}
    return [_on_host(v) for v in value] if isinstance(value, list) else value
