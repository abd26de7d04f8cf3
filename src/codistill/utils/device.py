"""Devices: choice, dtypes, synchronization, peak memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from codistill.utils.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""The dtype of the parameters for each `--dtype`; bfloat16 is autocast over float32 parameters."""
NO_FLOAT64 = {"mps"}
"""Kinds of devices that have no float64."""
_PROCESS = Path("/proc/self")


def pick_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes a GPU if there is one.

    Raises:
        InputError: this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; give --device auto")
    return torch.device(name)


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype for sums: float64, or float32 on a device that has none (Apple's GPUs)."""
    return torch.float32 if torch.device(device).type in NO_FLOAT64 else torch.float64


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # Linux: sets the process's peak to what it uses now


def peak_megabytes(device: torch.device) -> float | None:
    """Return the peak in MiB since `reset_peak_memory`: of a GPU's tensors, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak.split()[1]) / 2**10 if peak else None


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes that tensors occupy on a CUDA GPU, 0 on other devices."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
