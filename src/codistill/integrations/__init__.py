"""Peers in other people's trainers: Lightning, transformers and timm, each with its own extra."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.integrations.lightning_module import PeerModule as PeerModule
    from codistill.integrations.timm_task import PeerTask as PeerTask
    from codistill.integrations.transformers_trainer import PeerTrainer as PeerTrainer

__getattr__, __dir__ = lazy_names(
    __name__,
    {"lightning_module": "PeerModule", "timm_task": "PeerTask", "transformers_trainer": "PeerTrainer"},
)
