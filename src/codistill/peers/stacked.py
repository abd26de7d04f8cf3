"""Equal peers as one network: grouped convolutions, wide BatchNorms, batched linears. A fifth of the kernel launches.

The members' channels are concatenated: `B x (P C) x H x W`. Operations on each channel alone (ReLU, pooling, adding a
shortcut, the mean over space) need no change, so the members' own forward code runs on stacked modules. A network that
mixes channels elsewhere (DenseNet's concatenation) is detected by comparing the outputs with the loop's, and refused.

The stacked tensors own the memory; the members' parameters and statistics become views of them. Evaluation, export
and checkpoints use the members as before, and the optimizer's state is converted without loss.
Shapes: V views, P peers, B batch, C channels or classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from codistill.losses import scale_gradient
from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.inputs import Views
from codistill.peers.modes import autocast_of, copy_module, frozen_batchnorm_stats, train_mode
from codistill.peers.shared_trunk import BranchEntry, SharedModule
from codistill.utils import InputError, first_line, out_of_memory

CHANNELWISE = (nn.ReLU, nn.Identity, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
MERGED_CHANNELS = 64
"""Input channels up to which groups of a convolution are merged on a GPU, whose kernels process so many at once."""


class _MergedConv(torch.autograd.Function):
    """A grouped convolution as one with fewer groups, whose weights are zero where a member would read another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: StackedConv2d) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
        x, dense = x.to(dtype), conv.dense_weight(dtype)
        conv.own_blocks(dense).copy_(conv.by_member(weight))
        ctx.conv, ctx.dense = conv, dense  # overwritten in the next forward, after this one's backward
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, dense, None, conv.stride, conv.padding, conv.dilation, conv.num_merged_groups)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        conv = ctx.conv
        grad_x, grad_dense, _ = torch.ops.aten.convolution_backward(
            *(grad_outputs[0], x, ctx.dense, None, conv.stride, conv.padding, conv.dilation, False, [0, 0]),
            *(conv.num_merged_groups, [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]),
        )
        if grad_dense is None:
            return grad_x, None, None
        grad_weight = torch.empty_like(weight)
        conv.by_member(grad_weight).copy_(conv.own_blocks(grad_dense))
        return grad_x, grad_weight, None


def _runs_on_matrix_units(x: Tensor) -> bool:
    """Return whether a convolution's additional arithmetic costs little: always, except in float32 without TF32."""
    if x.dtype is not torch.float32 or torch.is_autocast_enabled(x.device.type):
        return True
    return torch.backends.cudnn.conv.fp32_precision != "ieee"  # pyrefly: ignore


