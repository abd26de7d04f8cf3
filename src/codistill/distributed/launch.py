"""Joining and leaving the job that torchrun started."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from codistill.config.checks import mesh_shape
from codistill.config.config import Config
from codistill.distributed.heartbeat import Heartbeat, rendezvous
from codistill.distributed.mesh import Mesh, SingleProcess
from codistill.distributed.process_mesh import ProcessMesh
from codistill.utils.errors import InputError

_job: list[Heartbeat] = []  # of this process, once it has joined the job; consecutive runs share it


def init_mesh(config: Config, device: torch.device) -> Mesh:
    """Connect to the other processes of the job; a process that is alone gets a `SingleProcess`.

    Args:
        config: A resolved config.
        device: What `--device` asks for.

    Raises:
        InputError: the mesh does not fit the processes, or torch cannot connect them.
        MachineError: a rank did not come in time.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else 1
    data, peer = mesh_shape(config.mesh)
    if data * peer != world:
        if config.mesh is None:
            raise InputError(
                f"torchrun started {world} processes; say what they share with --mesh data=D,peer=P, D x P = {world}"
            )
        fix = (
            f"start them with torchrun --nproc-per-node {data * peer} -m codistill"
            if world == 1
            else f"give a mesh of {world}, or torchrun --nproc-per-node {data * peer}"
        )
        raise InputError(f"--mesh {config.mesh} takes {data * peer} processes, and there are {world}; {fix}")
    assert config.peers is not None
    if world == 1:
        return SingleProcess(device, config.peers)
    device = local_device(device)
    if not _job:
        _job.append(join_job(backend_for(device), config.collective_timeout))
    return ProcessMesh(
        (data, peer),
        config.peers,
        device,
        _job[-1],
        timeout=config.collective_timeout,
        seed=config.seed,
        sync_bn=config.sync_bn,
    )


def join_job(backend: str, timeout: float) -> Heartbeat:
    """Set up the default process group of the job that torchrun started, and start this rank's heartbeat.

    Args:
        backend: What `backend_for` returns.
        timeout: Seconds to wait for the other ranks.
    """
    wait = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    store = rendezvous(store, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return Heartbeat(store, rank, world)


def backend_for(device: torch.device) -> str:
    """Return the backends for tensors on `device` and on the host.

    Raises:
        InputError: this torch lacks one.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise InputError("--mesh needs a torch built with torch.distributed and gloo; this one has none, run without")
    if device.type == "cpu":
        return "gloo"
    if device.type == "cuda" and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    need = "a torch built with NCCL" if device.type == "cuda" else "CPUs or CUDA GPUs"
    raise InputError(f"--mesh on --device {device.type} needs {need}; give --device cpu")


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: with several GPUs the one of its local rank.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    available, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > available:
        raise InputError(f"--nproc-per-node {wanted}: this machine has {available} GPUs; give as many, or --device cpu")
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local)
    return local


def resume_after_restart(config: Config) -> Config:
    """Return the config with `resume="auto"` where torchrun has restarted the job, else as it is."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return dataclasses.replace(config, resume="auto") if restarted and config.resume is None else config


def shutdown() -> None:
    """Leave the job at its end: stop the heartbeat, wait for the other ranks, destroy the process group."""
    if _job:
        _job.pop().stop()
        dist.barrier()
        dist.destroy_process_group()
