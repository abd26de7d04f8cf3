"""The papers' networks for small images, and `resolve`, which turns any model's name into a callable that builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from codistill.models import densenet, resnet, vgg
from codistill.models.external import KINDS, Source, fill, imported_callable, parse_source, read_weights
from codistill.utils.errors import InputError, suggest

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


def resolve(name: str, pretrained: bool = False, weights: str | None = None) -> Callable[..., nn.Module]:
    """Return the callable behind a model's name; it takes `num_classes` and `in_channels`.

    Args:
        name: A built-in name, timm:NAME, torchvision:NAME, hf:PATH or package.module:callable.
        pretrained: Start from the weights that the source offers.
        weights: Start from this file instead (.safetensors, or a saved state dict).

    Raises:
        InputError: there is no such model, or it comes with no weights.
    """
    source = parse_source(name, pretrained)
    if source is None and name not in MODELS:
        elsewhere = "; elsewhere: " + ", ".join([*KINDS.values(), "package.module:callable"])
        raise InputError(f'--model: unknown model "{name}"{suggest(name, MODELS)}{elsewhere}')
    if source is None and pretrained:
        raise InputError(f"--pretrained: {name} is built in and comes without weights; give --weights FILE, or drop it")
    if pretrained and weights is not None:
        raise InputError("--pretrained and --weights both name a start; give one of them")
    if source is not None and source.kind not in KINDS:
        imported_callable(source)  # a name that leads nowhere is said before the data is read
    factory = MODELS[name] if source is None else source
    if weights is None:
        return factory
    return WithWeights(factory, read_weights(weights), f"--weights {weights}")


def build(factory: Callable[..., nn.Module], **offers: Any) -> nn.Module:
    """Call a factory with what it takes of `num_classes`, `in_channels` and `image_size`; None is not offered."""
    accepted = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    known = {"num_classes", *accepted} if open_ended else set(accepted)
    return factory(**{key: value for key, value in offers.items() if key in known and value is not None})


def has_weights(factory: object) -> bool:
    """Say whether what the factory builds is trained already, so that its head is to be made anew."""
    return isinstance(factory, WithWeights) or (isinstance(factory, Source) and factory.pretrained)


@dataclass
class WithWeights:
    """Builds a network and fills it with weights that were read from a file."""

    factory: Callable[..., nn.Module]
    state: dict[str, Tensor]
    flag: str

    def __call__(
        self, num_classes: int | None = None, in_channels: int = 3, image_size: int | None = None
    ) -> nn.Module:
        """Build one network."""
        network = build(self.factory, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        return fill(network, self.state, self.flag)


def source_of(name: str) -> str:
    """Return the source of the file that defines a built-in network; it imports nothing but torch."""
    import sys

    return inspect.getsource(sys.modules[MODELS[name].__module__])
