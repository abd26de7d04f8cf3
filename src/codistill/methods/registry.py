"""The list of all methods."""

from __future__ import annotations

from codistill.config import MethodConfig
from codistill.methods.base import Method, PeerInfo
from codistill.methods.cl_ilr import CLILR
from codistill.methods.contrib.codistillation import Codistillation
from codistill.methods.contrib.switokd import SwitOKD
from codistill.methods.dml import DML
from codistill.methods.independent import Independent
from codistill.methods.kd import KD
from codistill.methods.kdcl import KDCL
from codistill.methods.okddip import OKDDip
from codistill.methods.one import ONE
from codistill.methods.pcl import PCL
from codistill.peers import Peers

CLASSES: dict[str, type[Method]] = {
    method.name: method for method in (Independent, KD, DML, CLILR, ONE, OKDDip, PCL, KDCL, Codistillation, SwitOKD)
}


def build_method(config: MethodConfig, peers: Peers, seed: int = 0) -> Method:
    """Build the method of `config` for these peers.

    Raises:
        InputError: the peers lack something that the method needs.
    """
    return CLASSES[config.name].build(config, PeerInfo.of(peers, seed))
