"""Where a network may fork: its modules in the order in which they run, and a sensible default.

The default is the papers' place wherever maps shrink: the first module with weights that works at the last resolution
(a ResNet's last stage, a ConvNeXt's, a VGG's last block). Where all maps have one size (a ViT), it is the layer at
three quarters of the depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codistill.models import WithWeights, resolve
from codistill.models.external import Source
from codistill.peers.members import Spec
from codistill.peers.modes import eval_mode
from codistill.peers.split_head import SplitMember, dummy_input
from codistill.utils.errors import InputError


def default_fork(spec: Spec, member: SplitMember, in_channels: int, image_size: int) -> str:
    """Return where a network forks if nobody says: its own `branch_at`, or what its maps say for a library's network.

    Maps are looked at in the size that a convolutional network was made for, so that the place is the same in any run.
    """
    own = getattr(member.body, "branch_at", "")
    if isinstance(own, str) and own:
        return own
    factory = resolve(spec) if isinstance(spec, str) else spec
    factory = factory.factory if isinstance(factory, WithWeights) else factory
    if isinstance(factory, Source) and factory.is_library:
        example = dummy_input(member, in_channels, factory.native_size or image_size)
        found = default_branch_point(branch_points(member.body, member.head_path, example))
        if found is not None:
            return found
    raise InputError(
        f"--branch-at is needed: {type(member.body).__name__} has no default place to fork "
        "(codistill list branch-points --model NAME shows the places)"
    )


MOST_DOTS = 4


@dataclass
class BranchPoint:
    """A module that can be the first of every branch."""

    path: str
    entering: tuple[int, ...]
    """Shape of what goes into it, without the batch."""
    leaving: tuple[int, ...]
    own_parameters: int
    after: int = 0
    """Parameters from here on: what every branch has for itself."""


def resolution(shape: tuple[int, ...]) -> int:
    """Return how many places a map has (its shape without the batch); 1 where it is pooled.

    Images are square, so the two equal axes are height and width, wherever the channels stand.
    """
    if len(shape) == 3:
        return shape[1] * shape[2] if shape[1] == shape[2] else shape[0] * shape[1]
    return shape[0] if len(shape) == 2 else 1


def branch_points(model: nn.Module, head_path: str, example: Tensor) -> list[BranchPoint]:
    """Return the modules that may fork, in the order in which they run.

    Args:
        model: A network whose head is in its place or cut off.
        head_path: Path of the head, which no fork may follow.
        example: Images that it takes.
    """
    runs = _runs(model, example)
    points = []
    for path, (entering, leaving) in runs.items():
        module = model.get_submodule(path)
        own = sum(p.numel() for p in module.parameters())
        if own and path != head_path and not path.startswith(head_path + "."):
            points.append(BranchPoint(path, entering, leaving, own))
    order = list(runs)
    for point in points:
        later = {
            id(p): p.numel()
            for path in order[order.index(point.path) :]
            for p in model.get_submodule(path).parameters()
            if not point.path.startswith(path + ".")
        }
        point.after = sum(later.values())
    return [point for point in points if point is not points[0]]


def default_branch_point(points: list[BranchPoint]) -> str | None:
    """Return the path of the default among the points of a network, None where there is no sensible one."""
    maps = [p for p in points if len(p.leaving) > 1 and resolution(p.leaving) > 1]
    if not maps:
        return _three_quarters(points)
    last = resolution(maps[-1].leaving)
    before = [i for i, p in enumerate(maps) if resolution(p.leaving) > last]
    shrinks = [p for p in maps[before[-1] + 1 :] if resolution(p.leaving) == last] if before else []
    if not shrinks:
        return _three_quarters(points)
    first = shrinks[0]  # or what it stands first in: a ConvNeXt's downsampling begins with a norm at the old resolution
    around = [p for p in points if first.path.startswith(p.path + ".") and p.leaving == first.leaving]
    same = [p for p in around if resolution(p.entering) == resolution(first.entering)]
    return (same or [first])[0].path


def _three_quarters(points: list[BranchPoint]) -> str | None:
    """Return the layer at three quarters of the longest row of like-named siblings (blocks.0, blocks.1, ...)."""
    rows: dict[str, list[str]] = {}
    for point in points:
        parent, _, name = point.path.rpartition(".")
        if name.rstrip("0123456789") != name:
            rows.setdefault(f"{parent}.{name.rstrip('0123456789')}", []).append(point.path)
    if not rows:
        return None
    row = max(rows.values(), key=lambda paths: (len(paths), -paths[0].count(".")))
    # The first layer of a network is no fork and so is not in the row.
    total = 1 + max(int(path[len(path.rstrip("0123456789")) :]) for path in row)
    chosen = math.ceil(total * 3 / 4)
    return next((path for path in row if int(path[len(path.rstrip("0123456789")) :]) == chosen), row[-1])


def _runs(model: nn.Module, example: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return, for every module that runs once on the way from images to features, the shapes before and after it."""
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    hooks = []

    def enter(_module: nn.Module, args: tuple, *, name: str) -> None:
        first = args[0] if args else None
        shape = tuple(first.shape[1:]) if isinstance(first, Tensor) and first.dim() in (2, 3, 4) else ()
        calls.setdefault(name, []).append((shape, ()))

    def leave(_module: nn.Module, _args: tuple, output: object, *, name: str) -> None:
        if isinstance(output, Tensor) and name in calls:
            calls[name][-1] = (calls[name][-1][0], tuple(output.shape[1:]))

    for name, module in model.named_modules():
        if name and name.count(".") <= MOST_DOTS:
            hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name=name)))
            hooks.append(module.register_forward_hook(lambda m, a, o, name=name: leave(m, a, o, name=name)))
    try:
        with eval_mode(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    spine: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, shapes in calls.items():
        if len(shapes) == 1 and shapes[0][0] and _on_spine(name, model):
            spine[name] = shapes[0]
    return spine


def _on_spine(path: str, model: nn.Module) -> bool:
    """Say whether every module around `path` merely lists its parts or holds most of the weights, as no block does."""
    whole = sum(p.numel() for p in model.parameters()) or 1
    parts = path.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        around = model.get_submodule(".".join(parts[:depth]))
        lists = isinstance(around, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if not lists and sum(p.numel() for p in around.parameters()) < 0.6 * whole:
            return False
    return True
