"""Devices: which one, its dtypes, waiting for it, its peak of memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from codistill.utils.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


def pick_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes a GPU if there is one.

    Raises:
        InputError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; give --device auto")
    return torch.device(name)


_PROCESS = Path("/proc/self")


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # Linux: the process's peak falls to what it uses now


def peak_megabytes(device: torch.device) -> float | None:
    """Return the peak since `forget_peak`: of a GPU's allocated memory, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak.split()[1]) / 2**10 if peak else None


def _allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU, 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


NO_FLOAT64 = {"mps"}
"""Kinds of devices that have no float64."""


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that sums are kept in: float64, or float32 on a device that has none (Apple's GPUs)."""
    return torch.float32 if torch.device(device).type in NO_FLOAT64 else torch.float64
