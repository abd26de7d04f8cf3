"""What files of strangers may hold: checked before anything in them is run, followed or given room in memory."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DEFLATE_MOST = 1032  # bytes that one deflated byte can stand for


def load_tensors(path: str | Path) -> Any:
    """Read what torch saved: tensors and plain values on the host; whatever else a pickle asks for is refused.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged or holds more than that; the message is half a sentence.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:  # torch's own words advise to load it all the same
        raise ValueError("it is damaged, or asks for more than tensors and plain values") from None
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")) from None


def check_arrays(path: Path, names: Iterable[str]) -> None:
    """Compare what the arrays of an npz archive claim to be with what the file can hold, without opening them.

    Raises:
        ValueError: an array claims more than the archive has; the message is half a sentence.
    """
    import numpy as np

    whole = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        for name in names:
            entry = archive.getinfo(f"{name}.npy")
            most = entry.compress_size * (1 if entry.compress_type == zipfile.ZIP_STORED else DEFLATE_MOST)
            if entry.compress_size > whole or entry.file_size > most:
                raise ValueError(f"{name} claims {entry.file_size:,} bytes, more than the file can hold")
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                header = header or np.lib.format.read_array_header_2_0
                shape, _, dtype = header(stream)
                size = dtype.itemsize
                for length in shape:  # Python's numbers do not overflow
                    size *= int(length)
                if size + stream.tell() != entry.file_size and not dtype.hasobject:
                    raise ValueError(
                        f"{name} claims the shape {shape} ({size:,} bytes), and the file holds "
                        f"{entry.file_size - stream.tell():,}"
                    )


def links_out(folder: Path) -> Iterator[Path]:
    """Yield the symbolic links under a folder that lead out of it; links to what is inside are fine."""
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                yield Path(path)


def deep_links(folder: Path) -> Iterator[Path]:
    """Yield the links to folders that a walk which follows them may never end in: to the top, or below its folders.

    What is left, links at the top to folders inside, unfolds no link a second time: neither loops nor doubling pass.
    """
    root = os.path.realpath(folder)
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if os.path.islink(path) and (Path(place) != folder or os.path.realpath(path) == root):
                yield Path(path)
