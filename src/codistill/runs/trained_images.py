"""trained_images.bin in a run folder: which image files were trained on, as 64-bit hashes of their contents, sorted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codistill.utils import write_atomically

FILE = "trained_images.bin"


def write_trained_hashes(folder: Path, hashes: np.ndarray) -> None:
    """Write the hashes (uint64), if they are not there."""
    if not (folder / FILE).exists():
        content = np.sort(hashes).astype("<u8").tobytes()
        write_atomically(folder / FILE, lambda stream: stream.write(content))


def read_trained_hashes(folder: Path) -> np.ndarray:
    """Return the hashes, uint64; none where the file is missing or no such file."""
    path = folder / FILE
    content = path.read_bytes() if path.is_file() else b""
    return np.frombuffer(content[: len(content) // 8 * 8], dtype="<u8").astype(np.uint64)
