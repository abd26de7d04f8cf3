"""Joining and leaving the job that torchrun started."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist

from codistill.config.checks import mesh_shape
from codistill.config.config import Config
from codistill.distributed.mesh import _JOB, Mesh
from codistill.utils.errors import InputError


def init_mesh(config: Config, device: torch.device) -> Mesh | None:
    """Meet the other processes of the job; None where there is one process.

    Raises:
        InputError: the mesh does not fit the processes, or torch cannot connect them.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    data, peer = mesh_shape(config.mesh)
    if data * peer != world:
        if config.mesh is None:
            raise InputError(
                f"torchrun started {world} processes; say what they share with --mesh data=D,peer=P, D x P = {world}"
            )
        mend = (
            f"start them with torchrun --nproc-per-node {data * peer} -m codistill"
            if world == 1
            else f"give a mesh of {world}, or torchrun --nproc-per-node {data * peer}"
        )
        raise InputError(f"--mesh {config.mesh} takes {data * peer} processes, and there are {world}; {mend}")
    return Mesh((data, peer), config, own_device(device)) if world > 1 else None


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process: of several GPUs the one of its local rank.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    there, asked = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if asked > there:
        raise InputError(f"--nproc-per-node {asked}: this machine has {there} GPUs; give as many, or --device cpu")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def resume_after_restart(config: Config) -> Config:
    """Return the config with which to go on where torchrun has started the job again: from the last checkpoint."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return dataclasses.replace(config, resume="auto") if again and config.resume is None else config


def leave() -> None:
    """Part from the other processes at the end of the job."""
    if _JOB:
        _JOB.pop().stop()
        dist.barrier()
        dist.destroy_process_group()
