"""codistill: train a better small network without a teacher, by online knowledge distillation among peers.

Names are imported when they are first used, so that `codistill --help` never waits for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BranchPeers": "codistill.peers.branches",
    "NetworkPeers": "codistill.peers.networks",
    "PeerOutputs": "codistill.peers.base",
    "Config": "codistill.config.config",
    "ImageSet": "codistill.data",
    "InputError": "codistill.utils.errors",
    "MachineError": "codistill.utils.errors",
    "train": "codistill.training.loop",
    "load_run": "codistill.training.build",
    "losses": "codistill",
    "methods": "codistill",
    "metrics": "codistill",
}

if TYPE_CHECKING:
    from codistill import losses, methods, metrics
    from codistill.config.config import Config
    from codistill.data import ImageSet
    from codistill.peers.base import PeerOutputs
    from codistill.peers.branches import BranchPeers
    from codistill.peers.networks import NetworkPeers
    from codistill.training.build import load_run
    from codistill.training.loop import train
    from codistill.utils.errors import InputError, MachineError

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'codistill' has no attribute {name!r}")
    home = _HOMES[name]
    if home == "codistill":
        return importlib.import_module(f"{home}.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
