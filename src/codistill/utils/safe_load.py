"""Checks of untrusted files before anything in them is executed, followed or allocated."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from codistill.utils.errors import first_line, out_of_memory
from codistill.utils.files import check_regular

MAX_DEFLATE_RATIO = 1032  # uncompressed bytes per deflated byte, at most


def load_tensors(path: str | Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain values only, onto the CPU.

    Raises:
        OSError: there is no such file, or it cannot be read.
        MemoryError: there is too little memory for it (with some allocators a RuntimeError).
        ValueError: it is damaged or its pickle asks for anything else; the message is a clause without a full stop.
    """
    import torch

    if not check_regular(Path(path)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # it cannot be read now, which says nothing about its content
        raise
    except pickle.UnpicklingError:  # torch's own message suggests to load it without the check
        raise ValueError("it is damaged, or asks for more than tensors and plain values") from None
    except Exception as error:  # a damaged file fails in many ways
        if out_of_memory(error) is not None:
            raise
        raise ValueError(first_line(error).rstrip(".")) from None


def check_npz_sizes(path: Path, names: Iterable[str]) -> None:
    """Check the sizes that arrays of an npz archive claim against the size of the file, without allocating them.

    Raises:
        ValueError: an array claims more than the archive holds; the message is a clause without a full stop.
    """
    import numpy as np

    file_size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        for name in names:
            entry = archive.getinfo(f"{name}.npy")
            limit = entry.compress_size * (1 if entry.compress_type == zipfile.ZIP_STORED else MAX_DEFLATE_RATIO)
            if entry.compress_size > file_size or entry.file_size > limit:
                raise ValueError(f"{name} claims {entry.file_size:,} bytes, more than the file can hold")
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                header = header or np.lib.format.read_array_header_2_0
                shape, _, dtype = header(stream)
                size = dtype.itemsize
                for length in shape:  # Python's integers do not overflow
                    size *= int(length)
                if size + stream.tell() != entry.file_size and not dtype.hasobject:
                    raise ValueError(
                        f"{name} claims the shape {shape} ({size:,} bytes), and the file holds "
                        f"{entry.file_size - stream.tell():,}"
                    )


def find_outside_links(folder: Path) -> Iterator[Path]:
    """Yield the symbolic links under a folder whose target is outside it."""
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                yield Path(path)
