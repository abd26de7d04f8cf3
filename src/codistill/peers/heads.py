"""Classifier heads: how each is cut off a network, what takes its place, and how it is put back.

Most heads are one linear layer, or a container of layers that ends in one: an identity takes its place, and it is
called on what the rest returns. Two other kinds need a wrapper:

- a 1 x 1 convolution before the pooling. Where only an average follows, the convolution of the average is the average
  of the convolution (`ConvolutionHead`). Where more follows (SqueezeNet's ReLU), the layers up to the pooling are the
  head (`MapHead`): they treat all positions alike, so they run on the flattened map that the rest returns.
- two linear layers whose outputs are averaged (a distilled DeiT, `AveragedHeads`): each one's input is put into its own
  half of a vector of twice the width, so that the rest returns both.

Shapes: B batch, C classes, D features, N positions of a map.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvolutionHead(nn.Module):
    """A 1 x 1 convolution that is called on pooled features, `B x D`."""

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        position = (1,) * len(self.convolution.kernel_size)
        return self.convolution(features_BD.unflatten(1, (-1, *position))).flatten(1)


class MapHead(nn.Module):
    """Layers from before a 1 x 1 convolution to the pooling, called on a flattened map, `B x (D N)`."""

    def __init__(self, layers: nn.Module, num_channels: int, num_axes: int) -> None:
        super().__init__()
        self.layers = layers
        self._shape = (num_channels, -1, *(1,) * (num_axes - 1))

    def pool(self, flat_BX: Tensor) -> Tensor:
        """Return the mean of the map over its positions, `B x D`."""
        return flat_BX.unflatten(1, self._shape[:2]).mean(-1)

    def forward(self, flat_BX: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.layers(flat_BX.unflatten(1, self._shape)).flatten(1)


class AveragedHeads(nn.Module):
    """Two linear layers on halves of the features, `B x 2 D`; the network averages their outputs."""

    def __init__(self, first: nn.Linear, second: nn.Linear, second_path: str) -> None:
        super().__init__()
        self.first, self.second, self.second_path = first, second, second_path

    def forward(self, features_BE: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        first_BD, second_BD = (2 * features_BE).chunk(2, 1)  # the network has halved both
        return (self.first(first_BD) + self.second(second_BD)) / 2


class OneHalf(nn.Module):
    """Takes the place of one of two averaged heads: puts its input into the first or second half of a vector."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return `B x 2 D`."""
        width = x_BD.shape[-1]
        return F.pad(x_BD, (0, width) if self.first else (width, 0))


def cut_linear(model: nn.Module, path: str) -> tuple[nn.Module, int]:
    """Put an identity in the place of a head with a linear layer; return the head and the width of its input."""
    head = model.get_submodule(path)
    model.set_submodule(path, nn.Identity())
    return head, next(module for module in head.modules() if isinstance(module, nn.Linear)).in_features


def cut_convolution(model: nn.Module, path: str) -> tuple[nn.Module, int]:
    """Put an identity in the place of a 1 x 1 convolution; return the head and its channels."""
    convolution = model.get_submodule(path)
    assert isinstance(convolution, CONVOLUTIONS)
    model.set_submodule(path, nn.Identity())
    return ConvolutionHead(convolution), convolution.in_channels


def cut_map(model: nn.Module, path: str) -> tuple[nn.Module, int]:
    """Put an identity in the place of the layers around a 1 x 1 convolution; return the head and its channels."""
    layers = model.get_submodule(path)
    convolution = next(module for module in layers.modules() if isinstance(module, CONVOLUTIONS))
    model.set_submodule(path, nn.Identity())
    return MapHead(layers, convolution.in_channels, len(convolution.kernel_size)), convolution.in_channels


def cut_pair(model: nn.Module, path: str, second_path: str) -> tuple[nn.Module, int]:
    """Put halves in the places of two linear layers; return the head and the width of both inputs."""
    first, second = model.get_submodule(path), model.get_submodule(second_path)
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    model.set_submodule(path, OneHalf(first=True))
    model.set_submodule(second_path, OneHalf(first=False))
    return AveragedHeads(first, second, second_path), 2 * first.in_features


def places(path: str, head: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a head was made of, by their paths in the network.

    Args:
        path: Path of the head.
        head: What one of the functions above returned for it.
    """
    if isinstance(head, AveragedHeads):
        return {path: head.first, head.second_path: head.second}
    if isinstance(head, ConvolutionHead):
        return {path: head.convolution}
    return {path: head.layers if isinstance(head, MapHead) else head}


def put_back(model: nn.Module, path: str, head: nn.Module) -> None:
    """Put a head that was cut off back into its place."""
    for place, module in places(path, head).items():
        model.set_submodule(place, module)


def classifier_layers(head: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a head; of one without any, its convolutions."""
    kinds = nn.Linear if any(isinstance(module, nn.Linear) for module in head.modules()) else CONVOLUTIONS
    return [module for module in head.modules() if isinstance(module, kinds)]


def num_classes_of(head: nn.Module) -> int:
    """Return the number of classes that a head ends in.

    >>> num_classes_of(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 10)))
    10
    """
    last = classifier_layers(head)[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels  # pyrefly: ignore


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a 1 x 1 convolution (of any number of axes) that reads all channels."""
    return isinstance(module, CONVOLUTIONS) and set(module.kernel_size) == {1} and module.groups == 1
