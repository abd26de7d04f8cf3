"""The methods, one file per paper; `CLASSES` lists them."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.methods.base import Method as Method
    from codistill.methods.base import PeerInfo as PeerInfo
    from codistill.methods.base import Terms as Terms
    from codistill.methods.base import combine_terms as combine_terms
    from codistill.methods.base import takes_options as takes_options
    from codistill.methods.cl_ilr import CLILR as CLILR
    from codistill.methods.contrib.codistillation import Codistillation as Codistillation
    from codistill.methods.contrib.cosub import Cosub as Cosub
    from codistill.methods.contrib.dlb import DLB as DLB
    from codistill.methods.contrib.ffsd import FFSD as FFSD
    from codistill.methods.contrib.hssakd import HSSAKD as HSSAKD
    from codistill.methods.contrib.l_mcl import LMCL as LMCL
    from codistill.methods.contrib.mcl import MCL as MCL
    from codistill.methods.contrib.okdph import OKDPH as OKDPH
    from codistill.methods.contrib.switokd import SwitOKD as SwitOKD
    from codistill.methods.divergence import Divergence as Divergence
    from codistill.methods.dml import DML as DML
    from codistill.methods.independent import Independent as Independent
    from codistill.methods.kd import KD as KD
    from codistill.methods.kdcl import KDCL as KDCL
    from codistill.methods.okddip import OKDDip as OKDDip
    from codistill.methods.one import ONE as ONE
    from codistill.methods.pcl import PCL as PCL
    from codistill.methods.registry import CLASSES as CLASSES
    from codistill.methods.registry import build_method as build_method
    from codistill.methods.training_step import TrainingStep as TrainingStep

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "base": "Method PeerInfo Terms combine_terms takes_options",
        "cl_ilr": "CLILR",
        "contrib.codistillation": "Codistillation",
        "contrib.cosub": "Cosub",
        "contrib.dlb": "DLB",
        "contrib.ffsd": "FFSD",
        "contrib.mcl": "MCL",
        "contrib.hssakd": "HSSAKD",
        "contrib.l_mcl": "LMCL",
        "contrib.okdph": "OKDPH",
        "contrib.switokd": "SwitOKD",
        "divergence": "Divergence",
        "dml": "DML",
        "independent": "Independent",
        "kd": "KD",
        "kdcl": "KDCL",
        "okddip": "OKDDip",
        "one": "ONE",
        "pcl": "PCL",
        "registry": "CLASSES build_method",
        "training_step": "TrainingStep",
    },
)
