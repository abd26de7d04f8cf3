"""Failures of the machine, as one sentence with its exit code."""

from __future__ import annotations


def is_out_of_memory(error: Exception) -> bool:
    """Say whether the device or the machine had no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)  # torch's allocator for the CPU has no exception of its own
    return type(error) is RuntimeError and any(w in said for w in ("not enough memory", "can't allocate memory"))


def explain(error: Exception) -> tuple[str | None, int]:
    """Return (sentence, exit code) for a failure that is known, (None, 1) for one that is a bug of ours."""
    import torch

    from codistill.signals import Stopped

    if isinstance(error, Stopped):
        return f"stopped by {error}; the checkpoint is written, continue with {error.mend}", 75
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; lower --batch-size or --peers, or use --dtype bfloat16", 1
    if is_out_of_memory(error):
        return "the machine is out of memory; lower --batch-size or --peers", 1
    if type(error) is RuntimeError and "deterministic implementation" in str(error):
        return f"--deterministic: {str(error).split(' does not')[0]} has no such kernel on this device; drop it", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}", 1
    return None, 1
