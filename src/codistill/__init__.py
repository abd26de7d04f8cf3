"""codistill: train a better small network without a teacher, by online knowledge distillation among peers.

Names are imported when they are first used, so that `codistill --help` never waits for torch.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BranchPeers": "codistill.peers",
    "NetworkPeers": "codistill.peers",
    "PeerOutputs": "codistill.peers",
    "Config": "codistill.config",
    "ImageSet": "codistill.data",
    "InputError": "codistill.config",
    "MachineError": "codistill.config",
    "train": "codistill.train",
    "load_run": "codistill.setup",
    "losses": "codistill",
    "methods": "codistill",
    "metrics": "codistill",
}

if TYPE_CHECKING:
    from codistill import losses, methods, metrics
    from codistill.config import Config, InputError, MachineError
    from codistill.data import ImageSet
    from codistill.peers import BranchPeers, NetworkPeers, PeerOutputs
    from codistill.setup import load_run
    from codistill.train import train

__all__ = [
    "BranchPeers",
    "Config",
    "ImageSet",
    "InputError",
    "MachineError",
    "NetworkPeers",
    "PeerOutputs",
    "load_run",
    "losses",
    "methods",
    "metrics",
    "train",
]


class FunctionModule(ModuleType):
    """A module that is called as its function of the same name: whoever imports it first, `codistill.train` trains."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codistill' has no attribute {name!r}")
    home = _HOMES[name]
    if home == "codistill":
        return importlib.import_module(f"codistill.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # the function `train` stands before the module of the same name
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
