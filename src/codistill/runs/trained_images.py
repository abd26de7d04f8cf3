"""trained_images.bin in a run folder: which images were trained on, as 64-bit hashes of their contents, sorted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codistill.utils import InputError, read_file, write_atomically

FILE = "trained_images.bin"


def has_trained_hashes(folder: Path) -> bool:
    """Return whether the hashes are there."""
    return (folder / FILE).exists()


def write_trained_hashes(folder: Path, hashes: np.ndarray) -> None:
    """Write the hashes (uint64); if they are there, check that they are the same.

    Raises:
        InputError: the run was begun on other contents of its files.
    """
    hashes = np.sort(hashes).astype("<u8")
    if not (folder / FILE).exists():
        write_atomically(folder / FILE, lambda stream: stream.write(hashes.tobytes()))
        return
    changed = int((~np.isin(hashes, read_trained_hashes(folder))).sum())
    if changed:
        raise InputError(
            f"--resume: {changed:,} of the {len(hashes):,} training images are not those that the run in {folder} was "
            "begun on (their files have the same names and other contents); put them back, or name another --out"
        )


def read_trained_hashes(folder: Path) -> np.ndarray:
    """Return the hashes, uint64; none where the file is missing or no such file."""
    content = read_file(folder / FILE) or b""
    return np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8").astype(np.uint64)
