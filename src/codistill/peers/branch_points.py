"""The modules at which a network may fork into branches, in the order in which they run, and a default among them.

The default is the papers' place wherever maps shrink: the first module with weights that works at the last resolution
(a ResNet's last stage, a ConvNeXt's, a VGG's last block). Where all maps have one size (a ViT), it is the layer at
three quarters of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codistill.models import Source, WithWeights, resolve
from codistill.peers.inputs import Inputs, call_network, dummy_input
from codistill.peers.members import Spec
from codistill.peers.modes import eval_mode
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError

MAX_PATH_DOTS = 4
"""Modules nested deeper are not considered."""
Shape = tuple[int, ...]


@dataclass
class BranchPoint:
    """A module that can be the first of every branch."""

    path: str
    input_shape: Shape
    """Without the batch."""
    output_shape: Shape
    branch_parameters: int = 0
    """Parameters from this module on, without the head: those that every branch has for itself."""


def resolution(shape: Shape) -> int:
    """Return the number of positions of a map, from its shape without the batch; 1 where it is pooled.

    Images are square, so the two equal axes are height and width, whether the channels are first or last.
    """
    if len(shape) == 3:
        return shape[1] * shape[2] if shape[1] == shape[2] else shape[0] * shape[1]
    return shape[0] if len(shape) == 2 else 1


def branch_points(model: nn.Module, head_path: str, example: Inputs) -> list[BranchPoint]:
    """Return the modules that may fork, in the order in which they run.

    Args:
        model: A network with or without its head.
        head_path: Path of the head, which no fork may follow.
        example: An input that it takes.
    """
    shapes = _shapes_of_modules(model, example)
    points = []
    for path, (input_shape, output_shape) in shapes.items():
        has_weights = any(True for _ in model.get_submodule(path).parameters())
        if has_weights and path != head_path and not path.startswith(head_path + "."):
            points.append(BranchPoint(path, input_shape, output_shape))
    order = list(shapes)
    for point in points:
        later = {
            id(p): p.numel()
            for path in order[order.index(point.path) :]
            for p in model.get_submodule(path).parameters()
            if not point.path.startswith(path + ".")
        }
        point.branch_parameters = sum(later.values())
    return points[1:]


def find_default_fork(spec: Spec, member: SplitMember, example: Inputs) -> str | None:
    """Return the default fork of a network: its own `branch_at`, or for a library's network one found from its maps.

    Maps are computed at the size that a convolutional network was made for, so that the fork is the same in any run.

    Args:
        spec: What built the network.
        member: The network.
        example: An input that it takes.
    """
    declared = getattr(member.body, "branch_at", "")
    if isinstance(declared, str) and declared:
        return declared
    source = library_source(resolve(spec) if isinstance(spec, str) else spec)
    if source is None:
        return None
    if source.native_size and isinstance(example, Tensor):
        example = dummy_input(member, example.shape[1], source.native_size)
    return default_branch_point(branch_points(member.body, member.head_path, example))


def default_fork(spec: Spec, member: SplitMember, example: Inputs) -> str:
    """Return the default fork of a network (see `find_default_fork`).

    Raises:
        InputError: the network has none.
    """
    fork = find_default_fork(spec, member, example)
    if fork is None:
        where = "codistill list branch-points --model NAME shows the places"
        if not isinstance(spec, str):
            found = default_branch_point(branch_points(member.body, member.head_path, example))
            where = f'such as "{found}"' if found else "name a module in which every branch begins"
        raise InputError(f"--branch-at is needed: {type(member.body).__name__} has no default place to fork ({where})")
    return fork


def library_source(factory: Callable[..., nn.Module] | nn.Module) -> Source | None:
    """Return the source of a library's network, None for any other network."""
    factory = factory.factory if isinstance(factory, WithWeights) else factory
    return factory if isinstance(factory, Source) and factory.is_library else None


def default_branch_point(points: list[BranchPoint]) -> str | None:
    """Return the path of the default among the points of a network, None where there is none."""
    maps = [p for p in points if len(p.output_shape) > 1 and resolution(p.output_shape) > 1]
    start = _first_at_resolution(points, resolution(maps[-1].output_shape)) if maps else None
    return start or _block_at(points, 3 / 4)


