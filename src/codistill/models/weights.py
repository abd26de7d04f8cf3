"""Reading weights from a file and loading them into a network; the classifier may end in other classes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from codistill.utils.errors import InputError, first_line
from codistill.utils.safe_load import load_tensors


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights: .safetensors, or a state dict that torch saved; no code in it is run.

    Raises:
        InputError: the file is missing, damaged or contains no weights.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--weights {path} does not exist; name a .safetensors file or a saved state dict")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = load_tensors(file)
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"--weights {path} cannot be read ({first_line(error)})") from None
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"--weights {path} contains no state dict; save model.state_dict()")
    return state


def load_weights(network: nn.Module, weights: dict[str, Tensor], flag: str) -> nn.Module:
    """Load weights into a network and return it; a last layer with another number of classes keeps its own weights.

    Args:
        network: The network; it is changed.
        weights: A state dict of the same architecture.
        flag: The option that asked for these weights, for messages.

    Raises:
        InputError: a weight other than the classifier's is missing, unknown or of another shape.
    """
    own = network.state_dict()
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
            reason = "the file lacks it" if key in own else "the network has no such weight"
        raise InputError(f"{flag} does not fit the network at {key} ({reason}); name the network that was trained")
    network.load_state_dict({k: v for k, v in weights.items() if k in own and k not in resized}, strict=False)
    return network


def _is_resized_classifier(network: nn.Module, key: str, own: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Return whether `key` belongs to a linear layer that differs in its number of outputs alone: the classifier."""
    if key not in own or key not in weights or own[key].shape == weights[key].shape:
        return False
    layer = network.get_submodule(key.rpartition(".")[0])
    return isinstance(layer, nn.Linear) and own[key].shape[1:] == weights[key].shape[1:]
