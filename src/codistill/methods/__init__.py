"""The methods, one file a paper. `CLASSES` is the one place where a method is entered."""

from __future__ import annotations

from codistill.config import MethodConfig
from codistill.methods.base import Method, PeerInfo, Terms
from codistill.methods.independent import Independent
from codistill.methods.okddip import OKDDip
from codistill.peers import Peers

CLASSES: dict[str, type[Method]] = {
    "independent": Independent,
    "okddip": OKDDip,
}


def build_method(config: MethodConfig, peers: Peers, seed: int = 0) -> Method:
    """Build the method of `config` for these peers.

    Raises:
        InputError: the peers lack something that the method needs.
    """
    return CLASSES[config.name].build(config, PeerInfo.of(peers, seed))


__all__ = ["CLASSES", "Independent", "Method", "OKDDip", "PeerInfo", "Terms", "build_method"]
