"""Counting the parameters of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def count_parameters(module: nn.Module, *, trained_only: bool = False) -> int:
    """Return the number of a module's parameters (elements, not tensors); shared ones count once.

    Args:
        module: Any module.
        trained_only: Leave out frozen parameters.
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
