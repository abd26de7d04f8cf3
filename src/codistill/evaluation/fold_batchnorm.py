"""Faster evaluation, on a copy: BatchNorm folded into the convolution before it, where the network allows.

Which BatchNorm follows which convolution is seen on one image: its input is the very tensor that the convolution
returned. Folded copies are compared with the original on that image; where all pairs together differ (a convolution's
map is used elsewhere too, as in DenseNet), each is tried by itself, once, and the good ones are remembered.
"""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from codistill.evaluation.fused_conv import FusedConv, fuse, is_available
from codistill.peers.base import Peers

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
_foldable_pairs: WeakKeyDictionary[Peers, list[int]] = WeakKeyDictionary()
"""Indices of the pairs that may be folded, of peers for which not all may be: found once, by one trial per pair."""


@torch.no_grad()
def folded_for_evaluation(peers: Peers, example: Tensor, large: bool = False) -> Peers:
    """Return peers that say the same in evaluation mode and cost less; `peers` itself where nothing can be folded.

    Args:
        peers: Left as they are.
        example: One image or more, `B x C x H x W`.
        large: Whether so much is to be evaluated that fusing kernels too (see `fusing`) pays for the tracing.
    """
    autocast, peers.autocast = peers.autocast, None  # in bfloat16 rounding alone would tell the two apart
    convolutions = torch.backends.cudnn.conv  # pyrefly: ignore
    held, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"  # and so would TF32, a GPU's default
    try:
        folded = _checked(peers.eval(), example)
        if large and folded is not peers:
            folded = _fused(folded, example, autocast)
    finally:
        peers.autocast, convolutions.fp32_precision = autocast, held
    folded.autocast = autocast
    return folded


def _fused(folded: Peers, example: Tensor, autocast: torch.dtype | None) -> Peers:
    """Return a copy of folded peers with fused kernels; the peers where there are none, or they say something else."""
    if not is_available(example):
        return folded
    expected, fused, done = folded(example).logits_PBC, copy.deepcopy(folded), {}
    for index in range(fused.num_peers):
        member = fused.member(index)
        member.body = fuse(member.body, done)
    try:
        if _differ(fused, example, expected):
            return folded
        if autocast is not None:
            for module in fused.modules():
                if isinstance(module, FusedConv):
                    module.to(autocast)
            fused.autocast = autocast
            fused(example)
    except Exception:  # no such kernel on this processor, in this torch, for these shapes: evaluation goes on without
        return folded
    return fused


def _checked(peers: Peers, example: Tensor) -> Peers:
    expected = peers(example).logits_PBC
    known = _foldable_pairs.get(peers)
    folded, count = _folded(peers, example, known)
    if count and not _differ(folded, example, expected):
        return folded
    if count and known is None:
        good = [i for i in range(count) if not _differ(_folded(peers, example, [i])[0], example, expected)]
        _foldable_pairs[peers] = good
        return _folded(peers, example, good)[0] if good else peers
    return peers


def _differ(folded: Peers, example: Tensor, expected: Tensor) -> bool:
    gap = (folded(example).logits_PBC - expected).abs().max()
    return bool(gap > 1e-4 * expected.abs().max().clamp_min(1e-6))


def _folded(peers: Peers, example: Tensor, chosen: list[int] | None) -> tuple[Peers, int]:
    """Return a copy with the chosen pairs folded (None: all), and how many pairs there are."""
    runner, peers.stacked_runner = peers.stacked_runner, None
    try:
        folded = copy.deepcopy(peers).eval()
    finally:
        peers.stacked_runner = runner
    pairs = _pairs(folded, example)
    norms = set()
    for conv, norm in pairs if chosen is None else [pairs[i] for i in chosen]:
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        norms.add(norm)
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if child in norms:
                setattr(parent, name, nn.Identity())
    return folded, len(pairs)


def _pairs(peers: Peers, example: Tensor) -> list[Pair]:
    """Return (convolution, BatchNorm) pairs, each once; hooks are gone when this returns."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are kept, so that their ids stay theirs
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def after_conv(conv: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        made[id(output)] = (conv, output)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if id(inputs[0]) in made:
            pairs[norm] = made[id(inputs[0])][0]

    hooks = [m.register_forward_hook(after_conv) for m in peers.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in peers.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        peers(example)
    finally:
        for hook in hooks:
            hook.remove()
    convs = list(pairs.values())
    return [(conv, norm) for norm, conv in pairs.items() if convs.count(conv) == 1]
