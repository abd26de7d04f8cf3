"""How the peers run in training: one after the other (`loop`), or all of them as one network (`stacked`).

On a CPU the loop is faster, except for very small networks and batches. On an NVIDIA GPU the kernels of one member are
too small to use the whole card, so `auto` stacks networks of few channels there.
"""

from __future__ import annotations

import copy
from typing import Literal, cast

from torch import Tensor, nn

from codistill.config import Config
from codistill.data import Loader
from codistill.methods import Method
from codistill.peers import MERGED_CHANNELS, BranchPeers, MeanTeacher, Peers, StackedPeers
from codistill.utils import InputError

Execution = Literal["loop", "stacked"]


def choose_execution(
    config: Config, peers: Peers, method: Method, loader: Loader, saved: str | None = None
) -> Execution:
    """Return how the peers run: as the config asks, else as the checkpoint did, else whichever is usually faster.

    Args:
        config: A resolved config; `auto`, and its old name `measure`, leave the choice open.
        peers: What is to run.
        method: What trains them.
        loader: The training images.
        saved: The execution of the checkpoint that is continued or loaded, if there is one.

    Raises:
        InputError: `stacked` is asked for and impossible.
    """
    if config.execution not in ("loop", "stacked"):
        return cast(Execution, saved or usually_faster(config, peers, method, loader))
    if config.execution == "stacked" and (reason := why_not_stackable(config, peers, method)) is not None:
        raise InputError(f"--execution stacked: {reason}; use --execution loop")
    return config.execution


def usually_faster(config: Config, peers: Peers, method: Method, loader: Loader) -> Execution:
    """Return `stacked` on an NVIDIA GPU for stackable networks of few channels, else `loop`."""
    if loader.device.type != "cuda" or not is_narrow(peers) or why_not_stackable(config, peers, method) is not None:
        return "loop"
    try:
        StackedPeers(copy.deepcopy(peers), loader.sample_batch()[0][:2])
    except InputError:
        return "loop"
    return "stacked"


def is_narrow(peers: Peers) -> bool:
    """Return whether no convolution has more input channels than merged groups of stacked convolutions may have."""
    convolutions = [module for module in peers.modules() if isinstance(module, nn.Conv2d)]
    return bool(convolutions) and max(conv.in_channels for conv in convolutions) <= MERGED_CHANNELS


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
