"""Reading weights from a file and loading them into a network; the classifier may end in other classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from codistill.utils import InputError, check_regular, first_line, load_tensors

WRAPPER = "_orig_mod."
"""What torch.compile puts into the names of the weights of a compiled module."""


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights: .safetensors, or a state dict that torch saved; no code in it is run.

    Raises:
        InputError: the file is missing, damaged or contains no weights.
    """
    file = Path(path).expanduser()  # config files have no shell
    if not check_regular(file):
        raise InputError(f"--weights {path} does not exist; name a .safetensors file or a saved state dict")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = load_tensors(file)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"--weights {path} cannot be read ({first_line(error)})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if _is_state_dict(state):
        return state
    inside = [key for key, value in state.items() if _is_state_dict(value)] if isinstance(state, dict) else []
    if len(inside) == 1:
        return state[inside[0]]
    several = f" but {len(inside)} ({', '.join(map(str, inside))}); save one of them alone" if inside else ""
    raise InputError(f"--weights {path} contains no state dict{several or '; save model.state_dict()'}")


def _is_state_dict(state: object) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def load_weights(network: nn.Module, weights: dict[str, Tensor], flag: str) -> nn.Module:
    """Load weights into a network and return it; a last layer with another number of classes keeps its own weights.

    Args:
        network: The network; it is changed.
        weights: A state dict of the same architecture.
        flag: The option that asked for these weights, for messages.

    Raises:
        InputError: a weight other than the classifier's is missing, unknown or of another shape.
    """
    outer, network = network, without_wrappers(network)
    own = network.state_dict()
    weights = without_prefix(weights, own)
    resized = {key for key in (*own, *weights) if _is_resized_classifier(network, key, own, weights)}
    unmatched = [key for key in (*own, *weights) if key not in resized and (key not in own or key not in weights)]
    unmatched = [
        k for k in unmatched if not k.startswith(("aux", "AuxLogits")) and not k.endswith("num_batches_tracked")
    ]
    reshaped = [k for k in own if k in weights and k not in resized and own[k].shape != weights[k].shape]
    for key in [*unmatched, *reshaped][:1]:
        if key in own and key in weights:
            reason = f"shapes {tuple(weights[key].shape)} and {tuple(own[key].shape)}"
        else:
            prefixed = next((name for name in weights if name.endswith(f".{key}")), None)
            lacks = "the file lacks it" if prefixed is None else f"the file has {prefixed}"
            reason = lacks if key in own else "the network has no such weight"
        raise InputError(f"{flag} does not fit the network at {key} ({reason}); name the network that was trained")
    network.load_state_dict({k: v for k, v in weights.items() if k in own and k not in resized}, strict=False)
    return outer


def without_wrappers(network: nn.Module) -> nn.Module:
    """Return the network inside torch.compile's and (Distributed)DataParallel's, whose prefixes names would carry."""
    while True:
        if isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        elif isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        else:
            return network


def without_prefix(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of the network, where another program put it into a module of its own.

    `module.` is DataParallel's prefix, `_orig_mod.` torch.compile's; in a Lightning checkpoint it is the attribute that
    holds the network. What has no such prefix (a loss with weights) is left out.

    Args:
        weights: As the file names them.
        own: As the network names them; every name ends one in the file, after the same prefix.
    """
    weights = dict(weights)
    if not any(WRAPPER in name for name in own):
        weights = {name.replace(WRAPPER, ""): value for name, value in weights.items()}
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    if not names or any(name in weights for name in names):
        return weights
    for prefix in (name.removesuffix(names[0]) for name in weights if name.endswith(f".{names[0]}")):
        if all(prefix + name in weights for name in names):
            return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights


def _is_resized_classifier(network: nn.Module, key: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Return whether `key` belongs to a classifier that differs in its number of outputs alone.

    A linear layer is one, and a 1 x 1 convolution that is the network's last layer with weights (SqueezeNet's).
    """
    if key not in own or key not in weights or own[key].shape == weights[key].shape:
        return False
    path = key.rpartition(".")[0]
    layer = network.get_submodule(path)
    if isinstance(layer, nn.Conv2d):
        is_classifier = layer.kernel_size == (1, 1) and path == [*own][-1].rpartition(".")[0]
    else:
        is_classifier = isinstance(layer, nn.Linear)
    return is_classifier and own[key].shape[1:] == weights[key].shape[1:]
