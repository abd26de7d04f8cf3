"""What networks take: a tensor, or a mapping or tuple of tensors whose first axis is the batch.

A mapping is passed as keywords (`network(input_ids=..., attention_mask=...)`), a tuple as arguments in order. What a
network returns is a tensor of logits, or an object that holds one as `logits` (a `ModelOutput` of transformers).
Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codistill.utils import InputError

Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]
Views = Tensor | Sequence[Any]
"""Inputs, one for all peers or one for each; a tensor has them along its first axis."""
IMAGE_ADVICE = "give another --image-size or --channels"
EXAMPLE_ADVICE = "give `example` as the network takes it, the batch first"


def call_network(network: nn.Module, inputs: Inputs) -> Tensor:
    """Call a plain network with what it takes, and return its logits.

    Args:
        network: Any network, such as a deployed student.
        inputs: A tensor, or a mapping (its keywords) or tuple (its arguments) of tensors.

    >>> call_network(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3))).shape
    torch.Size([5, 4])
    """
    if isinstance(inputs, Tensor):
        outputs = network(inputs)
    elif isinstance(inputs, Mapping):
        outputs = network(**inputs)
    else:
        outputs = network(*inputs)
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of an input, in their order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return [*(inputs.values() if isinstance(inputs, Mapping) else inputs)]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return an input of the same kind with `function` applied to each of its tensors.

    >>> map_tensors(len, {"tokens": torch.zeros(2, 5), "mask": torch.zeros(2, 5)})
    {'tokens': 2, 'mask': 2}
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(x) for name, x in inputs.items()}
    return tuple(map(function, inputs))


def device_of(inputs: Inputs) -> torch.device:
    """Return the device of an input, by its first tensor."""
    if isinstance(inputs, Tensor):
        return inputs.device
    return next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs)).device


def repeat_first_row(inputs: Inputs, count: int) -> Inputs:
    """Return the first row of a batch, `count` times."""
    return map_tensors(lambda x: x[:1].expand(count, *x.shape[1:]), inputs)


def describe_inputs(inputs: Inputs) -> str:
    """Return the shapes of an input without the batch, in words.

    >>> describe_inputs(torch.zeros(2, 3, 8, 8)), describe_inputs({"input_ids": torch.zeros(2, 7)})
    ('images of 3 x 8 x 8', 'an input of input_ids 7')
    """
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        return f"images of {_shape(inputs)}"
    names = list(inputs) if isinstance(inputs, Mapping) else [""] * len(tensors_of(inputs))
    return "an input of " + ", ".join(f"{name} {_shape(x)}".strip() for name, x in zip(names, tensors_of(inputs)))


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape[1:])) or "one number"


@dataclass(frozen=True)
class InputSpec:
    """What the networks of some peers take: an input like `example`, or images of a number of channels and a size."""

    example: Inputs | None
    """One row."""
    in_channels: int | None
    image_size: int | None

    @classmethod
    def of(cls, example: Any, in_channels: int | None, image_size: int | None) -> InputSpec:
        """Return it for the arguments of peers; `in_channels` and `image_size` follow from an example of images.

        Raises:
            InputError: an example is given together with the others, or is none (see `check_example`).
        """
        if example is None:
            return cls(None, 3 if in_channels is None else in_channels, 32 if image_size is None else image_size)
        if in_channels is not None or image_size is not None:
            raise InputError("in_channels and image_size describe images, and `example` any input; give one of both")
        check_example(example)
        channels = size = None
        if isinstance(example, Tensor) and example.dim() > 2 and example.is_floating_point():
            channels = example.shape[1]
            size = example.shape[-1] if example.dim() == 4 and example.shape[-1] == example.shape[-2] else None
        return cls(repeat_first_row(example, 1), channels, size)

    @property
    def num_axes(self) -> int | None:
        """Number of axes of a batch, None where it is no tensor."""
        if self.example is None:
            return 4
        return self.example.dim() if isinstance(self.example, Tensor) else None

    @property
    def advice(self) -> str:
        """What to change where a network does not take the input."""
        return IMAGE_ADVICE if self.example is None else EXAMPLE_ADVICE

    def build_options(self, num_classes: int | None) -> dict[str, int | None]:
        """Return what a callable that builds a network may take."""
        return {"num_classes": num_classes, "in_channels": self.in_channels, "image_size": self.image_size}

    def for_network(self, network: nn.Module) -> Inputs:
        """Return one row for trial runs of a network, on its device and in its dtype; no random state is used."""
        if self.example is None:
            assert self.in_channels is not None
            assert self.image_size is not None
            return dummy_input(network, self.in_channels, self.image_size)
        parameter = next(network.parameters())
        return map_tensors(lambda x: x.to(parameter if x.is_floating_point() else parameter.device), self.example)


def dummy_input(network: nn.Module, in_channels: int, image_size: int) -> Tensor:
    """Return one image for trial runs of a network, `1 x C x H x W`, always the same; no random state is used."""
    pixels = torch.linspace(-40.0, 40.0, in_channels * image_size**2).sin()
    return pixels.view(1, in_channels, image_size, image_size).to(next(network.parameters()))


def check_example(example: Any) -> None:
    """Raise where an example is no input of peers.

    Raises:
        InputError: it is neither a tensor nor a mapping or tuple of tensors, or their batches differ.

    >>> check_example((torch.zeros(2, 3), torch.zeros(4, 3)))
    Traceback (most recent call last):
    codistill.utils.errors.InputError: example: its tensors have 2, 4 rows; ...
    """
    if isinstance(example, Mapping):
        parts = {f'["{name}"]': part for name, part in example.items()}
        if "labels" in example:
            raise InputError("example: leave out labels, which the method gets and the network does not")
        if not all(isinstance(name, str) for name in example):
            raise InputError("example: the keys of a mapping are the network's keywords; give text")
    elif isinstance(example, tuple):
        parts = {f"[{index}]": part for index, part in enumerate(example)}
    else:
        parts = {"": example}
    for where, part in parts.items():
        if not isinstance(part, Tensor):
            raise InputError(
                f"example{where} is a {type(part).__name__}; give a tensor, or a mapping or tuple of tensors"
            )
        if part.dim() == 0 or not len(part):
            raise InputError(f"example{where} has no rows; give a batch of one or more, the batch first")
    rows = [len(part) for part in parts.values()]
    if len(set(rows)) != 1:
        counted = ", ".join(map(str, rows)) or "no"
        raise InputError(f"example: its tensors have {counted} rows; give all the same number, the batch first")
