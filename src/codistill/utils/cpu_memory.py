"""Freed memory is kept for the next step, where the C library would hand it back to the system and ask for it anew."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, so that a step's activations find their pages in place; say if it does.

    A training step frees and takes the same gigabyte again and again. glibc gives large blocks back at once, and the
    system clears every page of them anew: a sixth of the step of 4 ResNet-32 (benchmarks/RESULTS.md). The peak of
    memory rises by 6 % at most. It holds for the whole process and cannot be undone; other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def release_kept_memory() -> None:
    """Give the system what is free; training does so at its end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
