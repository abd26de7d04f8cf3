"""How the peers run in training: one after the other (`loop`), or all of them as one network (`stacked`)."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor

from codistill.config.config import Config
from codistill.methods import Method
from codistill.peers.base import Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.ema import MeanTeacher
from codistill.peers.stacked import StackedPeers
from codistill.utils.errors import InputError

Execution = Literal["loop", "stacked"]


def choose_execution(config: Config, peers: Peers, method: Method, saved: str | None = None) -> Execution:
    """Return how the peers run: as the config asks, else as the checkpoint did, else as a loop.

    Args:
        config: A resolved config; `auto`, and its old name `measure`, leave the choice open.
        peers: What is to run.
        method: What trains them.
        saved: The execution of the checkpoint that is continued or loaded, if there is one.

    Raises:
        InputError: `stacked` is asked for and impossible.
    """
    if config.execution not in ("loop", "stacked"):
        return cast(Execution, saved or "loop")
    if config.execution == "stacked" and (reason := why_not_stackable(config, peers, method)) is not None:
        raise InputError(f"--execution stacked: {reason}; use --execution loop")
    return config.execution


def why_not_stackable(config: Config, peers: Peers, method: Method) -> str | None:
    """Return why these peers cannot be stacked, None if nothing is known against it."""
    if peers.num_peers == 1:
        return "one peer cannot be stacked"
    if config.freeze or config.head_lr_scale != 1.0:
        return "--freeze and --head-lr-scale apply to single modules, and stacked modules hold all members' parameters"
    if method.update_mode == "alternating":
        return "alternating updates step one member at a time"
    if isinstance(peers, BranchPeers) and "views" in method.needs:
        return "branches with a view each run their trunk once per view"
    return None


def stack_peers(peers: Peers, ema: MeanTeacher | None, views_VBCHW: Tensor) -> None:
    """Make the peers (and their mean teachers) run stacked; two images of `views_VBCHW` test that outputs agree."""
    example_BCHW = views_VBCHW[0][:2]
    peers.stacked_runner = StackedPeers(peers, example_BCHW)
    if ema is not None:
        ema.peers.stacked_runner = StackedPeers(ema.peers, example_BCHW)
        for parameter in ema.peers.stacked_runner.parameters:
            parameter.requires_grad_(False)
