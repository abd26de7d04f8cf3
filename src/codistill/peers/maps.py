"""Intermediate maps of a network, taken while it runs: what its last stages give, for a method that compares them.

Nothing is added to the network. Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from codistill.peers.inputs import Inputs, call_network
from codistill.peers.modes import eval_mode
from codistill.utils import InputError

MapShape = tuple[int, int, int]
"""C, H, W."""


def find_maps(body: nn.Module, example: Inputs, count: int) -> dict[str, MapShape]:
    """Return the modules that give a network's last maps, by path, in the order in which they run.

    They are those that the network names in `maps_at`. Else they are the last module that gives maps, and of each size
    before, the last of the outermost modules that give maps of this size.

    Args:
        body: A network whose head is cut off.
        example: A row of what it takes.
        count: Sizes.

    Raises:
        InputError: the network gives maps of fewer sizes, or its last ones are single pixels.

    >>> from codistill.models import MODELS
    >>> find_maps(MODELS["resnet8"](num_classes=10), torch.zeros(1, 3, 32, 32), 2)
    {'layer2': (32, 16, 16), 'layer3': (64, 8, 8)}
    """
    name = type(body).__name__
    shapes, ends_in_pixels = _record_maps(body, example)
    declared = tuple(getattr(body, "maps_at", ()))
    if unknown := [path for path in declared if path not in shapes]:
        raise InputError(f"--model: {name} has no module {unknown[0]} that gives maps; correct its attribute maps_at")
    chosen: dict[tuple[int, int], str] = {}
    for path, (_, *size) in shapes.items():
        key, depth = (size[0], size[1]), path.count(".")
        if key not in chosen or depth <= chosen[key].count("."):
            chosen[key] = path
    if shapes:
        last = next(reversed(shapes))
        chosen[shapes[last][1:]] = last  # pyrefly: ignore
    paths = list(declared) or sorted(chosen.values(), key=list(shapes).index)
    if ends_in_pixels and not declared:
        raise InputError(f"--model: the last maps of {name} are single pixels; give a larger --image-size")
    if len(paths) < count:
        raise InputError(
            f"--model: {name} gives maps of {len(paths)} sizes, not {count}; take another network, a larger "
            "--image-size, or name the modules that give its maps in its attribute maps_at"
        )
    return {path: shapes[path] for path in paths[-count:]}


def _record_maps(body: nn.Module, example: Inputs) -> tuple[dict[str, MapShape], bool]:
    """Return the shapes of all modules' maps, and whether a normalization sees single pixels.

    Maps have the aspect ratio of the images. What is inside a module that gives no maps (attention, the embedding of
    patches) is left out, as is pooling to a given size.
    """
    shapes: dict[str, MapShape] = {}
    others: list[str] = []
    ends_in_pixels = False
    height, width = example.shape[-2:] if isinstance(example, Tensor) and example.dim() == 4 else (0, 0)

    def record(path: str, module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal ends_in_pixels
        if not (isinstance(output, Tensor) and output.dim() == 4):
            others.append(path)
        elif output.shape[2] * output.shape[3] == 1:
            ends_in_pixels |= isinstance(module, nn.modules.batchnorm._BatchNorm)
        elif not isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            _, channels, h, w = output.shape
            if abs(h * width - w * height) <= max(height, width):
                shapes.pop(path, None)  # so that it stands where it ran last
                shapes[path] = (channels, h, w)

    handles = [m.register_forward_hook(partial(record, path)) for path, m in body.named_modules() if path]
    try:
        with eval_mode(body), torch.no_grad():
            call_network(body, example)
    finally:
        for handle in handles:
            handle.remove()
    inside = tuple(f"{path}." for path in others)
    return {path: shape for path, shape in shapes.items() if not path.startswith(inside)}, ends_in_pixels


@contextmanager
def taken_maps(body: nn.Module, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context, keep what some modules of a network give when it runs, by path.

    The hooks are removed at the end, so copies of the network have none.
    """
    maps: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        maps[path] = output

    handles = [body.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
