"""Trains peers under Lightning in one process and in two, and prints how far apart the weights are.

python lightning_two_processes.py okddip
"""

import sys

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from two_processes import Small

from codistill.config import method_config
from codistill.integrations import PeerModule
from codistill.methods import build_method
from codistill.peers import NetworkPeers


def train(name: str, devices: int) -> tuple[torch.Tensor, int]:
    """Return all weights after two steps on 16 images, and the rank."""
    peers = NetworkPeers(Small, num_peers=3, num_classes=5, image_size=8, seed=1).double()
    torch.manual_seed(3)
    method = build_method(method_config(name), peers).double()
    if "views" in method.needs:
        method.needs -= {"views"}  # the batch has one
    module = PeerModule(peers, method, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=rng, dtype=torch.float64)
    loader = DataLoader(TensorDataset(images, torch.randint(5, (16,), generator=rng)), batch_size=16 // devices)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return torch.cat([p.detach().flatten() for p in [*peers.parameters(), *method.parameters()]]), trainer.global_rank


if __name__ == "__main__":
    for name in sys.argv[1:]:
        alone, _ = train(name, 1)
        together, rank = train(name, 2)
        print(f"{name}, rank {rank}: {float((together - alone).norm() / alone.norm()):.3g}", flush=True)
