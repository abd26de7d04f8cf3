"""codistill: train a better small network without a teacher, by online knowledge distillation among peers.

Names are imported when they are first used, so that `codistill --help` never waits for torch.
"""

from typing import TYPE_CHECKING, Any

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill import losses as losses
    from codistill import methods as methods
    from codistill import metrics as metrics
    from codistill.config import Config as Config
    from codistill.data import ImageSet as ImageSet
    from codistill.deploy import load_predictor as load_predictor
    from codistill.peers import BranchPeers as BranchPeers
    from codistill.peers import NetworkPeers as NetworkPeers
    from codistill.peers import PeerOutputs as PeerOutputs
    from codistill.peers import TwinPeers as TwinPeers
    from codistill.training import load_run as load_run
    from codistill.training import train as train
    from codistill.utils import InputError as InputError
    from codistill.utils import MachineError as MachineError

    __version__: str

_load, __dir__ = lazy_names(
    __name__,
    {
        "config": "Config",
        "data": "ImageSet",
        "deploy": "load_predictor",
        "peers": "BranchPeers NetworkPeers PeerOutputs TwinPeers",
        "training": "load_run train",
        "utils": "InputError MachineError",
    },
    modules=("losses", "methods", "metrics"),
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("codistill")
    return _load(name)


__all__ = [
    "BranchPeers",
    "Config",
    "ImageSet",
    "InputError",
    "MachineError",
    "NetworkPeers",
    "PeerOutputs",
    "TwinPeers",
    "load_predictor",
    "load_run",
    "losses",
    "methods",
    "metrics",
    "train",
]
