"""Context managers that change the mode of modules and restore it: train or eval, and BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


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
