"""Frozen modules, the learning-rate schedule, and the optimizers: SGD or AdamW, with a factor for the heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from codistill.config import Config
from codistill.methods import Method
from codistill.peers import BranchPeers, Peers, SharedModule
from codistill.utils import InputError, suggest


def freeze_modules(peers: Peers, paths: Iterable[str]) -> list[nn.Module]:
    """Freeze the named modules in every member and return them.

    Args:
        peers: Built peers.
        paths: Modules of the plain network; `trunk` means what branches share, or in whole networks all but the heads.

    Raises:
        InputError: a member has no such module, or nothing is left to train.
    """
    frozen: list[nn.Module] = []
    learns = any(p.requires_grad for p in peers.parameters())  # snapshots do not
    for path in paths:
        for p in range(peers.num_peers):
            body = peers.member(p).body
            named = {name.replace(".inner", ""): module for name, module in body.named_modules() if name}
            if path == "trunk" and isinstance(peers, BranchPeers):
                frozen += [module for module in body.modules() if isinstance(module, SharedModule)]
            elif path == "trunk":
                frozen.append(body)
            elif path in named:
                frozen.append(named[path])
            else:
                raise InputError(
                    f'--freeze "{path}" is no module of the network{suggest(path, ["trunk", *named][:200])}'
                )
    for module in frozen:
        module.requires_grad_(False)
    if frozen and learns and not any(p.requires_grad for p in peers.parameters()):
        raise InputError("--freeze leaves nothing to train; leave the heads out")
    return frozen


def make_optimizers(config: Config, peers: Peers, method: Method) -> list[torch.optim.Optimizer]:
    """Return one optimizer over everything, or one per member where the method alternates.

    Args:
        config: A resolved config.
        peers: This process's members.
        method: Its parameters are trained too.
    """
    if method.update_mode == "alternating":
        parameter_lists = [[*member.parameters()] for member in peers.members]
    else:
        parameter_lists = [[*peers.trained_parameters(), *method.parameters()]]
    heads = {id(q) for p in range(peers.num_peers) for q in peers.member(p).head.parameters()}
    optimizers: list[torch.optim.Optimizer] = []
    for parameters in parameter_lists:
        trained = [p for p in parameters if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained}]
        if config.head_lr_scale != 1.0:
            groups = [
                {"params": [p for p in trained if id(p) not in heads], "lr_scale": 1.0},
                {"params": [p for p in trained if id(p) in heads], "lr_scale": config.head_lr_scale},
            ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adamw":
            optimizers.append(torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, fused=True))
            names = ("exp_avg", "exp_avg_sq")
        else:
            options = (config.lr, config.momentum, 0.0, config.weight_decay, config.nesterov)
            optimizers.append(torch.optim.SGD(groups, *options, fused=True))
            names = ("momentum_buffer",) if config.momentum else ()
        # Zeros from the start: after a first step that the guard masks, SGD would read uninitialized memory.
        for parameter in trained:
            state = {name: torch.zeros_like(parameter) for name in names}
            if config.optimizer == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizers[-1].state[parameter] = state
    return optimizers


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate: the schedule's times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
