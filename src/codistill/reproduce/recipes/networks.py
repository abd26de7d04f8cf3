"""Networks of published tables that torchvision builds but has no name for; recipes name them as MODULE:FUNCTION."""

from __future__ import annotations

from torch import nn

from codistill.utils.errors import InputError


def mobilenet_v2_x0_5(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """MobileNetV2, half as wide."""
    return _mobilenet_v2(0.5, num_classes, in_channels)


def mobilenet_v2_x1_2(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """MobileNetV2, 1.2 times as wide."""
    return _mobilenet_v2(1.2, num_classes, in_channels)


def _mobilenet_v2(width: float, num_classes: int, in_channels: int) -> nn.Module:
    from torchvision.models import mobilenet_v2

    if in_channels != 3:
        raise InputError(f"--model: MobileNetV2 takes colour images, not {in_channels} channels")
    return mobilenet_v2(num_classes=num_classes, width_mult=width)
