"""Equal peers as one network: grouped convolutions, wide BatchNorms, batched linears. A fifth of the launches.

Channels of the members lie side by side: `B x (P C) x H x W`. Whatever works on each channel alone (ReLU, pooling,
adding a shortcut, the mean over space) needs no change, so the members' own forward code runs as it is, on stacked
modules. A network that mixes channels elsewhere (DenseNet's concatenation) is found out by trying, and refused.

The stacked tensors own the numbers; the members' parameters and statistics become views into them. Evaluation, export
and checkpoints see members as ever, and converting back and forth loses nothing.
Shapes: V views, P peers, B batch, C channels or classes, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codistill.losses import scale_gradient
from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.modes import frozen_batchnorm_stats
from codistill.peers.shared_trunk import Entry, Shared
from codistill.utils.errors import InputError

CHANNELWISE = (nn.ReLU, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)


class StackedEntry(nn.Module):
    """Where branches leave the trunk: its map, once for each of them, side by side."""

    def __init__(self, entry: Entry, inner: nn.Module, num_peers: int) -> None:
        super().__init__()
        self.inner, self.num_peers = inner, num_peers
        self.entries = [entry]  # read for its `rescale`, told what was seen; in a list, so as to be no child

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Repeat the map along its channels and run the stacked branch."""
        entry = self.entries[0]
        entry.seen = x_BCHW
        if entry.rescale:
            x_BCHW = scale_gradient(x_BCHW, 1.0 / entry.fan_out)
        return self.inner(torch.cat([x_BCHW] * self.num_peers, 1))


