"""Splitting a classifier before its head, without hooks: an identity replaces the head, which is called explicitly.

Shapes: B batch, C classes, D features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codistill.peers.modes import copy_module, eval_mode, frozen_batchnorm_stats, no_batchnorm_update, train_mode
from codistill.peers.shared_trunk import SharedModule, plain_copy
from codistill.utils import InputError, first_line


class SplitMember(nn.Module):
    """A classifier cut in two: `body` (images -> features) and `head` (features -> logits)."""

    def __init__(self, body: nn.Module, head: nn.Module, head_path: str, feature_dim: int) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.head_path, self.feature_dim = head_path, feature_dim
        self.checkpoint_activations = False
        """Whether training keeps no activations of the body and runs it a second time in the backward."""
        self.exits = nn.ModuleList()
        """Copies of the body's later part, with parameters of their own (see `codistill.peers.exits`)."""
        self.exit_dims: tuple[int, ...] = ()
        self.shared_modules: list[SharedModule] = []
        """What runs before the exits' forks: once for the body and for the exits."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(features, logits)`. The head runs outside autocast, in its own dtype."""
        self._clear_cache()
        outputs = self._run(x_BCHW)
        self._clear_cache()
        return outputs

    def forward_with_exits(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return `(features, logits, *features of the exits)`.

        In evaluation that records no gradient the exits do not run, as nothing reads them there.
        """
        if not self.exits or not (self.training or torch.is_grad_enabled()):
            return self(x_BCHW)
        self._clear_cache()
        features, logits = self._run(x_BCHW)
        exits = []
        for network in self.exits:
            for shared in self.shared_modules:
                shared.replay()
            exits.append(network(x_BCHW).to(features.dtype))
        self._clear_cache()
        return features, logits, *exits

    def _clear_cache(self) -> None:
        for shared in self.shared_modules:
            shared.clear_cache()

    def _run(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            # The second run has the same random state and batch statistics, and must not record those twice.
            features = checkpoint(self.body, x_BCHW, use_reentrant=False, context_fn=self._checkpoint_contexts)
        else:
            features = self.body(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            features = features.to(next(self.head.parameters()).dtype)
            return features, self.head(features)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the first and of the second run of the body."""
        return nullcontext(), no_batchnorm_update(self.body)

    def to_plain_module(self) -> nn.Module:
        """Return an independent copy of the classifier, in one piece as it was before the split, without exits."""
        plain = plain_copy(self.body)
        plain.set_submodule(self.head_path, copy_module(self.head))
        return plain


def split_head(model: nn.Module, example: Tensor | None = None) -> SplitMember:
    """Split `model` before its classifier head.

    Candidates, in this order: the attribute `head_path` alone, where there is one; otherwise timm's `get_classifier()`,
    and the linear layers from the last to the first. With an example, the head is the first candidate for which
    head(body(x)) is the model's own output; without one, the first candidate.

    Args:
        model: A classifier; it is changed.
        example: Images that it takes, `B x C x H x W`.

    Raises:
        InputError: the model has no linear layer, cannot take the example, or none of the candidates is its head.
    """
    paths = _head_candidates(model)
    if example is None:
        return _split_at(model, paths[0])
    outputs = _whole_outputs(model, example)
    for path in paths:
        member = _split_at(model, path)
        if _reproduces(member, example, outputs):
            _check_training(member, example)
            return member
        model.set_submodule(path, member.head)
    shown = ", ".join(f'"{path}"' for path in paths[:3])
    raise InputError(
        f"--model {_model_name(model)}: calling {shown} by itself after the rest does not give the network's output, "
        "so it is not its classifier head; name the right one in the attribute head_path"
    )


def _head_candidates(model: nn.Module) -> list[str]:
    names_to_modules = dict(model.named_modules())
    names = {module: name for name, module in names_to_modules.items()}
    declared = getattr(model, "head_path", None)
    if declared is not None:
        head = names_to_modules.get(declared)
        if head is None or not any(isinstance(module, nn.Linear) for module in head.modules()):
            raise InputError(f'--model {_model_name(model)}: its head_path "{declared}" leads to no nn.Linear')
        return [declared]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears == [""]:
        raise InputError(f"--model {_model_name(model)} has no nn.Linear inside to take as its classifier head")
    get_classifier = getattr(model, "get_classifier", None)  # timm's
    classifier = get_classifier() if callable(get_classifier) else None
    first = [names[classifier]] if isinstance(classifier, nn.Linear) and classifier in names else []
    return [*dict.fromkeys([*first, *reversed(linears)])]


def _split_at(model: nn.Module, path: str) -> SplitMember:
    head = model.get_submodule(path)
    first = next(module for module in head.modules() if isinstance(module, nn.Linear))
    model.set_submodule(path, nn.Identity())
    return SplitMember(model, head, path, first.in_features)


def _model_name(model: nn.Module) -> str:
    inner = getattr(model, "model", None)
    return type(inner if isinstance(inner, nn.Module) else model).__name__


def _whole_outputs(model: nn.Module, example: Tensor) -> Tensor:
    """Return the logits of the whole classifier in evaluation mode."""
    shape = " x ".join(map(str, example.shape[1:]))
    try:
        with eval_mode(model), torch.no_grad():
            outputs = model(example)
    except Exception as error:  # whatever the network's own code raises
        raise InputError(
            f"--model {_model_name(model)} cannot take images of {shape} ({first_line(error)}); "
            "give another --image-size or --channels"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        kind = f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"--model {_model_name(model)} returns {kind}; peers need logits, one row per image")
    if len(outputs) != len(example):
        raise InputError(
            f"--model {_model_name(model)} returns {len(outputs)} rows for one image of {shape} "
            "(its view or reshape is meant for another size); give another --image-size"
        )
    return outputs


def _reproduces(member: SplitMember, example: Tensor, outputs: Tensor) -> bool:
    """Return whether body and head, one after the other, give the outputs of the whole model."""
    try:
        with eval_mode(member), torch.no_grad():
            features, logits = member(example)
    except Exception:  # this is no head: the network's own code fails on what an identity returns in its place
        return False
    if features.dim() != 2 or logits.shape != outputs.shape:
        return False
    return bool((logits - outputs).abs().max() <= 1e-4 * outputs.abs().max() + 1e-6)


def _check_training(member: SplitMember, example: Tensor) -> None:
    """Raise where the network fails in training mode or returns no tensor; random state and statistics are kept."""
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            frozen_batchnorm_stats(member),
            train_mode(member),
        ):
            features = member.body(example.expand(2, *example.shape[1:]))
    except Exception as error:  # whatever the network's own code raises
        shape = " x ".join(map(str, example.shape[1:]))
        raise InputError(
            f"--model {_model_name(member.body)} cannot train on images of {shape} ({first_line(error)}); "
            "give a larger --image-size"
        ) from error
    if not isinstance(features, Tensor):
        raise InputError(
            f"--model {_model_name(member.body)} returns {type(features).__name__} in training mode; "
            "build it without auxiliary outputs"
        )


def dummy_input(module: nn.Module, in_channels: int, image_size: int) -> Tensor:
    """Return one image for trial runs of `module`, `1 x C x H x W`, the same at every call; no random state is used."""
    parameter = next(module.parameters())
    pixels = torch.linspace(-40.0, 40.0, in_channels * image_size**2).sin()
    return pixels.view(1, in_channels, image_size, image_size).to(parameter)
