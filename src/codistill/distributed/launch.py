"""Joining and leaving the job that torchrun started."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import Store

from codistill.config import Config, mesh_shape
from codistill.distributed.heartbeat import Heartbeat, rendezvous
from codistill.distributed.mesh import Mesh, SingleProcess, Value
from codistill.distributed.process_mesh import ProcessMesh
from codistill.utils import InputError, MachineError, OtherRankFailedError, environment_number, first_line

MAY_DIFFER = frozenset({"out", "resume", "data_dir", "device", "data_workers", "tracker"})
"""Options that each rank may have for itself; the main rank's folder counts."""
SECONDS_OF_GRACE = 2.0
"""Time that torch has to say itself why the ranks did not meet."""
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
    world = environment_number("WORLD_SIZE", 1, 1) if launched else 1
    if launched and environment_number("RANK", 0) >= world:
        raise InputError(
            f"the environment variable RANK is {os.environ['RANK']}, of WORLD_SIZE {world}; start with torchrun"
        )
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
    _check_ranks_agree(config, _job[-1])
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

    Raises:
        InputError: the environment lacks where the ranks meet.
        MachineError: the ranks do not meet in time.
    """
    wait = timedelta(seconds=timeout)

    def meet() -> tuple[Store, int, int]:
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        return rendezvous(store, rank, world, timeout), rank, world

    try:
        store, rank, world = _wait_for(meet, timeout + SECONDS_OF_GRACE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    except ValueError as error:
        raise InputError(f"the ranks cannot meet ({first_line(error)}); start them with torchrun") from None
    except RuntimeError as error:
        if isinstance(error, MachineError):
            raise
        raise MachineError(
            f"the ranks did not meet within {timeout:g} seconds ({first_line(error)}); start as many as WORLD_SIZE "
            "says, each with a RANK of its own, and give torchrun another --master-port if this one is in use"
        ) from None
    return Heartbeat(store, rank, world, timeout)


def _wait_for(function: Callable[[], Value], seconds: float) -> Value:
    """Return what a function returns, or raise what it raises.

    It runs in a thread of its own: torch tries an address that does not answer for more than its timeout, waits for
    ever where another program holds the port, and handles no signal meanwhile.

    Raises:
        RuntimeError: it takes longer than `seconds`.
    """
    ended: list[tuple[Value | None, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((function(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RuntimeError(f"no rank 0 answers at {address}")
    value, error = ended[0]
    if error is not None:
        raise error
    return cast(Value, value)


def _check_ranks_agree(config: Config, heartbeat: Heartbeat) -> None:
    """Compare the options and versions of all ranks before they divide up the work.

    Raises:
        InputError: a rank was given other options than the first one, or runs another version.
        OtherRankFailedError: the same, on all ranks but the first.
    """
    own = {f"--{k.replace('_', '-')}": v for k, v in config.to_dict().items() if k not in MAY_DIFFER}
    own |= {"the version of codistill": version("codistill"), "the version of torch": torch.__version__}
    gathered: list[Any] = [None] * heartbeat.world
    try:
        dist.all_gather_object(gathered, own)
    except RuntimeError as error:
        raise heartbeat.diagnose(first_line(error)) from None
    first = gathered[0]
    for rank, other in enumerate(gathered):
        name = next((key for key in first | other if first.get(key) != other.get(key)), None)
        if name is None:
            continue
        shutdown()  # all ranks have found it: none may end while another still uses the store
        if heartbeat.rank:
            raise OtherRankFailedError(2)
        name, values = _describe_difference(name, first.get(name), other.get(name))
        raise InputError(f"{name} is {values[0]} on rank 0 and {values[1]} on rank {rank}; give all the same")


def _describe_difference(name: str, first: Any, other: Any) -> tuple[str, tuple[Any, Any]]:
    """Return what differs, and its two values; of a method that is the option."""
    if isinstance(first, dict) and isinstance(other, dict):
        key = next(key for key in first | other if first.get(key) != other.get(key))
        option = "method" if key == "name" else f"method.{key.replace('_', '-')}"
        return f"--{option}", (first.get(key), other.get(key))
    return name, (first, other)


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
    available, wanted = torch.cuda.device_count(), environment_number("LOCAL_WORLD_SIZE", 1, 1)
    if wanted > available:
        raise InputError(f"--nproc-per-node {wanted}: this machine has {available} GPUs; give as many, or --device cpu")
    local = torch.device("cuda", environment_number("LOCAL_RANK", 0))
    torch.cuda.set_device(local)
    return local


def resume_after_restart(config: Config) -> Config:
    """Return the config with `resume="auto"` where torchrun has restarted the job, else as it is."""
    restarted = environment_number("TORCHELASTIC_RESTART_COUNT", 0) > 0
    return dataclasses.replace(config, resume="auto") if restarted and config.resume is None else config


def shutdown() -> None:
    """Leave the job at its end: stop the heartbeat, wait for the other ranks, destroy the process group."""
    if _job:
        _job.pop().stop()
        dist.barrier()
        dist.destroy_process_group()
