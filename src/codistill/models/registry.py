"""The papers' networks for small images, and `resolve`, which returns the callable that builds a model by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from codistill.models import densenet, resnet, vgg
from codistill.models.external import KINDS, Source, accepted_kwargs, import_callable, parse_source
from codistill.models.weights import load_weights, read_weights
from codistill.utils import InputError, suggest

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
    "vgg16_no_dropout": vgg.vgg16_no_dropout,
    "vgg19_no_dropout": vgg.vgg19_no_dropout,
    "densenet40_12": densenet.densenet40_12,
    "densenet40_12_plain": densenet.densenet40_12_plain,
    "densenet100_12": densenet.densenet100_12,
}


def resolve(name: str, *, pretrained: bool = False, weights: str | None = None) -> Callable[..., nn.Module]:
    """Return the callable that builds the model of this name; it takes `num_classes` and `in_channels`.

    Args:
        name: A built-in name, timm:NAME, torchvision:NAME, hf:PATH or package.module:callable.
        pretrained: Start from the library's pretrained weights.
        weights: Start from this file instead (.safetensors, or a saved state dict).

    Raises:
        InputError: there is no such model, or it has no pretrained weights.
    """
    source = parse_source(name, pretrained=pretrained)
    if source is None and name not in MODELS:
        others = "; or give " + ", ".join([*KINDS.values(), "package.module:callable"])
        raise InputError(f'--model: unknown model "{name}"{suggest(name, MODELS)}{others}')
    if source is None and pretrained:
        raise InputError(
            f"--pretrained: {name} is built in and has no pretrained weights; give --weights FILE, or drop it"
        )
    if pretrained and weights is not None:
        raise InputError("--pretrained and --weights exclude each other; give one of them")
    if source is not None and source.kind not in KINDS:
        import_callable(source)  # raises for a wrong name before the data is read
    factory = MODELS[name] if source is None else source
    if weights is None:
        return factory
    return WithWeights(factory, read_weights(weights), f"--weights {weights}")


def build(factory: Callable[..., nn.Module], **kwargs: Any) -> nn.Module:
    """Call a factory with those of `num_classes`, `in_channels` and `image_size` that it takes, if not None."""
    return factory(**accepted_kwargs(factory, {key: value for key, value in kwargs.items() if value is not None}))


def has_weights(factory: object) -> bool:
    """Return whether the factory builds a trained network, so that its head is initialized again."""
    return isinstance(factory, WithWeights) or (isinstance(factory, Source) and factory.pretrained)


@dataclass
class WithWeights:
    """Builds a network and loads weights into it that were read from a file."""

    factory: Callable[..., nn.Module]
    weights: dict[str, Tensor]
    flag: str

    def __call__(
        self, num_classes: int | None = None, in_channels: int = 3, image_size: int | None = None
    ) -> nn.Module:
        """Build one network."""
        network = build(self.factory, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        return load_weights(network, self.weights, self.flag)


def source_of(name: str) -> str:
    """Return the source of the file that defines a built-in network; it imports nothing but torch."""
    import sys

    return inspect.getsource(sys.modules[MODELS[name].__module__])
