"""A mesh of processes, data x peer."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.distributed.launch import init_mesh as init_mesh
    from codistill.distributed.launch import resume_after_restart as resume_after_restart
    from codistill.distributed.launch import shutdown as shutdown
    from codistill.distributed.mesh import Mesh as Mesh
    from codistill.distributed.mesh import SingleProcess as SingleProcess
    from codistill.distributed.peers import MeshPeers as MeshPeers
    from codistill.distributed.peers import describe_imbalance as describe_imbalance
    from codistill.distributed.process_mesh import ProcessMesh as ProcessMesh
    from codistill.distributed.snapshots import MeshSnapshots as MeshSnapshots
    from codistill.distributed.sync_batchnorm import convert_batchnorm as convert_batchnorm

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "launch": "init_mesh resume_after_restart shutdown",
        "mesh": "Mesh SingleProcess",
        "peers": "MeshPeers describe_imbalance",
        "process_mesh": "ProcessMesh",
        "snapshots": "MeshSnapshots",
        "sync_batchnorm": "convert_batchnorm",
    },
)