class StackedConv2d(nn.Conv2d):
    """The members' convolutions as one grouped convolution.

    On a GPU, groups of few channels are merged: cuDNN runs 4 groups of 16 channels one after the other, each as slowly
    as one group of 64 with zeros in it (benchmarks/RESULTS.md).
    """

    num_peers = 1
    merges = False
    """Whether groups may be merged."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the members' maps, concatenated; `input` has a map per member, or one that all of them take."""
        if input.shape[1] * self.num_peers == self.in_channels and self.num_peers > 1 and self.padding_mode == "zeros":
            groups = self.groups // self.num_peers
            return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, groups)
        if self.merges and self.num_merged_groups < self.groups and _runs_on_matrix_units(input):
            return _MergedConv.apply(input, self.weight, self)  # pyrefly: ignore
        return super().forward(input)

    @property
    def num_merged_groups(self) -> int:
        """Number of groups after merging: the smallest for which each has at most MERGED_CHANNELS input channels."""
        if self.groups != self.num_peers or self.bias is not None or self.padding_mode != "zeros":
            return self.groups
        width = self.in_channels // self.num_peers
        sizes = [m for m in range(1, self.num_peers + 1) if self.num_peers % m == 0 and m * width <= MERGED_CHANNELS]
        return self.num_peers // max(sizes, default=1)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the merged groups' weight, made once: zeros, with blocks to be filled with the members' weights."""
        dense_weights: dict[torch.dtype, Tensor] = self.__dict__.setdefault("_dense", {})
        if dtype not in dense_weights:
            rows, columns, *kernel = self.weight.shape
            dense = self.weight.new_zeros(
                rows, columns * (self.num_peers // self.num_merged_groups), *kernel, dtype=dtype
            )
            dense_weights[dtype] = dense.contiguous(memory_format=torch.channels_last)
        return dense_weights[dtype]

    def by_member(self, weight: Tensor) -> Tensor:
        """Return a view `G x M x O x I x h x w` of a stacked weight: M members in each of G merged groups."""
        return weight.unflatten(0, (self.num_merged_groups, self.num_peers // self.num_merged_groups, -1))

    def own_blocks(self, dense: Tensor) -> Tensor:
        """Return a view of the blocks in which a member reads its own channels, in the shape of `by_member`."""
        merged = self.num_peers // self.num_merged_groups
        blocks = dense.unflatten(1, (merged, -1)).unflatten(0, (self.num_merged_groups, merged, -1))
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


class StackedEntry(nn.Module):
    """The start of all branches: repeats the trunk's map once per branch, along the channels."""

    def __init__(self, entry: BranchEntry, inner: nn.Module, num_peers: int) -> None:
        super().__init__()
        self.inner, self.num_peers = inner, num_peers
        self.entries = [entry]  # for its `rescale` and `last_input`; in a list, so that it is no child module

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Repeat the map along its channels and run the stacked branch."""
        entry = self.entries[0]
        entry.last_input = x_BCHW
        if entry.rescale:
            x_BCHW = scale_gradient(x_BCHW, 1.0 / entry.fan_out)
        return self.inner(torch.cat([x_BCHW] * self.num_peers, 1))


class StackedPeers:
    """Runs the members of `peers` as one network in training; a `codistill.peers.base.Runner`.

    Args:
        peers: Equal members of Conv2d, BatchNorm2d, Linear, pooling and ReLU; their parameters become views.
        example: A batch `B x C x H x W`, on which the outputs are compared with those of the plain loop.

    Raises:
        InputError: the members differ, take other inputs than images, or contain a module that cannot be stacked.
    """

    def __init__(self, peers: Peers, example: Tensor) -> None:
        self.peers = peers
        if peers.num_input_axes != 4:
            raise InputError("--execution stacked takes images, B x C x H x W; use --execution loop")
        members = [peers.member(p) for p in range(peers.num_peers)]
        trunk = peers.shared_modules if isinstance(peers, BranchPeers) else []
        _check_equal(members, trunk)
        expected = _training_logits(peers, peers, example)
        self._on_gpu = example.device.type == "cuda"
        self.parameters: list[nn.Parameter] = []
        self._batch_counts: list[tuple[nn.Module, Tensor]] = []
        """Stacked BatchNorms and their members' common count of batches."""
        self._parts: list[list[Tensor]] = []
        """For every one of `parameters`, the members' parameters that it concatenates."""
        body = copy_module(members[0].body, {id(shared): shared for shared in trunk})
        self.body = self._convert(body, [m.body for m in members])
        heads = [m.head for m in members if isinstance(m.head, nn.Linear)]
        if len(heads) < len(members):
            raise InputError("--execution stacked takes classifier heads of one Linear; use --execution loop")
        self.head_weight = self._join_parameters([h.weight for h in heads])
        self.head_bias = self._join_parameters([h.bias for h in heads]) if heads[0].bias is not None else None
        for parameter in (p for shared in trunk for p in shared.parameters()):
            self.parameters.append(parameter)
            self._parts.append([parameter])
        # Where the network begins with a convolution, all members can take one copy of the images.
        self.repeats_images = not self._on_gpu or not self._reproduces(example, expected, repeats_images=False)
        if self.repeats_images and not self._reproduces(example, expected, repeats_images=True):
            raise InputError("--execution stacked: the network mixes channels outside its layers; use --execution loop")

    def __call__(self, views: Views) -> PeerOutputs:
        """Run all members at once on images, one view for all or one per peer; see `Peers.forward`."""
        num_peers = self.peers.num_peers
        if isinstance(self.peers, BranchPeers):
            self.peers.clear_cache()
            x = views[0]
        elif len(views) == 1 and not self.repeats_images:
            x = views[0]
        else:
            x = torch.cat([views[p if len(views) > 1 else 0] for p in range(num_peers)], 1)
        counts = [count for norm, count in self._batch_counts if norm.training and norm.track_running_stats]
        if counts:
            torch._foreach_add_(counts, 1)
        with autocast_of(x.device, self.peers.autocast):
            features_BPD = self.body(x)
        features_PBD = features_BPD.unflatten(1, (num_peers, -1)).transpose(0, 1).to(self.head_weight.dtype)
        weight_PDC = self.head_weight.unflatten(0, (num_peers, -1)).transpose(1, 2)
        if self.head_bias is None:
            logits_PBC = torch.bmm(features_PBD, weight_PDC)
        else:
            logits_PBC = torch.baddbmm(self.head_bias.unflatten(0, (num_peers, 1, -1)), features_PBD, weight_PDC)
        trunk = None
        if isinstance(self.peers, BranchPeers):
            trunk = self.peers.trunk_output().to(self.head_weight.dtype)
            self.peers.clear_cache()
        return PeerOutputs(logits_PBC, list(features_PBD), trunk)

    def _reproduces(self, example: Tensor, expected: Tensor, *, repeats_images: bool) -> bool:
        """Return whether the stacked network's logits are those of the plain loop, `expected`."""
        self.repeats_images = repeats_images
        try:
            logits_PBC = _training_logits(self.peers, self, example)
        except Exception as error:  # whatever the network's own code raises
            if out_of_memory(error) is not None:
                raise
            if not repeats_images:
                return False
            raise InputError(
                f"--execution stacked: the network fails on the channels of all members at once ({first_line(error)}); "
                "use --execution loop"
            ) from None
        return torch.allclose(logits_PBC, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    def _convert(self, module: nn.Module, members: Sequence[nn.Module]) -> nn.Module:
        """Return the stacked form of `module`, a copy of the first of `members`; its children are replaced."""
        if isinstance(module, SharedModule):
            return module
        if isinstance(module, BranchEntry):
            entries = [m for m in members if isinstance(m, BranchEntry)]
            return StackedEntry(entries[0], self._convert(module.inner, [e.inner for e in entries]), len(members))
        if isinstance(module, nn.Conv2d):
            return self._stack_conv(module, [m for m in members if isinstance(m, nn.Conv2d)])
        if isinstance(module, nn.BatchNorm2d):
            return self._stack_norm(module, [m for m in members if isinstance(m, nn.BatchNorm2d)])
        if isinstance(module, CHANNELWISE) and not any(True for _ in module.children()):
            return module
        if not any(True for _ in module.children()):
            raise InputError(f"--execution stacked does not support {type(module).__name__}; use --execution loop")
        if any(True for _ in module.parameters(recurse=False)):
            raise InputError(
                f"--execution stacked: {type(module).__name__} has parameters of its own; use --execution loop"
            )
        for name, child in module.named_children():
            setattr(module, name, self._convert(child, [m.get_submodule(name) for m in members]))
        return module

    def _stack_conv(self, conv: nn.Conv2d, members: Sequence[nn.Conv2d]) -> nn.Conv2d:
        if type(conv) is nn.Conv2d:  # a subclass keeps its own forward
            sizes = conv.in_channels, conv.out_channels, conv.kernel_size
            with torch.device("meta"):
                stacked = StackedConv2d(
                    *sizes,  # type: ignore[arg-type]
                    conv.stride,  # type: ignore[arg-type]
                    conv.padding,  # type: ignore[arg-type]
                    conv.dilation,  # type: ignore[arg-type]
                    conv.groups,
                    conv.bias is not None,
                    conv.padding_mode,
                )
            stacked.num_peers, stacked.merges = len(members), self._on_gpu
            conv = stacked
        conv.in_channels *= len(members)
        conv.out_channels *= len(members)
        conv.groups *= len(members)
        conv.weight = self._join_parameters([m.weight for m in members])
        if conv.bias is not None:
            conv.bias = self._join_parameters([m.bias for m in members if m.bias is not None])
        return conv

    def _stack_norm(self, norm: nn.BatchNorm2d, members: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
        norm.num_features *= len(members)
        if norm.affine:
            norm.weight = self._join_parameters([m.weight for m in members])
            norm.bias = self._join_parameters([m.bias for m in members])
        if norm.running_mean is None:  # it has no running statistics at all
            return norm
        for name in ("running_mean", "running_var"):
            joined = torch.cat([m.get_buffer(name) for m in members])
            norm._buffers[name] = joined
            for member, view in zip(members, joined.chunk(len(members))):
                member._buffers[name] = view
        count = norm.num_batches_tracked
        for member in members:  # one count for all
            member._buffers["num_batches_tracked"] = count
        if norm.momentum is not None:  # normalization does not need the count, so all are incremented in one launch
            norm._buffers["num_batches_tracked"] = None
            if count is not None:
                self._batch_counts.append((norm, count))
        return norm

    def _join_parameters(self, parts: Sequence[Tensor]) -> nn.Parameter:
        """Return the members' parameters `parts` concatenated as one parameter, and make them views of it."""
        joined = torch.cat([p.detach() for p in parts])
        if parts[0].dim() == 4 and parts[0].is_contiguous(memory_format=torch.channels_last):
            joined = joined.contiguous(memory_format=torch.channels_last)
        for part, view in zip(parts, joined.chunk(len(parts))):
            part.data = view
        self.parameters.append(nn.Parameter(joined))
        self._parts.append([*parts])
        return self.parameters[-1]

    def split_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state in the form of the plain loop: one entry per parameter of every member."""
        indices, extra = self._member_indices()
        entries: dict[int, Any] = {}
        for index, entry in state["state"].items():
            if index >= len(self.parameters):  # the method's own
                entries[index + extra] = entry
                continue
            for row, target in enumerate(indices[index]):
                entries[target] = {name: _member_part(v, row, len(indices[index])) for name, v in entry.items()}
        return _replace_entries(state, entries, extra)

    def join_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the stacked form of a state that `split_optimizer` or the plain loop returned."""
        indices, extra = self._member_indices()
        total = len(self.parameters) + extra
        entries = {index - extra: entry for index, entry in state["state"].items() if index >= total}
        for index, (parameter, sources) in enumerate(zip(self.parameters, indices)):
            states = [state["state"][source] for source in sources if source in state["state"]]
            if states:
                entries[index] = {
                    # In the parameter's own memory format, which a fused optimizer assumes.
                    name: torch.empty_like(parameter).copy_(torch.cat([s[name] for s in states]))
                    if _is_per_parameter(value)
                    else value
                    for name, value in states[0].items()
                }
        return _replace_entries(state, entries, -extra)

    def _member_indices(self) -> tuple[list[list[int]], int]:
        """Return, for each parameter, the indices of its parts among the members', and how many more those are."""
        numbers = {id(p): index for index, p in enumerate(self.peers.parameters())}
        return [[numbers[id(p)] for p in parts] for parts in self._parts], len(numbers) - len(self.parameters)


def _member_part(value: Any, row: int, count: int) -> Any:
    """Return one member's part of an entry, copied: fused optimizers count the steps of each parameter in place."""
    if not isinstance(value, Tensor):
        return value
    return (value.chunk(count)[row] if _is_per_parameter(value) else value).clone()


def _is_per_parameter(value: object) -> bool:
    """Return True for tensors of the parameter's shape (momenta), False for scalars (step counts)."""
    return isinstance(value, Tensor) and value.dim() > 0


def _replace_entries(state: dict[str, Any], entries: dict[int, Any], num_extra: int) -> dict[str, Any]:
    """Return `state` with other entries, its parameter group longer by `num_extra` parameters."""
    (group,) = state["param_groups"]
    return {
        "state": dict(sorted(entries.items())),
        "param_groups": [group | {"params": list(range(len(group["params"]) + num_extra))}],
    }


def _check_equal(members: Sequence[nn.Module], trunk: Sequence[nn.Module]) -> None:
    """Raise where members differ in their parameters or buffers, make weights anew, or form a tree."""
    layers = [m for m in members[0].modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear | nn.BatchNorm2d)]
    if any(layer._forward_pre_hooks or is_parametrized(layer) for layer in layers):
        raise InputError(
            "--execution stacked: weight norm, spectral norm or pruning makes a layer's weights anew in every forward; "
            "use --execution loop"
        )
    shapes = [[(n, tuple(v.shape)) for n, v in m.state_dict().items()] for m in members]
    if any(s != shapes[0] for s in shapes):
        raise InputError("--execution stacked needs peers of the same architecture and size; use --execution loop")
    in_trunk = {id(p) for shared in trunk for p in shared.parameters()}
    num_shared = sum(id(p) in in_trunk for p in members[0].parameters())
    common = {id(p) for p in members[0].parameters()} & {id(p) for p in members[-1].parameters()}
    if len(members) > 1 and len(common) != num_shared:
        raise InputError("--execution stacked takes branches that fork once; use --execution loop for a tree")


@torch.no_grad()
def _training_logits(peers: Peers, forward: Peers | StackedPeers, example: Tensor) -> Tensor:
    """Return the logits `P x B x C` in training mode and without autocast; nothing is recorded."""
    body = forward.body if isinstance(forward, StackedPeers) else nn.Identity()
    autocast, peers.autocast = peers.autocast, None
    try:
        # The stacked body runs in training alone, so it stays in training mode.
        with (
            torch.autocast(example.device.type, enabled=False),
            train_mode(peers),
            frozen_batchnorm_stats(peers),
            frozen_batchnorm_stats(body.train()),
        ):
            return forward(example.unsqueeze(0)).logits_PBC
    finally:
        peers.autocast = autocast
