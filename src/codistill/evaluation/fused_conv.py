"""Faster evaluation on a CPU: a convolution, the addition after it and the ReLU after that as one kernel of oneDNN.

torch reaches these kernels by operators that its compiler uses and that no document promises. So they are taken where
they are there, on networks that torch.fx can trace, and only if the result says what the network says.
"""

from __future__ import annotations

import operator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from codistill.peers.shared_trunk import BranchEntry, SharedModule


class FusedConv(nn.Module):
    """relu(conv(x)), or relu(conv(x) + other), which is written over `other`. Takes `B x C x H x W`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the map; `x` is brought to the dtype of the weights, as autocast would."""
        x = x.to(self.weight.dtype)
        convolution = (x, self.weight, self.bias, *self.geometry)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(*convolution, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(other, *convolution, "add", 1.0, "relu", [], None)


_FRESH = (nn.Conv2d, nn.MaxPool2d, FusedConv)
"""Modules whose output is a tensor of its own, which may be written over once nobody reads it any more."""


def is_available(x: Tensor) -> bool:
    """Say whether the kernels are there for such a tensor."""
    there = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    return x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available() and there


def fuse(module: nn.Module, done: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Return `module` with all such convolutions fused that a trace finds; where it cannot be traced, its parts are.

    Args:
        module: In evaluation mode, BatchNorms folded; it is used up.
        done: What has been fused already, for modules that several branches share.
    """
    done = {} if done is None else done
    if module in done or not any(module.children()):
        return done.get(module, module)
    fused = _traced(module)
    if fused is None:
        for name, child in list(module.named_children()):
            setattr(module, name, fuse(child, done))
    done[module] = module if fused is None else fused
    return done[module]


def _traced(module: nn.Module) -> fx.GraphModule | None:
    """Return the module as a graph, fused; None where it has no graph that can be relied on."""
    if any(isinstance(m, SharedModule | BranchEntry) for m in module.modules()):  # they keep what they have seen
        return None
    try:
        traced = fx.symbolic_trace(module)
    except Exception:  # whatever a user's forward raises when it is given no tensors
        return None
    graph = traced.graph
    for node in graph.nodes:
        if isinstance(_called(node, traced), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    written = []
    for number, node in enumerate(list(graph.nodes)):
        found = _match(node, traced)
        if found is None:
            continue
        before, conv, other = found
        layer, name = _called(conv, traced), f"fused_{number}"
        assert isinstance(layer, nn.Conv2d)
        traced.add_submodule(name, FusedConv(layer))
        with graph.inserting_before(before):
            new = graph.call_module(name, conv.args if other is None else (*conv.args, other))
        node.replace_all_uses_with(new)
        for gone in dict.fromkeys((node, before, conv)):
            graph.erase_node(gone)
        if other is not None:
            written.append((other, new))
    if not _nobody_reads_on(written, traced):
        return None
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _called(node: object, traced: fx.GraphModule) -> nn.Module | None:
    """Return the module that a node calls, if it does."""
    if not (isinstance(node, fx.Node) and node.op == "call_module"):
        return None
    return traced.get_submodule(str(node.target))


def _match(node: fx.Node, traced: fx.GraphModule) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return what comes before a ReLU (a convolution or an addition), the convolution, and what is added to it."""
    by_function = node.op == "call_function" and node.target in (F.relu, torch.relu)
    if not (by_function or isinstance(_called(node, traced), nn.ReLU)):
        return None
    before, other = node.args[0], None
    conv = before
    if _is_addition(before):
        one, two = before.args
        conv, other = (one, two) if isinstance(_called(one, traced), nn.Conv2d) else (two, one)
        if not isinstance(_called(other, traced), _FRESH):
            return None
    layer = _called(conv, traced)
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    assert isinstance(before, fx.Node)
    assert isinstance(conv, fx.Node)
    assert isinstance(other, fx.Node | None)
    alone = len(before.users) == 1 and len(conv.users) == 1 and other is not conv.args[0]
    return (before, conv, other) if alone else None


def _is_addition(node: object) -> TypeGuard[fx.Node]:
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return False
    by_method = node.op == "call_method" and node.target in ("add", "add_")
    return by_method or (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add))


def _nobody_reads_on(written: list[tuple[fx.Node, fx.Node]], traced: fx.GraphModule) -> bool:
    """Say whether each map that is written over is read by its writer last, and by nothing that hands on a view."""
    place = {node: index for index, node in enumerate(traced.graph.nodes)}
    return all(
        place[reader] <= place[writer] and isinstance(_called(reader, traced), _FRESH)
        for held, writer in written
        for reader in held.users
    )
