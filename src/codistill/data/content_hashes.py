"""Hashes by which equal images are recognized: of a file its content, of an image in memory its pixels."""

from __future__ import annotations

import hashlib

import numpy as np

from codistill.data.decode import hash_content
from codistill.data.image_files import ImageFiles
from codistill.data.image_set import GIVEN, ImageSet, Pixels
from codistill.data.lazy_images import evenly_spaced

NUM_COMPARED_FILES = 64
"""Files of each part that are read to see whether processes have the same images."""


def hash_images(images: Pixels) -> np.ndarray:
    """Return 64 bits of the BLAKE2 hash of each image, uint64; 0 where it cannot be read, or is of a lazy data set.

    >>> black = np.zeros((2, 8, 8, 1), dtype=np.uint8)
    >>> len({*hash_images(black).tolist()}), count_known(hash_images(black), hash_images(black + 1))
    (1, 0)
    """
    if isinstance(images, ImageFiles):
        return np.array([hash_content(images.path(index)) for index in range(len(images))], dtype=np.uint64)
    if not isinstance(images, np.ndarray):
        return np.zeros(len(images), dtype=np.uint64)
    digests = (hashlib.blake2b(pixels.tobytes(), digest_size=8).digest() for pixels in images)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def known_hashes(data: ImageSet) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the hashes of the training and of the test images; None where making them means reading files.

    The data sets that codistill loads by their own names have no training images among their test images.
    """
    if data.provenance.content_hashes is not None and data.provenance.test_hashes is not None:
        return data.provenance.content_hashes, data.provenance.test_hashes
    if data.name.partition(":")[0] not in ("npz", GIVEN) or data.provenance.placeholder_reason or data.from_files:
        return None
    return hash_images(data.x_train), hash_images(data.x_test)


def sample_checksum(data: ImageSet) -> str:
    """Return a checksum of the contents of a set's files, of some of them where they are not in memory; '' for arrays.

    `ImageSet.checksum` covers every number of an array, and of files their names alone.
    """
    parts = known_hashes(data) if data.provenance.files_checksum else ()
    if parts is None:
        parts = [hash_images(x[evenly_spaced(len(x), NUM_COMPARED_FILES)]) for x in (data.x_train, data.x_test)]
    return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=8).hexdigest() if parts else ""


def count_known(hashes: np.ndarray, known: np.ndarray) -> int:
    """Return how many of the hashes are among the known ones; 0 stands for an image that could not be read."""
    return int(np.isin(hashes, known[known != 0]).sum()) if len(known) else 0
