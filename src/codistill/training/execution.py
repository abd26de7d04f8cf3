"""Which way the peers run in training: a loop over members, or all stacked into one network.

On a CPU the loop wins but for very small networks and batches, so `auto` takes it; `measure` times both on copies.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

from codistill.config.config import Config
from codistill.methods import Method
from codistill.peers.base import Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.ema import MeanTeacher
from codistill.peers.stacked import StackedPeers
from codistill.utils.device import synchronize
from codistill.utils.errors import InputError

STEPS = 5


def choose_execution(config: Config, peers: Peers, method: Method, views_VBCHW: Tensor) -> str:
    """Return `loop` or `stacked`, as the config asks, by rule or by measuring; weights, buffers and RNG stay untouched.

    Raises:
        InputError: `stacked` is asked for and cannot be had.
    """
    if config.execution in ("auto", "loop"):
        return "loop"
    obstacle = why_not_stackable(config, peers, method)
    if config.execution == "stacked":
        if obstacle:
            raise InputError(f"--execution stacked: {obstacle}; use --execution loop")
        return "stacked"
    if obstacle:
        return "loop"
    loop = copy.deepcopy(peers)
    stacked = copy.deepcopy(peers)
    try:
        stacked.runner = StackedPeers(stacked, views_VBCHW[0][:2])
    except InputError:
        return "loop"
    seconds = time_interleaved([loop, stacked], views_VBCHW)
    return "stacked" if seconds[1] < seconds[0] else "loop"


def why_not_stackable(config: Config, peers: Peers, method: Method) -> str | None:
    """Return why these peers cannot be stacked, in words."""
    if peers.num_peers == 1:
        return "one peer has nobody to be stacked with"
    if config.freeze or config.head_lr_scale != 1.0:
        return "--freeze and --head-lr-scale mean single modules, and stacked ones hold all members' numbers in one"
    if method.update_mode == "alternating":
        return "alternating updates step one member at a time"
    if isinstance(peers, BranchPeers) and "views" in method.needs:
        return "branches with a view each run their trunk once a view"
    return None


def time_interleaved(contenders: list[Peers], views_VBCHW: Tensor) -> list[float]:
    """Return the median seconds of a forward and backward of each, taken in turn after a warm-up."""
    seconds: list[list[float]] = [[] for _ in contenders]
    device = views_VBCHW.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for turn in range(STEPS + 1):
            for peers, spent in zip(contenders, seconds):
                peers.train()
                began = time.perf_counter()
                peers(views_VBCHW).logits_PBC.sum().backward()
                synchronize(device)
                peers.zero_grad(set_to_none=True)
                if turn:
                    spent.append(time.perf_counter() - began)
    return [sorted(spent)[len(spent) // 2] for spent in seconds]


def stack(peers: Peers, ema: MeanTeacher | None, views_VBCHW: Tensor) -> None:
    """Make the peers (and their mean teachers) run stacked."""
    example = views_VBCHW[0][:2]
    peers.runner = StackedPeers(peers, example)
    if ema is not None:
        ema.peers.runner = StackedPeers(ema.peers, example)
        for parameter in ema.peers.runner.parameters:
            parameter.requires_grad_(False)
