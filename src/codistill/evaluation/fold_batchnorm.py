"""Faster evaluation, on a copy of the peers: BatchNorm is folded into the convolution before it.

A BatchNorm follows a convolution if, in a forward pass of an example, its input is the tensor that the convolution
returned. The folded copy is compared with the original on the example. If they differ (a convolution's output is also
used elsewhere, as in DenseNet), each pair is tried separately, and the pairs that can be folded are stored.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from codistill.peers import Peers, copy_module
from codistill.utils import out_of_memory

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
_FOLDABLE_PAIRS: WeakKeyDictionary[Peers, list[int]] = WeakKeyDictionary()
"""Indices of the pairs that can be folded, of peers for which not all can."""


@torch.no_grad()
def folded_for_evaluation(peers: Peers, example: Tensor) -> Peers:
    """Return a copy of the peers with the same outputs in evaluation mode and fewer layers; `peers` if nothing folds.

    Only convolutions that hold their weight as a parameter are folded, and not those that compute it (weight_norm,
    spectral_norm, parametrizations, pruning).

    Args:
        peers: They are not changed.
        example: One image or more, `B x C x H x W`.
    """
    autocast, peers.autocast = peers.autocast, None  # the comparison is not possible in bfloat16, for rounding
    convolutions = torch.backends.cudnn.conv  # pyrefly: ignore
    precision, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"  # nor in TF32, a GPU's default
    try:
        with torch.autocast(example.device.type, enabled=False):
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
    known = _FOLDABLE_PAIRS.get(peers)
    folded, count = _fold_pairs(peers, example, known)
    if count and not _differ(folded, example, expected):
        return folded
    if count and known is None:
        good = [i for i in range(count) if not _differ(_fold_pairs(peers, example, [i])[0], example, expected)]
        _FOLDABLE_PAIRS[peers] = good
        return _fold_pairs(peers, example, good)[0] if good else peers
    return peers


def _differ(folded: Peers, example: Tensor, expected: Tensor) -> bool:
    """Return whether logits differ by more than 1e-4 of the largest."""
    difference = (folded(example).logits_PBC - expected).abs().max()
    return bool(difference > 1e-4 * expected.abs().max().clamp_min(1e-6))


def _fold_pairs(peers: Peers, example: Tensor, chosen: list[int] | None) -> tuple[Peers, int]:
    """Return a copy with the chosen pairs folded (None: all), and how many pairs there are."""
    runner, peers.stacked_runner = peers.stacked_runner, None
    try:
        folded = copy_module(peers).eval()
    finally:
        peers.stacked_runner = runner
    pairs = _find_pairs(folded, example)
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
