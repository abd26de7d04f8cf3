"""The list of all methods."""

from __future__ import annotations

from codistill.config import METHODS, MethodConfig
from codistill.methods.base import Method, PeerInfo
from codistill.methods.cl_ilr import CLILR
from codistill.methods.contrib.codistillation import Codistillation
from codistill.methods.contrib.cosub import Cosub
from codistill.methods.contrib.dlb import DLB
from codistill.methods.contrib.ffsd import FFSD
from codistill.methods.contrib.hssakd import HSSAKD
from codistill.methods.contrib.l_mcl import LMCL
from codistill.methods.contrib.mcl import MCL
from codistill.methods.contrib.okdph import OKDPH
from codistill.methods.contrib.switokd import SwitOKD
from codistill.methods.dml import DML
from codistill.methods.independent import Independent
from codistill.methods.kd import KD
from codistill.methods.kdcl import KDCL
from codistill.methods.okddip import OKDDip
from codistill.methods.one import ONE
from codistill.methods.own_method import build_own_method
from codistill.methods.pcl import PCL
from codistill.peers import Peers

CLASSES: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Independent, KD, DML, CLILR, ONE, OKDDip, PCL, KDCL),
        *(Codistillation, SwitOKD, MCL, DLB, HSSAKD, LMCL, Cosub, OKDPH, FFSD),
    )
}


def build_method(config: MethodConfig, peers: Peers, seed: int = 0) -> Method:
    """Build the method of `config` for these peers.

    Raises:
        InputError: the peers lack something that the method needs, or an own method is not complete.

    >>> from codistill.config import method_config
    >>> from codistill.peers import NetworkPeers
    >>> peers = NetworkPeers("resnet8", num_peers=3, num_classes=10, image_size=8)
    >>> build_method(method_config("okddip"), peers).deployed  # the leader
    2
    """
    info = PeerInfo.of(peers, seed)
    if type(config) is METHODS.get(config.name):
        return CLASSES[config.name].build(config, info)
    return build_own_method(config, info)
