"""The state of a run as a checkpoint holds it: the same on every mesh and for every execution.

Members are numbered among all peers, and the optimizer's entries as the parameters of one process that loops over the
members. On several ranks the main rank puts the state together from all of them; restoring takes a rank's part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codistill.distributed import Mesh
from codistill.peers import MeanTeacher
from codistill.runs import errors_of_checkpoint, restore_rng
from codistill.training.run import Progress, Run
from codistill.utils import InputError, accumulation_dtype

State = dict[str, Any]
MEMBER = re.compile(r"(?:^|(?<=\.))members\.(\d+)(?=\.)")


def checkpoint_state(run: Run) -> State | None:
    """Return all that a continuation on any mesh needs; the main rank gets it, the others None."""
    mesh, progress = run.mesh, run.progress
    mesh.sync_buffers(run.modules_with_buffers, run.method)
    sums = {name: run.add_over_ranks(value) for name, value in progress.sums.items()}
    first = mesh.local_members.start
    local = {
        "peers": _renumber_members(run.peers.state_dict(), first),
        "ema": None if run.ema is None else _own_part(run.ema, mesh),
        "average": None if run.average is None else _renumber_members(run.average.state_dict(), first),
        "optimizers": [_split_members(run, optimizer.state_dict()) for optimizer in run.optimizers],
    }
    parts = mesh.gather_peers(local)
    if parts is None:
        return None
    return {
        "peers": {key: value for part in parts for key, value in part["peers"].items()},
        "method": run.method.state_dict(),
        "execution": run.execution,
        "ema": None if run.ema is None else {key: value for part in parts for key, value in part["ema"].items()},
        **_joined_average(parts),
        **({} if run.previous is None else {"previous": run.previous.state_dict()}),
        "optimizers": _join_ranks(run, [part["optimizers"] for part in parts]),
        "epoch": progress.epoch,
        "step": progress.step,
        "seconds": progress.seconds,
        "best": progress.best,
        "best_validation": progress.best_validation,
        "skipped": run.guard.skipped,
        "sums": sums,
    }


def _joined_average(parts: list[State]) -> State:
    """Return the average that is deployed, put together from its ranks; no entry where there is none."""
    if parts[0]["average"] is None:
        return {}
    return {"average": {key: value for part in parts for key, value in part["average"].items()}}


def restore_state(run: Run, state: Mapping[str, Any]) -> None:
    """Continue from what `checkpoint_state` returned, on this mesh or another.

    Raises:
        InputError: the state does not fit the run, or was written with `--execution stacked` by an early version, and
            this run loops.
    """
    with errors_of_checkpoint(state):
        _restore(run, state)


def _restore(run: Run, state: Mapping[str, Any]) -> None:
    mesh = run.mesh
    run.peers.load_state_dict(_pick_local_members(state["peers"], mesh))
    run.method.load_state_dict(state["method"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"] if run.ema.holds_all_members else _pick_local_members(state["ema"], mesh))
    if run.average is not None:
        run.average.load_state_dict(_pick_local_members(state["average"], mesh))
    if run.previous is not None:
        run.previous.load_state_dict(state["previous"])
    if run.optimizers:
        for optimizer, saved in zip(run.optimizers, _pick_local_optimizers(run, state["optimizers"]), strict=True):
            optimizer.load_state_dict(_join_members(run, saved, optimizer))
    run.progress = Progress(
        epoch=state["epoch"],
        step=state["step"],
        seconds=state["seconds"],
        best=state["best"],
        best_validation=state.get("best_validation"),
        sums={name: _restore_sum(run, value) for name, value in state["sums"].items()},
    )
    run.guard.restore(state.get("skipped", 0))
    _restore_rng(state["rng"], mesh)


def _restore_sum(run: Run, value: Tensor) -> Tensor:
    """Return a sum on this rank: the first of the ranks whose sums are added up takes it, and the others zeros."""
    value = value.to(accumulation_dtype(run.device)) if value.is_floating_point() else value
    first = run.mesh.data_index == 0 and not (run.members_apart and run.mesh.peer_index)
    return value.to(run.device) if first else torch.zeros_like(value, device=run.device)


def _restore_rng(rng: State, mesh: Mesh) -> None:
    """Restore the random states; on several ranks the GPU's is the main rank's, as they all share that stream."""
    if mesh.world == 1:
        restore_rng(rng)
        return
    restore_rng({name: value for name, value in rng.items() if name != "cuda"})
    if mesh.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"][0], mesh.device)


# -- members -----------------------------------------------------------------------------------------------------------


def _renumber_members(state: State, shift: int) -> State:
    """Add `shift` to the numbers of members in the names."""
    if not shift:
        return dict(state)
    return {MEMBER.sub(lambda found: f"members.{int(found[1]) + shift}", key, count=1): v for key, v in state.items()}


def _own_part(ema: MeanTeacher, mesh: Mesh) -> State:
    """Return the entries of this rank's members of the mean or snapshot teachers, numbered among all peers."""
    if not ema.holds_all_members:
        return _renumber_members(ema.state_dict(), mesh.local_members.start)
    return _select_members(ema.state_dict(), mesh.local_members)


def _select_members(state: State, members: range) -> State:
    """Return the entries of some members, with their numbers as they are."""
    selected = {}
    for key, value in state.items():
        found = MEMBER.search(key)
        assert found is not None, f"{key} belongs to no member"
        if int(found[1]) in members:
            selected[key] = value
    return selected


