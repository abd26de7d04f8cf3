"""Cutting a classifier before its head, without hooks: the head is swapped for an identity and called explicitly.

Shapes: B batch, C classes, D features.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codistill.peers.modes import eval_mode, frozen_batchnorm_stats, no_batchnorm_update
from codistill.peers.shared_trunk import plain_copy
from codistill.utils.errors import InputError


class SplitMember(nn.Module):
    """A classifier cut in two: `body` (images -> features) and `head` (features -> logits)."""

    def __init__(self, body: nn.Module, head: nn.Module, head_path: str, feature_dim: int) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.head_path, self.feature_dim = head_path, feature_dim
        self.recompute = False
        """Whether training keeps no activations of the body, and runs it again in the backward."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(features, logits)`. The head runs outside autocast, in its own dtype."""
        if self.recompute and self.training and torch.is_grad_enabled():
            # The second run sees the same draws and batch statistics, and must not record those twice.
            twice = lambda: (nullcontext(), no_batchnorm_update(self.body))  # noqa: E731
            features = checkpoint(self.body, x_BCHW, use_reentrant=False, context_fn=twice)
        else:
            features = self.body(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            features = features.to(next(self.head.parameters()).dtype)
            return features, self.head(features)

    @property
    def head_parameters(self) -> int:
        """Number of the head's parameters."""
        return sum(p.numel() for p in self.head.parameters())

    def merge(self) -> nn.Module:
        """Return a plain, independent copy of the classifier with its head back in its place."""
        plain = plain_copy(self.body)
        plain.set_submodule(self.head_path, copy.deepcopy(self.head))
        return plain


def split_head(model: nn.Module, example: Tensor | None = None) -> SplitMember:
    """Cut `model` before its classifier head.

    The places tried, in this order: the attribute `head_path`, timm's `get_classifier()`, and the linear layers from
    the last one on. With an example, the first place is taken where head(body(x)) is the model's own output.

    Args:
        model: A classifier; it is changed.
        example: Images that it takes, `B x C x H x W`.

    Raises:
        InputError: it has no linear layer, cannot take the example, or none of the places is its head.
    """
    paths = _head_candidates(model)
    if example is None:
        return _cut(model, paths[0])
    outputs = _own_outputs(model, example)
    for path in paths:
        member = _cut(model, path)
        if _reproduces(member, example, outputs):
            _check_training(member, example)
            return member
        model.set_submodule(path, member.head)
    shown = ", ".join(f'"{path}"' for path in paths[:3])
    raise InputError(
        f"--model {_name(model)}: calling {shown} by itself after the rest does not give the network's output, so it "
        "is not its classifier head; name the right one in the attribute head_path"
    )


def _head_candidates(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    declared = getattr(model, "head_path", None)
    if declared is not None:
        head = model.get_submodule(declared)
        if not any(isinstance(module, nn.Linear) for module in head.modules()):
            raise InputError(f'--model {_name(model)}: its head_path "{declared}" leads to no nn.Linear')
        return [declared]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears == [""]:
        raise InputError(f"--model {_name(model)} has no nn.Linear inside to take as its classifier head")
    timms = model.get_classifier() if callable(getattr(model, "get_classifier", None)) else None  # type: ignore[operator]
    first = [names[timms]] if isinstance(timms, nn.Linear) and timms in names else []
    return [*dict.fromkeys([*first, *reversed(linears)])]


def _cut(model: nn.Module, path: str) -> SplitMember:
    head = model.get_submodule(path)
    first = next(module for module in head.modules() if isinstance(module, nn.Linear))
    model.set_submodule(path, nn.Identity())
    return SplitMember(model, head, path, first.in_features)


def _name(model: nn.Module) -> str:
    inner = getattr(model, "model", None)
    return type(inner if isinstance(inner, nn.Module) else model).__name__


def _own_outputs(model: nn.Module, example: Tensor) -> Tensor:
    """Return what the whole classifier says in evaluation mode."""
    shape = " x ".join(map(str, example.shape[1:]))
    try:
        with eval_mode(model), torch.no_grad():
            outputs = model(example)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"--model {_name(model)} cannot take images of {shape} ({reason}); give another --image-size or --channels"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        kind = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"--model {_name(model)} returns {kind}; peers need logits, one row an image")
    return outputs


def _reproduces(member: SplitMember, example: Tensor, outputs: Tensor) -> bool:
    """Say whether the parts, one after the other, give the whole's output."""
    try:
        with eval_mode(member), torch.no_grad():
            features, logits = member(example)
    except (RuntimeError, AttributeError, ValueError, TypeError):  # the features do not even fit
        return False
    if features.dim() != 2 or logits.shape != outputs.shape:
        return False
    return bool((logits - outputs).abs().max() <= 1e-4 * outputs.abs().max() + 1e-6)


def _check_training(member: SplitMember, example: Tensor) -> None:
    """Raise where the network returns something else while it trains; nothing random or running is changed."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), frozen_batchnorm_stats(member):
            modes = [(m, m.training) for m in member.modules()]
            member.train()
            try:
                features = member.body(example.expand(2, *example.shape[1:]))
            finally:
                for module, mode in modes:
                    module.training = mode
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        shape = " x ".join(map(str, example.shape[1:]))
        raise InputError(
            f"--model {_name(member.body)} cannot train on images of {shape} ({reason}); give a larger --image-size"
        ) from error
    if not isinstance(features, Tensor):
        raise InputError(
            f"--model {_name(member.body)} returns {type(features).__name__} while it trains; "
            "build it without auxiliary outputs"
        )


def dummy_input(module: nn.Module, in_channels: int, image_size: int) -> Tensor:
    """Return one image of noise that `module` can be tried on, leaving the random state alone."""
    parameter = next(module.parameters())
    noise = torch.linspace(-40.0, 40.0, in_channels * image_size**2).sin()
    return noise.view(1, in_channels, image_size, image_size).to(parameter)
