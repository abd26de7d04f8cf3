"""The methods, one file a paper. `CLASSES` is the one place where a method is entered."""

from __future__ import annotations

from codistill.config.methods import MethodConfig
from codistill.methods.base import Method, PeerInfo, Terms
from codistill.methods.cl_ilr import CLILR
from codistill.methods.dml import DML
from codistill.methods.independent import Independent
from codistill.methods.kd import KD
from codistill.methods.kdcl import KDCL
from codistill.methods.okddip import OKDDip
from codistill.methods.one import ONE
from codistill.methods.pcl import PCL
from codistill.peers.base import Peers

CLASSES: dict[str, type[Method]] = {
    "independent": Independent,
    "kd": KD,
    "dml": DML,
    "cl_ilr": CLILR,
    "one": ONE,
    "okddip": OKDDip,
    "pcl": PCL,
    "kdcl": KDCL,
}


def build_method(config: MethodConfig, peers: Peers, seed: int = 0) -> Method:
    """Build the method of `config` for these peers.

    Raises:
        InputError: the peers lack something that the method needs.
    """
    return CLASSES[config.name].build(config, PeerInfo.of(peers, seed))


__all__ = [
    "CLASSES",
    "CLILR",
    "DML",
    "KD",
    "KDCL",
    "ONE",
    "PCL",
    "Independent",
    "Method",
    "OKDDip",
    "PeerInfo",
    "Terms",
    "build_method",
]