class StackedPeers:
    """Runs the members of `peers` as one network in training.

    Args:
        peers: Equal members of Conv2d, BatchNorm2d, Linear, pooling and ReLU; their parameters become views.
        example: A batch `B x C x H x W`, for the trial against the plain loop.

    Raises:
        InputError: the members differ, or hold something that cannot be stacked.
    """

    def __init__(self, peers: Peers, example: Tensor) -> None:
        self.peers = peers
        members = [peers.member(p) for p in range(peers.num_peers)]
        trunk = list(peers._shared) if isinstance(peers, BranchPeers) else []
        _refuse_unequal(members, trunk)
        expected = _plain_outputs(peers, example)
        self.parameters: list[nn.Parameter] = []
        self.counts: list[tuple[nn.Module, Tensor]] = []
        """Stacked BatchNorms and their members' common count of batches."""
        self.parts: list[list[Tensor]] = []
        """The members' parameters that every one of `parameters` is made of, row upon row."""
        body = copy.deepcopy(members[0].body, {id(shared): shared for shared in trunk})
        self.body = self._convert(body, [m.body for m in members])
        heads = [m.head for m in members if isinstance(m.head, nn.Linear)]
        if len(heads) < len(members):
            raise InputError("--execution stacked takes classifier heads of one Linear; use --execution loop")
        self.head_weight = self._join([h.weight for h in heads])
        self.head_bias = self._join([h.bias for h in heads]) if heads[0].bias is not None else None
        for parameter in (p for shared in trunk for p in shared.parameters()):
            self.parameters.append(parameter)
            self.parts.append([parameter])
        ours = _plain_outputs(peers, example, self)
        if not torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise InputError("--execution stacked: the network mixes channels outside its layers; use --execution loop")

    def __call__(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run all members at once; see `Peers.forward`."""
        num_peers = self.peers.num_peers
        if isinstance(self.peers, BranchPeers):
            self.peers._forget()
            x = views_VBCHW[0]
        else:
            x = torch.cat([views_VBCHW[p if len(views_VBCHW) > 1 else 0] for p in range(num_peers)], 1)
        counts = [count for norm, count in self.counts if norm.training and norm.track_running_stats]
        if counts:
            torch._foreach_add_(counts, 1)
        autocast = self.peers.autocast
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            features_BPD = self.body(x)
        features_PBD = features_BPD.unflatten(1, (num_peers, -1)).transpose(0, 1).to(self.head_weight.dtype)
        weight_PDC = self.head_weight.unflatten(0, (num_peers, -1)).transpose(1, 2)
        if self.head_bias is None:
            logits_PBC = torch.bmm(features_PBD, weight_PDC)
        else:
            logits_PBC = torch.baddbmm(self.head_bias.unflatten(0, (num_peers, 1, -1)), features_PBD, weight_PDC)
        trunk = None
        if isinstance(self.peers, BranchPeers):
            trunk = self.peers._trunk_output().to(self.head_weight.dtype)
            self.peers._forget()
        return PeerOutputs(logits_PBC, list(features_PBD), trunk)

    def _convert(self, module: nn.Module, members: Sequence[nn.Module]) -> nn.Module:
        """Return the stacked form of a module that all members hold, in place of its children."""
        if isinstance(module, Shared):
            return module
        if isinstance(module, Entry):
            inners = [m.inner for m in members if isinstance(m, Entry)]
            entry = members[0]
            assert isinstance(entry, Entry)
            return StackedEntry(entry, self._convert(module.inner, inners), len(members))
        if isinstance(module, nn.Conv2d):
            return self._conv(module, members)
        if isinstance(module, nn.BatchNorm2d):
            return self._norm(module, members)
        if isinstance(module, CHANNELWISE) and not any(True for _ in module.children()):
            return module
        if not any(True for _ in module.children()):
            raise InputError(f"--execution stacked knows no {type(module).__name__}; use --execution loop")
        if any(True for _ in module.parameters(recurse=False)):
            raise InputError(f"--execution stacked: {type(module).__name__} has parameters of its own; use loop")
        for name, child in module.named_children():
            setattr(module, name, self._convert(child, [m.get_submodule(name) for m in members]))
        return module

    def _conv(self, conv: nn.Conv2d, members: Sequence[nn.Module]) -> nn.Conv2d:
        count = len(members)
        sizes = conv.in_channels * count, conv.out_channels * count
        with torch.device("meta"):
            stacked = nn.Conv2d(
                *sizes,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                conv.dilation,  # type: ignore[arg-type]
                conv.groups * count,
                conv.bias is not None,
                conv.padding_mode,
            )
        stacked.weight = self._join([m.weight for m in members])  # type: ignore[misc]
        if conv.bias is not None:
            stacked.bias = self._join([m.bias for m in members])  # type: ignore[misc]
        return stacked

    def _norm(self, norm: nn.BatchNorm2d, members: Sequence[nn.Module]) -> nn.BatchNorm2d:
        with torch.device("meta"):
            stacked = nn.BatchNorm2d(norm.num_features * len(members), norm.eps, norm.momentum, norm.affine)
        stacked.track_running_stats = norm.track_running_stats
        if norm.affine:
            stacked.weight = self._join([m.weight for m in members])  # type: ignore[misc]
            stacked.bias = self._join([m.bias for m in members])  # type: ignore[misc]
        for name in ("running_mean", "running_var"):
            joined = torch.cat([m._buffers[name] for m in members])  # type: ignore[misc]
            stacked._buffers[name] = joined
            for member, view in zip(members, joined.chunk(len(members))):
                member._buffers[name] = view
        for member in members:  # one count for all
            member._buffers["num_batches_tracked"] = norm._buffers["num_batches_tracked"]
        count = norm._buffers["num_batches_tracked"]
        if norm.momentum is None:
            stacked._buffers["num_batches_tracked"] = count
        else:  # nobody needs it to normalise, so all are counted up in one launch
            stacked._buffers["num_batches_tracked"] = None
            if count is not None:
                self.counts.append((stacked, count))
        return stacked

    def _join(self, parts: Sequence[Tensor]) -> nn.Parameter:
        """Return one parameter of all members' rows, and make theirs views of it."""
        joined = torch.cat([p.detach() for p in parts])
        if parts[0].dim() == 4 and parts[0].is_contiguous(memory_format=torch.channels_last):
            joined = joined.contiguous(memory_format=torch.channels_last)
        for part, view in zip(parts, joined.chunk(len(parts))):
            part.data = view
        self.parameters.append(nn.Parameter(joined))
        self.parts.append([*parts])
        return self.parameters[-1]

    def split_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimiser's state as the plain loop would hold it: one entry a parameter of every member."""
        places, extra = self._places()
        entries: dict[int, Any] = {}
        for index, entry in state["state"].items():
            if index >= len(self.parameters):  # the method's own
                entries[index + extra] = entry
                continue
            for row, place in enumerate(places[index]):
                entries[place] = {name: _part(v, row, len(places[index])) for name, v in entry.items()}
        return _with_entries(state, entries, extra)

    def join_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the stacked form of a state that `split_optimizer` or the plain loop gave."""
        places, extra = self._places()
        total = len(self.parameters) + extra
        entries = {index - extra: entry for index, entry in state["state"].items() if index >= total}
        for index, (parameter, rows) in enumerate(zip(self.parameters, places)):
            held = [state["state"][place] for place in rows if place in state["state"]]
            if held:
                entries[index] = {
                    # In the parameter's own order in memory, which a fused optimiser takes for granted.
                    name: torch.empty_like(parameter).copy_(torch.cat([h[name] for h in held])) if _rowwise(v) else v
                    for name, v in held[0].items()
                }
        return _with_entries(state, entries, -extra)

    def _places(self) -> tuple[list[list[int]], int]:
        """Return where the parts of each parameter stand among the members' ones, and how many more those are."""
        numbers = {id(p): index for index, p in enumerate(self.peers.parameters())}
        return [[numbers[id(p)] for p in parts] for parts in self.parts], len(numbers) - len(self.parameters)


def _part(value: Any, row: int, count: int) -> Any:
    """Return one member's share of an entry, copied: fused optimisers count steps in place, each for itself."""
    if not isinstance(value, Tensor):
        return value
    return (value.chunk(count)[row] if _rowwise(value) else value).clone()


def _rowwise(value: object) -> bool:
    """Say whether an entry of an optimiser has a row a row of its parameter (a count of steps has not)."""
    return isinstance(value, Tensor) and value.dim() > 0


def _with_entries(state: dict[str, Any], entries: dict[int, Any], longer: int) -> dict[str, Any]:
    """Return an optimiser's state with other entries, its one group of parameters longer by some."""
    (group,) = state["param_groups"]
    return {
        "state": dict(sorted(entries.items())),
        "param_groups": [group | {"params": list(range(len(group["params"]) + longer))}],
    }


def _refuse_unequal(members: Sequence[nn.Module], trunk: Sequence[nn.Module]) -> None:
    shapes = [[(n, tuple(v.shape)) for n, v in m.state_dict().items()] for m in members]
    if any(s != shapes[0] for s in shapes):
        raise InputError("--execution stacked needs peers of one kind and size; use --execution loop")
    owned = {id(p) for shared in trunk for p in shared.parameters()}
    shared_count = [sum(id(p) in owned for p in m.parameters()) for m in members]
    ours = {id(p) for p in members[0].parameters()} & {id(p) for p in members[-1].parameters()}
    if len(members) > 1 and len(ours) != shared_count[0]:
        raise InputError("--execution stacked takes branches that fork once; use --execution loop for a tree")


@torch.no_grad()
def _plain_outputs(peers: Peers, example: Tensor, runner: StackedPeers | None = None) -> Tensor:
    """Return the logits in training mode, with nothing recorded."""
    modes = [(m, m.training) for m in peers.modules()]
    stacked = runner.body if runner is not None else nn.Identity()
    autocast, peers.autocast = peers.autocast, None
    peers.train()
    stacked.train()
    try:
        with frozen_batchnorm_stats(peers), frozen_batchnorm_stats(stacked):
            outputs = (runner or peers)(example.unsqueeze(0))
        return outputs.logits_PBC
    finally:
        peers.autocast = autocast
        for module, mode in modes:
            module.training = mode
