"""Copies of modules, and context managers that change the mode of modules (train or eval, BatchNorm's statistics)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copy_module(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return an independent copy of a module that may keep computed tensors (deepcopy refuses those with a graph).

    `weight_norm`, `spectral_norm` and pruning of `torch.nn.utils` keep the weight that they compute as an attribute.

    Args:
        module: What is copied.
        memo: Objects that are not copied, by id, and what stands for them in the copy (see `copy.deepcopy`).
    """
    memo = {} if memo is None else memo
    for submodule in module.modules():
        for value in vars(submodule).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


@contextmanager
def frozen_batchnorm_stats(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize by batch statistics without recording them."""
    norms = _tracking_norms(module)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def no_batchnorm_update(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics unchanged; all else, what BatchNorm saves for the backward included, is as usual."""
    norms = _tracking_norms(module)
    momenta = [norm.momentum for norm in norms]
    counts = [n.num_batches_tracked for n in norms if n.training and n.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        if counts:
            torch._foreach_sub_(counts, 1)


def autocast_of(device: torch.device, dtype: torch.dtype | None, *, cache: bool = True) -> torch.autocast:
    """Return autocast to a dtype; with None what the caller is in stays, autocast of its own or none.

    Args:
        device: Of the tensors.
        dtype: What to compute in.
        cache: Whether a weight may be cast once for all uses within the caller's autocast; False where it has changed.
    """
    if dtype is None and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=None if cache else False)


def eval_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Put `module` into evaluation mode within the context; every submodule gets its own mode back."""
    return _mode(module, training=False)


def train_mode(module: nn.Module) -> AbstractContextManager[None]:
    """Put `module` into training mode within the context; every submodule gets its own mode back."""
    return _mode(module, training=True)


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def _tracking_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
