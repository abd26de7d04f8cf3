"""Modules in another mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_batchnorm_stats(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use batch statistics without recording them."""
    tracking = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in tracking:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


@contextmanager
def no_batchnorm_update(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm run as ever, down to what it saves for the backward, and move no running statistics."""
    tracking = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in tracking]
    counts = [m.num_batches_tracked for m in tracking if m.training and m.num_batches_tracked is not None]
    for m in tracking:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(tracking, momenta):
            m.momentum = momentum
        if counts:
            torch._foreach_sub_(counts, 1)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode for a while; every part gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
