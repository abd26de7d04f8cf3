"""Failures of the machine, as one sentence with its exit code."""

from __future__ import annotations

_OF_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
_OF_MACHINE = ("not enough memory", "can't allocate memory")


def out_of_memory(error: Exception) -> str | None:
    """Return what had no memory left, the device or the machine; None for any other failure."""
    import torch

    said = str(error) if isinstance(error, RuntimeError) else ""  # not every allocator has an exception of its own
    if isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _OF_DEVICE):
        return "the device"
    return "the machine" if isinstance(error, MemoryError) or any(words in said for words in _OF_MACHINE) else None


def explain(error: Exception) -> tuple[str | None, int]:
    """Return (sentence, exit code) for a failure that is known, (None, 1) for one that is a bug of ours."""
    from codistill.utils.signals import Stopped

    if isinstance(error, Stopped):
        return f"stopped by {error}; the checkpoint is written, continue with {error.mend}", 75
    if (what := out_of_memory(error)) is not None:
        other = ", or use --dtype bfloat16" if what == "the device" else ""
        return f"{what} is out of memory; lower --batch-size or --peers{other}", 1
    if type(error) is RuntimeError and "deterministic implementation" in str(error):
        return f"--deterministic: {str(error).split(' does not')[0]} has no such kernel on this device; drop it", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}", 1
    return None, 1
