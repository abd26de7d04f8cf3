"""Several members that see the same inputs: whole networks, branches on one trunk, or twins."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.peers.averages import MovingAverage as MovingAverage
    from codistill.peers.averages import TailAverage as TailAverage
    from codistill.peers.base import PeerOutputs as PeerOutputs
    from codistill.peers.base import Peers as Peers
    from codistill.peers.base import PreviousOutputs as PreviousOutputs
    from codistill.peers.branch_point_table import branch_point_rows as branch_point_rows
    from codistill.peers.branches import BranchPeers as BranchPeers
    from codistill.peers.ema import MeanTeacher as MeanTeacher
    from codistill.peers.ema import SnapshotTeacher as SnapshotTeacher
    from codistill.peers.ema import copy_where as copy_where
    from codistill.peers.from_config import build_peers as build_peers
    from codistill.peers.hybrid import check_mixable as check_mixable
    from codistill.peers.hybrid import fuse_members as fuse_members
    from codistill.peers.hybrid import hybrid_logits as hybrid_logits
    from codistill.peers.hybrid import hybrid_network as hybrid_network
    from codistill.peers.hybrid import mix_members as mix_members
    from codistill.peers.inputs import Inputs as Inputs
    from codistill.peers.inputs import Views as Views
    from codistill.peers.inputs import call_network as call_network
    from codistill.peers.inputs import device_of as device_of
    from codistill.peers.inputs import map_tensors as map_tensors
    from codistill.peers.maps import MapShape as MapShape
    from codistill.peers.modes import autocast_of as autocast_of
    from codistill.peers.modes import copy_module as copy_module
    from codistill.peers.modes import eval_mode as eval_mode
    from codistill.peers.modes import frozen_batchnorm_stats as frozen_batchnorm_stats
    from codistill.peers.modes import train_mode as train_mode
    from codistill.peers.networks import NetworkPeers as NetworkPeers
    from codistill.peers.shared_trunk import SharedModule as SharedModule
    from codistill.peers.split_head import SplitMember as SplitMember
    from codistill.peers.stacked import MERGED_CHANNELS as MERGED_CHANNELS
    from codistill.peers.stacked import StackedPeers as StackedPeers
    from codistill.peers.twins import TwinPeers as TwinPeers

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "averages": "MovingAverage TailAverage",
        "base": "PeerOutputs Peers PreviousOutputs",
        "branch_point_table": "branch_point_rows",
        "branches": "BranchPeers",
        "ema": "MeanTeacher SnapshotTeacher copy_where",
        "from_config": "build_peers",
        "hybrid": "check_mixable fuse_members hybrid_logits hybrid_network mix_members",
        "inputs": "Inputs Views call_network device_of map_tensors",
        "maps": "MapShape",
        "modes": "autocast_of copy_module eval_mode frozen_batchnorm_stats train_mode",
        "networks": "NetworkPeers",
        "shared_trunk": "SharedModule",
        "split_head": "SplitMember",
        "stacked": "MERGED_CHANNELS StackedPeers",
        "twins": "TwinPeers",
    },
)
