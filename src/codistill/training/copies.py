"""Copies of the peers that a run keeps beside them: the teachers made of earlier weights, and the average deployed."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from codistill.config import Config
from codistill.data import ImageSet
from codistill.distributed import MeshPeers, MeshSnapshots, convert_batchnorm
from codistill.methods import Method
from codistill.peers import MeanTeacher, MovingAverage, Peers, TailAverage, build_peers
from codistill.training.peer_step import make_mean_teacher
from codistill.utils import DTYPES


def build_ema(config: Config, data: ImageSet, peers: Peers, method: Method, steps_per_epoch: int) -> MeanTeacher | None:
    """Return the mean or snapshot teachers of a method that needs them; on a mesh snapshots of all members."""
    if not (isinstance(peers, MeshPeers) and peers.members_apart and "ema" in method.needs):
        return make_mean_teacher(peers, method, steps_per_epoch)
    source = dataclasses.replace(config, pretrained=False, weights=None)  # their weights are replaced
    with torch.random.fork_rng(devices=[]):
        whole = build_peers(source, len(data.classes), data.channels, data.image_size)
    whole.autocast = peers.local.autocast
    if peers.mesh.sync_bn and peers.mesh.num_data > 1:
        convert_batchnorm(whole, peers.mesh)
    move_to_device(whole, config, peers.mesh.device)
    return MeshSnapshots(peers, whole, method.snapshot_interval(steps_per_epoch))


def build_average(config: Config, peers: Peers, steps_per_epoch: int) -> MeanTeacher | None:
    """Return the average of the weights that the config deploys; None where it deploys something else."""
    if not config.keeps_average:
        return None
    if config.first_averaged_epoch is not None:
        return TailAverage(peers, config.first_averaged_epoch, steps_per_epoch)
    assert config.ema_decay is not None, "the config is not resolved"
    return MovingAverage(peers, config.ema_decay)


def prepare_remote_members(peers: Peers, copies: list[MeanTeacher]) -> None:
    """Let ranks know how many parameters the others train; of averages they exchange the logits alone."""
    if isinstance(peers, MeshPeers):
        peers.count_trained()
    for copy in copies:
        if isinstance(copy.peers, MeshPeers):
            copy.peers.only_logits = True


def move_to_device(module: nn.Module, config: Config, device: torch.device) -> None:
    """Move a module to the device, the dtype and the memory format of a run."""
    module.to(device=device, dtype=DTYPES[config.dtype])
    if config.channels_last:
        module.to(memory_format=torch.channels_last)  # pyrefly: ignore