def exit_points(points: list[BranchPoint], count: int) -> list[str]:
    """Return the paths where `count` exits may fork, as many as there are of them.

    These are the starts of the last stages, each the first module with weights at its resolution; where all maps have
    one size, they divide the list of numbered blocks into equal parts.
    """
    sizes = {resolution(p.output_shape) for p in points if len(p.output_shape) > 1}
    starts = [_first_at_resolution(points, size) for size in sorted(sizes - {1}, reverse=True)]
    found = [start for start in starts if start is not None]
    if not found:
        found = [path for k in range(1, count + 1) if (path := _block_at(points, k / (count + 1))) is not None]
    return list(dict.fromkeys(found))[-count:]


def _first_at_resolution(points: list[BranchPoint], size: int) -> str | None:
    """Return the first module that works at a resolution, after all at larger ones; None where none are larger."""
    maps = [p for p in points if len(p.output_shape) > 1 and resolution(p.output_shape) > 1]
    larger = [i for i, p in enumerate(maps) if resolution(p.output_shape) > size]
    smallest = [p for p in maps[larger[-1] + 1 :] if resolution(p.output_shape) == size] if larger else []
    if not smallest:
        return None
    # Or the module that begins with it: a ConvNeXt's downsampling begins with a norm at the old resolution.
    first = smallest[0]
    parents = [p for p in points if first.path.startswith(p.path + ".") and p.output_shape == first.output_shape]
    same = [p for p in parents if resolution(p.input_shape) == resolution(first.input_shape)]
    return (same or [first])[0].path


def _block_at(points: list[BranchPoint], part: float) -> str | None:
    """Return the layer at a part of the longest list of numbered blocks (blocks.0, blocks.1, ...)."""
    lists: dict[str, dict[int, str]] = {}
    for point in points:
        prefix = point.path.rstrip("0123456789")
        if prefix != point.path:
            lists.setdefault(prefix, {})[int(point.path[len(prefix) :])] = point.path
    if not lists:
        return None
    blocks = max(lists.values(), key=lambda paths: (len(paths), -next(iter(paths.values())).count(".")))
    # The first layer of a network is no fork and so is not in the list.
    return blocks.get(math.ceil((1 + max(blocks)) * part), [*blocks.values()][-1])


def _shapes_of_modules(model: nn.Module, example: Inputs) -> dict[str, tuple[Shape, Shape]]:
    """Return input and output shape of every module that runs once on the way from the input to features."""
    calls: dict[str, list[tuple[Shape, Shape]]] = {}
    hooks = []

    def enter(_module: nn.Module, args: tuple, *, name: str) -> None:
        first = args[0] if args else None
        shape = tuple(first.shape[1:]) if isinstance(first, Tensor) and first.dim() in (2, 3, 4) else ()
        calls.setdefault(name, []).append((shape, ()))

    def leave(_module: nn.Module, _args: tuple, output: object, *, name: str) -> None:
        if isinstance(output, Tensor) and name in calls:
            calls[name][-1] = (calls[name][-1][0], tuple(output.shape[1:]))

    for name, module in model.named_modules():
        if name and name.count(".") <= MAX_PATH_DOTS:
            hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name=name)))
            hooks.append(module.register_forward_hook(lambda m, a, o, name=name: leave(m, a, o, name=name)))
    try:
        with eval_mode(model), torch.no_grad():
            call_network(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: shapes[0]
        for name, shapes in calls.items()
        if len(shapes) == 1 and shapes[0][0] and not _is_inside_block(name, model)
    }


def _is_inside_block(path: str, model: nn.Module) -> bool:
    """Return whether a module that contains `path` is a block: no list of modules, and without most of the weights."""
    total = sum(p.numel() for p in model.parameters()) or 1
    parts = path.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        parent = model.get_submodule(".".join(parts[:depth]))
        is_list = isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if not is_list and sum(p.numel() for p in parent.parameters()) < 0.6 * total:
            return True
    return False