def _pick_local_members(state: State, mesh: Mesh) -> State:
    """Return the entries of this rank's members, numbered from 0."""
    if mesh.num_peer == 1:
        return state
    local = _select_members(state, mesh.local_members)
    return _renumber_members(local, -mesh.local_members.start)


# -- optimizers over stacked members -----------------------------------------------------------------------------------


def _split_members(run: Run, state: State) -> State:
    """Return an optimizer's state with one entry per parameter of every member, also where the peers are stacked."""
    return state if run.peers.stacked_runner is None else run.peers.stacked_runner.split_optimizer(state)


def _join_members(run: Run, saved: State, optimizer: torch.optim.Optimizer) -> State:
    """Return an optimizer's saved state in the form of this run's execution.

    Raises:
        InputError: it is a stacked run's of schema 1, which did not keep one entry per member.
    """
    runner = run.peers.stacked_runner
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in saved["param_groups"]] == sizes:
        return saved
    if runner is None:
        raise InputError(
            "--resume: the checkpoint was written with --execution stacked by an early version; give it again"
        )
    return runner.join_optimizer(saved)


# -- optimizers over several ranks -------------------------------------------------------------------------------------


def _join_ranks(run: Run, parts: list[list[State]]) -> list[State]:
    """Return the optimizers of all ranks of the axis `peer` as one process has them."""
    if run.method.update_mode == "alternating" or run.mesh.num_peer == 1:
        return [optimizer for part in parts for optimizer in part]
    return [_join_param_groups([part[0] for part in parts], _count_replicated(run))]


def _pick_local_optimizers(run: Run, saved: list[State]) -> list[State]:
    """Return this rank's part of what `_join_ranks` returned on any mesh."""
    mesh = run.mesh
    if run.method.update_mode == "alternating":
        return [saved[p] for p in mesh.local_members]
    if mesh.num_peer == 1:
        return saved
    own, replicated = run.optimizers[0].state_dict(), _count_replicated(run)
    counts = {
        scale: len(_group_indices(own, scale)) - (replicated if scale == 1.0 else 0) for scale in _lr_scales([own])
    }
    return [_cut_param_groups(saved[0], mesh.all_gather_object(counts), mesh.peer_index, replicated)]


def _count_replicated(run: Run) -> int:
    """Return the number of the method's trained parameters, which every rank holds."""
    return sum(p.requires_grad for p in run.method.parameters())


def _join_param_groups(parts: list[State], replicated: int) -> State:
    """Join the optimizers of several ranks into the one that a single process has.

    Every group of parameters holds the members' parameters in order, and the group of scale 1 then the method's.

    Args:
        parts: The optimizers' states, one per rank of the axis `peer`.
        replicated: Number of the method's parameters, which all ranks hold.
    """
    entries: dict[int, Any] = {}
    groups: list[State] = []
    length = 0
    for scale in _lr_scales(parts):
        first = length
        indices = [(part, _group_indices(part, scale)) for part in parts]
        common = replicated if scale == 1.0 else 0
        ordered = [(part, own[: len(own) - common]) for part, own in indices]
        if common:
            ordered.append((indices[0][0], indices[0][1][-common:]))
        for part, own in ordered:
            for index in own:
                if index in part["state"]:
                    entries[length] = part["state"][index]
                length += 1
        template = next(group for part in parts for group in part["param_groups"] if _lr_scale(group) == scale)
        groups.append(template | {"params": list(range(first, length))})
    return {"state": entries, "param_groups": groups}


def _cut_param_groups(whole: State, counts: list[dict[float, int]], rank: int, replicated: int) -> State:
    """Take a rank's part of what `_join_param_groups` returns.

    Args:
        whole: The optimizer of a single process.
        counts: Number of members' parameters per group (by its scale), one dictionary per rank of the axis `peer`.
        rank: Index along `peer`.
        replicated: Number of the method's parameters.
    """
    entries: dict[int, Any] = {}
    groups: list[State] = []
    length = 0
    for group in whole["param_groups"]:
        scale = _lr_scale(group)
        common = replicated if scale == 1.0 else 0
        before, own = sum(c.get(scale, 0) for c in counts[:rank]), counts[rank].get(scale, 0)
        first, params = length, group["params"]
        for index in [*params[before : before + own], *params[len(params) - common :]]:
            if index in whole["state"]:
                entries[length] = whole["state"][index]
            length += 1
        if length > first:
            groups.append(group | {"params": list(range(first, length))})
    return {"state": entries, "param_groups": groups}


def _lr_scale(group: State) -> float:
    """Return what identifies a group of parameters: the factor of its learning rate (1, or the heads' own)."""
    return group.get("lr_scale", 1.0)


def _lr_scales(parts: list[State]) -> list[float]:
    """Return the scales of the groups on any rank, in the order of a single process."""
    return sorted(
        {_lr_scale(group) for part in parts for group in part["param_groups"]}, key=lambda scale: scale != 1.0
    )


def _group_indices(part: State, scale: float) -> list[int]:
    """Return the indices of a group's parameters; none where a rank has no such group."""
    return [index for group in part["param_groups"] if _lr_scale(group) == scale for index in group["params"]]
