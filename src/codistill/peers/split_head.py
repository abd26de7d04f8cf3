"""Splitting a classifier before its head, without hooks: an identity replaces the head, which is called explicitly.

Shapes: B batch, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codistill.peers.heads import (
    CONVOLUTIONS,
    MapHead,
    cut_convolution,
    cut_linear,
    cut_map,
    cut_pair,
    is_pointwise,
    num_classes_of,
    put_back,
)
from codistill.peers.inputs import IMAGE_ADVICE, Inputs, call_network, describe_inputs, repeat_first_row, tensors_of
from codistill.peers.maps import MapShape, taken_maps
from codistill.peers.modes import copy_module, eval_mode, frozen_batchnorm_stats, no_batchnorm_update, train_mode
from codistill.peers.shared_trunk import SharedModule, plain_copy
from codistill.utils import InputError, first_line

Cut = Callable[[nn.Module], tuple[nn.Module, int]]
"""Cuts a head off a network; returns it and the width of its features."""


class SplitMember(nn.Module):
    """A classifier cut in two: `body` (inputs -> features) and `head` (features -> logits)."""

    def __init__(self, body: nn.Module, head: nn.Module, head_path: str, feature_dim: int) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.head_path, self.feature_dim = head_path, feature_dim
        self.checkpoint_activations = False
        """Whether training keeps no activations of the body and runs it a second time in the backward."""
        self.exits = nn.ModuleList()
        """Copies of the body's later part, with parameters of their own (see `codistill.peers.exits`)."""
        self.exit_dims: tuple[int, ...] = ()
        self.map_shapes: dict[str, MapShape] = {}
        """Modules of the body whose maps are taken in training, and their shapes (see `codistill.peers.maps`)."""
        self.shared_modules: list[SharedModule] = []
        """What runs before the exits' forks: once for the body and for the exits."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return `(features, logits)`. The head runs outside autocast, in its own dtype."""
        self._clear_cache()
        outputs = self._run(inputs)
        self._clear_cache()
        return outputs

    def forward_with_extras(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return `(features, logits, *features of the exits)`, or `(features, logits, *maps)`.

        In evaluation that records no gradient there are neither, as nothing reads them there.
        """
        if not (self.training or torch.is_grad_enabled()) or not (self.exits or self.map_shapes):
            return self(inputs)
        if self.map_shapes:
            with taken_maps(self.body, list(self.map_shapes)) as maps:
                features, logits = self._run(inputs)
            return features, logits, *(maps[path].to(features.dtype) for path in self.map_shapes)
        self._clear_cache()
        features, logits = self._run(inputs)
        exits = []
        for network in self.exits:
            for shared in self.shared_modules:
                shared.replay()
            exits.append(call_network(network, inputs).to(features.dtype))
        self._clear_cache()
        return features, logits, *exits

    def _clear_cache(self) -> None:
        for shared in self.shared_modules:
            shared.clear_cache()

    def _run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            # The second run has the same random state and batch statistics, and must not record those twice.
            features = checkpoint(
                call_network, self.body, inputs, use_reentrant=False, context_fn=self._checkpoint_contexts
            )
        else:
            features = call_network(self.body, inputs)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.head.parameters()).dtype)
            pooled = self.head.pool(features) if isinstance(self.head, MapHead) else features
            return pooled, self.head(features)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the first and of the second run of the body."""
        return nullcontext(), no_batchnorm_update(self.body)

    def to_plain_module(self) -> nn.Module:
        """Return an independent copy of the classifier, in one piece as it was before the split, without exits."""
        memo: dict[int, Any] = {}  # one for both, as a head may share its weight with an embedding
        plain = plain_copy(self.body, memo)
        put_back(plain, self.head_path, copy_module(self.head, memo))
        return plain


def split_head(model: nn.Module, example: Inputs | None = None, advice: str = IMAGE_ADVICE) -> SplitMember:
    """Split `model` before its classifier head.

    Candidates, in this order: the attribute `head_path` alone, where there is one; otherwise timm's `get_classifier()`,
    the linear layers from the last to the first, two linear layers that are averaged, and 1 x 1 convolutions before a
    pooling. With an example, the head is the first candidate for which head(body(x)) is the model's own output;
    without one, the first candidate.

    Args:
        model: A classifier; it is changed.
        example: An input that it takes, with one row.
        advice: What to change where it does not.

    Raises:
        InputError: the model has no such layer, cannot take the example, or none of the candidates is its head.
    """
    candidates = [*_head_candidates(model)]
    if example is None:
        path, cut = candidates[0]
        head, width = cut(model)
        return SplitMember(model, head, path, width)
    outputs = _whole_outputs(model, example, advice)
    for path, cut in candidates:
        head, width = cut(model)
        member = SplitMember(model, head, path, width)
        if num_classes_of(head) == outputs.shape[1] and _reproduces(member, example, outputs):
            _check_training(member, example, advice)
            return member
        put_back(model, path, head)
    shown = ", ".join(f'"{path}"' for path, _ in candidates[:3])
    raise InputError(
        f"--model {_model_name(model)}: calling {shown} by itself after the rest does not give the network's output, "
        "so it is not its classifier head; return the head's logits as they are (without softmax, say), or name "
        "another head in the attribute head_path"
    )


def _head_candidates(model: nn.Module) -> Iterator[tuple[str, Cut]]:
    """Yield the path of every module that may be the head, with the function that cuts it off.

    Raises:
        InputError: there is none.
    """
    modules = dict(model.named_modules())
    declared = getattr(model, "head_path", None)
    if declared is not None:
        yield declared, _cut_of_declared(model, declared)
        return
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and name]
    pointwise = [name for name, module in modules.items() if is_pointwise(module) and name]
    if not linears and not pointwise:
        raise InputError(
            f"--model {_model_name(model)} has no nn.Linear inside to take as its classifier head, and no 1 x 1 "
            "convolution either"
        )
    for path in dict.fromkeys([*_classifier_of_timm(model), *reversed(linears)]):
        yield path, partial(cut_linear, path=path)
    for path, second in zip(linears[-2:-1], linears[-1:]):
        if _is_pair(modules[path], modules[second]):
            yield path, partial(cut_pair, path=path, second_path=second)
    for path in reversed(pointwise):
        yield path, partial(cut_convolution, path=path)
        parent = path.rpartition(".")[0]
        if parent and isinstance(modules[parent], nn.Sequential):
            yield parent, partial(cut_map, path=parent)


