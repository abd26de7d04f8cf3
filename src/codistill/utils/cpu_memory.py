"""Keeps freed CPU memory in the process, where glibc would return it to the system and request it again."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, and return whether it does.

    A training step frees and allocates the same gigabyte again and again. glibc returns large blocks at once, and the
    system clears every page of them again: a sixth of the step of 4 ResNet-32 (benchmarks/RESULTS.md). The peak of
    memory rises by 6 % at most. The setting is for the whole process and cannot be undone; it needs Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


def release_kept_memory() -> None:
    """Return free memory to the system; training does so at its end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def physical_memory() -> int | None:
    """Return the bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
