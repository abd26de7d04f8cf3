"""Sharing the modules that run before a fork among copies of one network, without an edit to the network.

The network is built once per branch. A dummy batch shows the order in which its modules run. Every module whose calls
all end before the first call of the fork's module is replaced, in every copy of a group, by one `SharedModule`: it runs
for the first copy and replays its outputs to the others. Parameters of a module that contains the fork (a class token,
say) are shared too. The fork's module itself is wrapped in a `BranchEntry`, where gradients can be rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from codistill.losses import scale_gradient
from codistill.peers.inputs import Inputs, call_network
from codistill.peers.modes import copy_module, eval_mode
from codistill.utils import InputError

CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.GroupNorm,
)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.MultiheadAttention)


class _Wrapper(nn.Module):
    """A module that replaces `inner`; what a network reads from it (a size, a stride) are the attributes of `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class SharedModule(_Wrapper):
    """A module in several copies: it runs for the first, and replays its outputs to the others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self._outputs: list[Any] = []
        self._cursor = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run, or replay the output of the same call."""
        if self._cursor == len(self._outputs):
            self._outputs.append(self.inner(*args, **kwargs))
        self._cursor += 1
        return self._outputs[self._cursor - 1]

    def cached_tensors(self) -> list[Tensor]:
        """Return the tensors among the cached outputs."""
        return [leaf for leaf in tree_leaves(self._outputs) if isinstance(leaf, Tensor)]

    def replay(self) -> None:
        """Return the cached outputs again, from the first call on, for the next copy."""
        self._cursor = 0

    def clear_cache(self) -> None:
        """Drop the cached outputs (and the graph that they keep alive)."""
        self._cursor, self._outputs = 0, []


class BranchEntry(_Wrapper):
    """The first module of a branch; it can divide the gradient that goes into the trunk by the fork's fan-out."""

    def __init__(self, inner: nn.Module, fan_out: int) -> None:
        super().__init__(inner)
        self.fan_out = fan_out
        self.rescale = False
        self.last_input: Any = None
        """The first argument of the last call: what the trunk gives to the branches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the branch's module."""
        if not args:  # it is called by keywords alone
            name, x = next(iter(kwargs.items()))
            self.last_input = x
            return self.inner(**(kwargs | {name: self._rescaled(x)}))
        self.last_input = args[0]
        return self.inner(self._rescaled(args[0]), *args[1:], **kwargs)

    def _rescaled(self, x: Tensor) -> Tensor:
        return scale_gradient(x, 1.0 / self.fan_out) if self.rescale else x

    def clear_cache(self) -> None:
        """Drop the last input (and the graph that it keeps alive)."""
        self.last_input = None


def channel_axis(entry: BranchEntry) -> int | None:
    """Return the axis of channels in what the module of a branch takes, by its first layer whose axis is known.

    >>> channel_axis(BranchEntry(nn.Sequential(nn.ReLU(), nn.Conv1d(4, 8, 3)), 2))
    1
    """
    for module in entry.inner.modules():
        if isinstance(module, CHANNELS_FIRST):
            return 1
        if isinstance(module, CHANNELS_LAST):
            return -1
    return None


def plain_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return an independent copy in which every `SharedModule` and `BranchEntry` is replaced by the module inside.

    Args:
        module: What is copied.
        memo: Of `copy_module`; two copies with one keep the weights that they share.
    """
    plain = copy_module(module, memo)
    while wrapped := [(n, m) for n, m in plain.named_modules() if isinstance(m, SharedModule | BranchEntry)]:
        name, wrapper = wrapped[0]
        plain.set_submodule(name, wrapper.inner)
    return plain


def share_until(copies: Sequence[nn.Module], forks: Sequence[str], fan_out: Sequence[int], example: Inputs) -> None:
    """Make `copies` share the modules that run before each fork, in place; see the docstring of this file.

    Args:
        copies: The same network, built once per branch: prod(fan_out) copies.
        forks: Paths of the first module after each fork, in the order in which they run.
        fan_out: Children at each fork.
        example: A batch that the network takes.

    Raises:
        InputError: a path does not exist or does not run, or a module runs on both sides of a fork.
    """
    names = dict(copies[0].named_modules())
    for fork in forks:
        if fork not in names or not fork:
            children = ", ".join(name for name, _ in copies[0].named_children())
            raise InputError(f'--branch-at "{fork}" is no module of the network; its top level has {children}')
    calls = _call_spans(copies[0], example)
    starts = [calls[fork][0] if fork in calls else -1 for fork in forks]
    if -1 in starts or starts != sorted(set(starts)):
        raise InputError(f"--branch-at {' '.join(forks)}: these modules must run, in this order")
    group, previous = len(copies), -1
    for level, (start, children) in enumerate(zip(starts, fan_out)):
        for first in range(0, len(copies), group):
            _share_span(copies[first : first + group], forks[: level + 1], (previous, start), calls)
        group //= children
        previous = start
    _place_entries(copies, forks, fan_out)


def share_comb(
    network: nn.Module, copies: Sequence[nn.Module], forks: Sequence[str], after: Sequence[bool], example: Inputs
) -> list[SharedModule]:
    """Make every copy share with `network` what runs before its own fork, in place: a comb, not a balanced tree.

    Args:
        network: The network that is shared.
        copies: Copies of it, in the order of their forks.
        forks: Path of the first module that each copy has for itself, in the order in which they run.
        after: Whether a copy forks after that module instead, which it then shares.
        example: A batch that the network takes.

    Returns:
        The modules that are shared.

    Raises:
        InputError: a module runs on both sides of a fork.
    """
    calls = _call_spans(network, example)
    spans = [_subtree_span(fork, calls) for fork in forks]
    starts = [span[1] + 1 if last else span[0] for span, last in zip(spans, after)]
    previous = -1
    for level, start in enumerate(starts):
        _share_span([network, *copies[level:]], forks[: level + 1], (previous, start), calls)
        previous = start
    return [module for module in network.modules() if isinstance(module, SharedModule)]


def changes_shared_outputs(calls: Sequence[Callable[[], Any]], shared_modules: Sequence[SharedModule]) -> bool:
    """Return whether one of the networks changes a cached output of a shared module in place, even to equal values.

    Args:
        calls: Each runs one of the networks.
        shared_modules: What they share.
    """
    for shared in shared_modules:
        shared.clear_cache()
    versions: dict[int, int] = {}
    changed = False
    for call in calls:
        for shared in shared_modules:
            shared.replay()
        call()
        for tensor in (cached for shared in shared_modules for cached in shared.cached_tensors()):
            changed |= versions.setdefault(id(tensor), tensor._version) != tensor._version
    for shared in shared_modules:
        shared.clear_cache()
    return changed


def _call_spans(network: nn.Module, example: Inputs) -> dict[str, tuple[int, int]]:
    """Return the numbers of the first and the last call of every module, counted over all calls of one forward."""
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, _x, name=name: order.append(name))
        for name, module in network.named_modules()
        if name
    ]
    try:
        with eval_mode(network), torch.no_grad():
            call_network(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    spans: dict[str, tuple[int, int]] = {}
    for number, name in enumerate(order):
        spans[name] = (spans.get(name, (number, 0))[0], number)
    return spans


def _share_span(
    group: Sequence[nn.Module], forks: Sequence[str], span: tuple[int, int], calls: dict[str, tuple[int, int]]
) -> None:
    """Share, within `group`, the modules that run from the fork before the last of `forks` up to the last.

    `span` holds the numbers of the first calls of these two forks.
    """
    previous, start = span
    first, fork = group[0], forks[-1]

    def visit(path: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            for other in group[1:]:
                setattr(other.get_submodule(path) if path else other, name, parameter)
        for name, child in list(module.named_children()):
            child_path = f"{path}.{name}" if path else name
            if isinstance(child, SharedModule):
                continue
            if child_path not in calls or any(_contains(child_path, f) for f in forks):
                visit(child_path, child)  # a container that never runs itself (nn.ModuleList) has no outputs to replay
                continue
            began, ended = _subtree_span(child_path, calls)
            if began >= start or began < previous:
                continue
            if ended >= start:
                if child.state_dict():
                    raise InputError(f'--branch-at "{fork}": module "{child_path}" runs before and after it')
                continue
            shared = SharedModule(child)
            for other in group:
                other.set_submodule(child_path, shared)

    visit("", first)


def _contains(path: str, fork: str) -> bool:
    """Return whether the module at `path` contains the fork's module (and is another one)."""
    return fork.startswith(path + ".")


def _subtree_span(path: str, calls: dict[str, tuple[int, int]]) -> tuple[int, int]:
    spans = [span for name, span in calls.items() if name == path or name.startswith(path + ".")]
    return min(s[0] for s in spans), max(s[1] for s in spans)


def _place_entries(copies: Sequence[nn.Module], forks: Sequence[str], fan_out: Sequence[int]) -> None:
    """Wrap each fork's module in a `BranchEntry`; branches that share the module (an inner fork) share the entry."""
    sizes = [len(copies) // math.prod(fan_out[: level + 1]) for level in range(len(forks))]
    for fork, children, group in reversed(list(zip(forks, fan_out, sizes))):  # a fork may lie inside an earlier one
        for first in range(0, len(copies), group):
            members = copies[first : first + group]
            inner = members[0].get_submodule(fork)
            if isinstance(inner, SharedModule):
                inner.inner = BranchEntry(inner.inner, children)
                continue
            for member in members:
                member.set_submodule(fork, BranchEntry(member.get_submodule(fork), children))
