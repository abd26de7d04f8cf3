"""The papers' networks for small images, and `resolve`, which turns a model's name into a callable that builds it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from codistill.config import InputError, suggest
from codistill.models import densenet, resnet, vgg

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet.resnet8,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet56": resnet.resnet56,
    "resnet110": resnet.resnet110,
    "resnet110_basic": resnet.resnet110_basic,
    "wrn16_2": resnet.wrn16_2,
    "wrn40_2": resnet.wrn40_2,
    "wrn20_8": resnet.wrn20_8,
    "vgg16": vgg.vgg16,
    "vgg19": vgg.vgg19,
    "densenet40_12": densenet.densenet40_12,
    "densenet40_12_plain": densenet.densenet40_12_plain,
    "densenet100_12": densenet.densenet100_12,
}


def resolve(name: str) -> Callable[..., nn.Module]:
    """Return the callable behind a model's name; it takes `num_classes` and `in_channels`.

    Raises:
        InputError: there is no such model.
    """
    if name not in MODELS:
        raise InputError(f'--model: unknown model "{name}"{suggest(name, MODELS)}')
    return MODELS[name]


def source_of(name: str) -> str:
    """Return the source of the file that defines a built-in network; it imports nothing but torch."""
    import inspect
    import sys

    return inspect.getsource(sys.modules[MODELS[name].__module__])
