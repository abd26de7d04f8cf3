"""How the peers run in training: one after the other (`loop`), or all of them as one network (`stacked`).

On a CPU the loop is faster, except for very small networks and batches. On an NVIDIA GPU the kernels of one member are
too small to use the whole card, so `auto` stacks networks of few channels there.
"""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
from torch import Tensor, nn

from codistill.config import Config
from codistill.methods import Method
from codistill.models import MODELS
from codistill.peers import MERGED_CHANNELS, BranchPeers, MeanTeacher, Peers, StackedPeers
from codistill.utils import InputError

Execution = Literal["loop", "stacked"]
MAX_STACKED_PIXELS = 8192
"""Batch x height x width up to which stacking wins on a CPU: then an operator takes less time than its call.

Measured for 2 to 8 peers (docs/log.md): stacking takes 0.44 to 0.98 of the loop's time up to this size, is equal at
twice the size, and takes 1.04 to 1.20 of it above.
"""
MAX_STACKED_CHANNELS = 128
"""Channels of a convolution up to which that holds; WRN-20-8 (512) took 1.27 of the loop's time, batch 8, 8 x 8."""


def choose_execution(
    config: Config,
    peers: Peers,
    method: Method,
    device: torch.device,
    image_CHW: tuple[int, int, int],
    saved: str | None = None,
) -> Execution:
    """Return how the peers run: as the config asks, else as the checkpoint did, else as is faster by the shapes.

    Args:
        config: A resolved config; `auto`, and its old name `measure`, leave the choice open.
        peers: What is to run.
        method: What trains them.
        device: Where they run.
        image_CHW: Shape of an image.
        saved: The execution of the checkpoint that is continued or loaded, if there is one.

    Raises:
        InputError: `stacked` is asked for and impossible.
    """
    if config.execution not in ("loop", "stacked"):
        if saved is not None:
            return cast(Execution, saved)
        wins = is_narrow(peers) if device.type == "cuda" else _is_small(config, device, image_CHW)
        return "stacked" if wins and _can_stack(config, peers, method, image_CHW) else "loop"
    if config.execution == "stacked" and (reason := why_not_stackable(config, peers, method)) is not None:
        raise InputError(f"--execution stacked: {reason}; use --execution loop")
    return config.execution


def is_narrow(peers: Peers) -> bool:
    """Return whether no convolution has more input channels than merged groups of stacked convolutions may have."""
    convolutions = [module for module in peers.modules() if isinstance(module, nn.Conv2d)]
    return bool(convolutions) and max(conv.in_channels for conv in convolutions) <= MERGED_CHANNELS


def _is_small(config: Config, device: torch.device, image_CHW: tuple[int, int, int]) -> bool:
    """Return whether stacking is known to be faster: in float32 on a CPU, for small batches of small images."""
    pixels = config.batch_size * image_CHW[1] * image_CHW[2] / config.accumulate
    return device.type == "cpu" and config.dtype == "float32" and pixels <= MAX_STACKED_PIXELS


def _can_stack(config: Config, peers: Peers, method: Method, image_CHW: tuple[int, int, int]) -> bool:
    """Return whether `auto` may stack the peers, tried on a copy: networks of this package that are all the same.

    Other networks could do in a forward what the comparison of outputs does not show, so they are stacked only on
    request.
    """
    if why_not_stackable(config, peers, method) is not None or config.checkpoint_activations:
        return False
    if len(set(config.model)) > 1 or config.model[0] not in MODELS:
        return False
    convolutions = [module for module in peers.modules() if isinstance(module, nn.Conv2d)]
    if max(conv.in_channels for conv in convolutions) > MAX_STACKED_CHANNELS:
        return False
    images_BCHW = torch.rand(2, *image_CHW, generator=torch.Generator().manual_seed(0))
    try:
        StackedPeers(copy.deepcopy(peers), images_BCHW.to(next(peers.parameters())))
    except InputError:
        return False
    return True


def why_not_stackable(config: Config, peers: Peers, method: Method) -> str | None:
    """Return why these peers cannot be stacked, None if nothing is known against it."""
    if peers.num_peers == 1:
        return "one peer cannot be stacked"
    if config.topology == "twins":
        return "twins are one network, which runs on the rows of both at once"
    if config.freeze or config.head_lr_scale != 1.0:
        return "--freeze and --head-lr-scale apply to single modules, and stacked modules hold all members' parameters"
    if config.sam_rho:
        return "--sam-rho moves each network by its own gradient, and stacked modules hold all members' parameters"
    if method.update_mode == "alternating":
        return "alternating updates step one member at a time"
    if method.pauses_members:
        return f"{method.name} steps some members and not others, and stacked modules hold all members' parameters"
    if "hybrid" in method.needs:
        return f"{method.name} runs a network whose weights are means of the members' own parameters"
    if any(peers.exit_dims):
        return (
            f"the exits of {method.name} run beside the networks, and stacked modules are those of the networks alone"
        )
    if any(peers.map_shapes):
        return f"{method.name} reads maps inside the networks, and stacked networks give their outputs alone"
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
