"""Trains peers in one process and in two, in a loop of one's own, timm's task or Trainer, and compares the weights.

python two_processes.py loop okddip
"""

import os
import sys
import tempfile

import torch
import torch.multiprocessing
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler

from codistill.config import method_config
from codistill.methods import build_method
from codistill.peers import NetworkPeers
from codistill.training import PeerTraining

EPOCHS, ROWS = 2, 8


class Small(nn.Module):
    """A network without BatchNorm, whose statistics are of each process's own rows."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x_BCHW):
        return self.fc(self.conv(x_BCHW).relu().mean((2, 3)))


def train(loop: str, name: str, rank: int, count: int) -> torch.Tensor:
    """Return all weights after four steps on 16 images, half of them in each of two processes."""
    peers = NetworkPeers(Small, 3 if name != "switokd" else 2, num_classes=5, image_size=8, seed=1).double()
    torch.manual_seed(3)
    config = method_config(name)
    if name == "dml":
        config.update = "joint"
    method = build_method(config, peers).double()
    method.needs -= {"views"}  # the batch has one
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=rng, dtype=torch.float64)
    labels = torch.randint(5, (16,), generator=rng)
    if loop == "trainer":
        train_by_trainer(peers, method, images, labels, count)
    elif loop == "timm":
        from codistill.integrations import PeerTask

        task = PeerTask(peers, method, 2, dtype=torch.float64, verbose=False)
        if count > 1:
            task.prepare_distributed()
        optimizer = torch.optim.SGD(task.peer_training.trained_parameters(), lr=0.1)
        task.attach(optimizer)
        train_by_loop(lambda x, y, _: task(x, y)["loss"], optimizer, images, labels, rank, count)
    else:
        training = PeerTraining(peers, method, steps_per_epoch=2)
        module = DistributedDataParallel(training, find_unused_parameters=True) if count > 1 else training
        optimizer = torch.optim.SGD(training.trained_parameters(), lr=0.1)
        training.attach(optimizer)
        train_by_loop(
            lambda x, y, epoch: module(x, y, weight=method.weight_at(epoch))["loss"],
            optimizer, images, labels, rank, count,
        )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in [*peers.parameters(), *method.parameters()]])


def train_by_loop(loss_of, optimizer, images, labels, rank, count):
    """Step on two batches in every epoch, of each on this process's part."""
    for epoch in range(EPOCHS):
        for batch in torch.arange(len(labels)).split(ROWS):
            rows = batch[rank::count]
            optimizer.zero_grad()
            loss_of(images[rows], labels[rows], epoch).backward()
            optimizer.step()


def train_by_trainer(peers, method, images, labels, count):
    """Train by `PeerTrainer`, which splits the batches itself."""
    import transformers

    from codistill.integrations import PeerTrainer

    transformers.logging.set_verbosity_error()

    class InOrder(PeerTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=ROWS // count, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        optimizer = torch.optim.SGD([p for p in [*peers.parameters(), *method.parameters()] if p.requires_grad], lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        InOrder(peers, method, args, train_dataset=rows, optimizers=(optimizer, schedule)).train()


def run(rank: int, loop: str, names: list[str], port: int, alone: list[torch.Tensor]) -> None:
    """Train as one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    distributed.init_process_group("gloo")
    for name, expected in zip(names, alone, strict=True):
        together = train(loop, name, rank, 2)
        print(f"{name}, rank {rank}: {float((together - expected).norm() / expected.norm()):.3g}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    import socket

    loop, *names = sys.argv[1:]
    alone = [train(loop, name, 0, 1) for name in names]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (loop, names, port, alone), 2)