def _cut_of_declared(model: nn.Module, path: str) -> Cut:
    """Return the function that cuts off the head that a network names in `head_path`.

    Raises:
        InputError: there is none, or no layer in it is a classifier's.
    """
    head = dict(model.named_modules()).get(path)
    layers = [] if head is None else [*head.modules()]
    if any(isinstance(module, nn.Linear) for module in layers):
        return partial(cut_linear, path=path)
    convolutions = [module for module in layers if isinstance(module, CONVOLUTIONS)]
    if convolutions and all(map(is_pointwise, convolutions)):
        return partial(cut_convolution if head is convolutions[0] else cut_map, path=path)
    raise InputError(
        f'--model {_model_name(model)}: its head_path "{path}" leads to no nn.Linear and no 1 x 1 convolution'
    )


def _classifier_of_timm(model: nn.Module) -> list[str]:
    """Return the path of the linear layer that timm's `get_classifier()` returns; none where it is no such layer."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    return [name for name, module in model.named_modules() if module is classifier and isinstance(module, nn.Linear)]


def _is_pair(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two linear layers are of one shape."""
    return isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and first.weight.shape == second.weight.shape


def _model_name(model: nn.Module) -> str:
    inner = getattr(model, "model", None)
    return type(inner if isinstance(inner, nn.Module) else model).__name__


def _whole_outputs(model: nn.Module, example: Inputs, advice: str) -> Tensor:
    """Return the logits of the whole classifier in evaluation mode."""
    shape = describe_inputs(example)
    try:
        with eval_mode(model), torch.no_grad():
            outputs = call_network(model, example)
    except Exception as error:  # whatever the network's own code raises
        advice = _advise_rows(model, example) or advice
        raise InputError(f"--model {_model_name(model)} cannot take {shape} ({first_line(error)}); {advice}") from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        kind = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"--model {_model_name(model)} returns {kind}; peers need logits, one row per sample")
    if not outputs.is_floating_point() or not outputs.isfinite().all():
        kind = "numbers that are not finite" if outputs.is_floating_point() else f"numbers of {outputs.dtype}"
        raise InputError(f"--model {_model_name(model)} returns {kind}; peers need floating-point logits, so fix it")
    if len(outputs) != len(tensors_of(example)[0]):
        one = shape.replace("images", "one image")
        raise InputError(
            f"--model {_model_name(model)} returns {len(outputs)} rows for {one} "
            f"(its view or reshape is meant for another size); {advice}"
        )
    return outputs


def _advise_rows(model: nn.Module, example: Inputs) -> str | None:
    """Return what to change where a network takes several rows but not a single one; None where it takes neither."""
    count = 4
    try:
        with eval_mode(model), torch.no_grad():
            outputs = call_network(model, repeat_first_row(example, count))
    except Exception:  # whatever the network's own code raises
        return None
    rows = f" with {len(outputs)}" if isinstance(outputs, Tensor) and outputs.dim() else ""
    return (
        f"it fails on one row and answers {count} rows{rows}: its forward must take any number of rows, and return one "
        "row of logits for each"
    )


def _reproduces(member: SplitMember, example: Inputs, outputs: Tensor) -> bool:
    """Return whether body and head, one after the other, give the outputs of the whole model."""
    try:
        with eval_mode(member), torch.no_grad():
            features, logits = member(example)
    except Exception:  # this is no head: the network's own code fails on what an identity returns in its place
        return False
    if features.dim() != 2 or logits.shape != outputs.shape:
        return False
    return bool((logits - outputs).abs().max() <= 1e-4 * outputs.abs().max() + 1e-6)


def _check_training(member: SplitMember, example: Inputs, advice: str) -> None:
    """Raise where the network fails in training mode or returns no tensor; random state and statistics are kept."""
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            frozen_batchnorm_stats(member),
            train_mode(member),
        ):
            features = call_network(member.body, repeat_first_row(example, 2))
    except Exception as error:  # whatever the network's own code raises
        larger = "fix its forward, or give a larger --image-size" if advice == IMAGE_ADVICE else advice
        raise InputError(
            f"--model {_model_name(member.body)} cannot train on {describe_inputs(example)} "
            f"({first_line(error)}); {larger}"
        ) from error
    if not isinstance(features, Tensor):
        raise InputError(
            f"--model {_model_name(member.body)} returns {type(features).__name__} in training mode; "
            "build it without auxiliary outputs"
        )
