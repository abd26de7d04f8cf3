"""Faster evaluation, on a copy of the peers: BatchNorm is folded into the convolution before it.

A BatchNorm follows a convolution if, in a forward pass of an example, its input is the tensor that the convolution
returned. The folded copy is compared with the original on the example. If they differ (a convolution's output is also
used elsewhere, as in DenseNet), each pair is tried separately, and the pairs that can be folded are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from codistill.peers import Peers, copy_module
from codistill.utils import out_of_memory

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


class _FoldedCopy:
    """A copy of the peers without the BatchNorms of `pairs`; it shares all parameters but the folded ones.

    Copying the modules takes longer than evaluating a hundred small images, so the copy is kept from one evaluation to
    the next, and `refresh` folds the current weights.
    """

    def __init__(self, peers: Peers, pairs: Sequence[Pair]) -> None:
        runner, peers.stacked_runner = peers.stacked_runner, None
        copies: dict[int, Any] = {id(tensor): tensor for tensor in chain(peers.parameters(), peers.buffers())}
        try:
            self.peers = copy_module(peers, copies).eval()
        finally:
            peers.stacked_runner = runner
        self.modules = list(peers.modules())[1:]  # without the peers, which are the key under which this is kept
        self.copies = [copies[id(module)] for module in self.modules]
        self.pairs = pairs
        folded_convs = {id(conv) for conv, _ in pairs}
        self.shared = [(m, c) for m, c in zip(self.modules, self.copies) if id(m) not in folded_convs]
        self.convs = [copies[id(conv)] for conv, _ in pairs]
        norms = {id(copies[id(norm)]) for _, norm in pairs}
        for parent in list(self.peers.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in norms:
                    setattr(parent, name, nn.Identity())

    def is_copy_of(self, peers: Peers) -> bool:
        """Return whether the peers still consist of the modules that were copied."""
        modules = list(peers.modules())[1:]
        return len(modules) == len(self.modules) and all(m is own for m, own in zip(modules, self.modules))

    def refresh(self) -> Peers:
        """Return the copy with the peers' current weights and statistics."""
        for module, shared in self.shared:
            shared._parameters, shared._buffers = module._parameters, module._buffers  # type: ignore[attr-defined]
        for folded, (conv, norm) in zip(self.convs, self.pairs):
            folded.weight, folded.bias = fuse_conv_bn_weights(  # type: ignore[attr-defined]
                conv.weight,
                conv.bias,
                norm.get_buffer("running_mean"),
                norm.get_buffer("running_var"),
                norm.eps,
                norm.weight,
                norm.bias,
            )
        return self.peers


_COPIES: WeakKeyDictionary[Peers, _FoldedCopy] = WeakKeyDictionary()
"""The folded copy of the last evaluation of each peers."""


@torch.no_grad()
def folded_for_evaluation(peers: Peers, example: Tensor) -> Peers:
    """Return a copy of the peers with the same outputs in evaluation mode and fewer layers; `peers` if nothing folds.

    Only convolutions that hold their weight as a parameter are folded, and not those that compute it (weight_norm,
    spectral_norm, parametrizations, pruning). The next call with the same peers changes and returns the same copy.

    Args:
        peers: They are not changed.
        example: One image or more, `B x C x H x W`.
    """
    autocast, peers.autocast = peers.autocast, None  # the comparison is not possible in bfloat16, for rounding
    convolutions = torch.backends.cudnn.conv  # pyrefly: ignore
    precision, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"  # nor in TF32, a GPU's default
    try:
        folded = _fold_checked(peers.eval(), example)
    except Exception as error:  # a user's network may refuse to be copied or hooked; it evaluates as it is
        if out_of_memory(error) is not None:
            raise
        folded = peers
    finally:
        peers.autocast, convolutions.fp32_precision = autocast, precision
    folded.autocast = autocast
    return folded


def _fold_checked(peers: Peers, example: Tensor) -> Peers:
    """Return a copy with all pairs folded that leave the outputs unchanged."""
    expected = peers(example).logits_PBC
    known = _COPIES.get(peers)
    if known is not None and known.is_copy_of(peers):
        if not _differ(known.refresh(), example, expected):
            return known.peers
        return peers
    pairs = _find_pairs(peers, example)
    folded = _FoldedCopy(peers, pairs)
    if pairs and _differ(folded.refresh(), example, expected):
        pairs = [p for p in pairs if not _differ(_FoldedCopy(peers, [p]).refresh(), example, expected)]
        folded = _FoldedCopy(peers, pairs)
    if not pairs:
        return peers
    _COPIES[peers] = folded
    return folded.refresh()


def _differ(folded: Peers, example: Tensor, expected: Tensor) -> bool:
    """Return whether logits differ by more than 1e-4 of the largest."""
    difference = (folded(example).logits_PBC - expected).abs().max()
    return bool(difference > 1e-4 * expected.abs().max().clamp_min(1e-6))


def _holds_its_weight(module: nn.Module) -> bool:
    """Return whether a module is a convolution whose weight is a parameter, not computed from others at every call."""
    return (
        isinstance(module, nn.Conv2d)
        and "weight" in module._parameters
        and not module._forward_pre_hooks  # weight_norm, spectral_norm and pruning of torch.nn.utils
    )


def _find_pairs(peers: Peers, example: Tensor) -> list[Pair]:
    """Return each convolution whose output one BatchNorm reads, with that BatchNorm."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by id; the tensors are stored so that no id is used twice
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after_conv(conv: nn.Conv2d, _inputs: object, output: Tensor) -> None:
        outputs[id(output)] = (conv, output)

    def before_norm(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if norm.running_mean is not None and inputs and id(inputs[0]) in outputs:
            pairs[norm] = outputs[id(inputs[0])][0]

    hooks = [m.register_forward_hook(after_conv) for m in peers.modules() if _holds_its_weight(m)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in peers.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        peers(example)
    finally:
        for hook in hooks:
            hook.remove()
    convs = list(pairs.values())
    return [(conv, norm) for norm, conv in pairs.items() if convs.count(conv) == 1]
