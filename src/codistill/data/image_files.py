"""Image files as if they were an array: they have a shape and can be indexed, and are decoded when somebody looks.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from codistill.data.decode import GRAY_MODES, as_channels, fit_square, open_upright
from codistill.utils.errors import InputError

PROBED = 256
"""Headers that are read to learn of what size and colour the files are."""
USUAL_SIZE = 224
"""Side that images of unequal sizes are read at, where nobody says another, as is usual on ImageNet."""
SAMPLED = 512
"""Images that are decoded to estimate mean and deviation."""


@dataclass(frozen=True)
class ImageFiles:
    """The files of one part of a folder.

    Args:
        root: Folder that holds them.
        names: Their paths in it, as bytes of equal width: a tenth of what as many Python strings take.
        size: Side of the square that each becomes (see `fit_square`).
        channels: Channels C that each becomes.
        crop: Whether the square is cut out; otherwise the image is stretched.
    """

    root: str
    names: np.ndarray
    size: int = 0
    channels: int = 3
    crop: bool = True

    @classmethod
    def of(cls, root: Path, files: Sequence[str]) -> ImageFiles:
        """Hold files by their names under `root`."""
        return cls(str(root), np.array([os.fsencode(os.path.relpath(file, root)) for file in files], dtype=np.bytes_))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Self:
        return replace(self, names=self.names[index])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The array's shape `N x H x W x C`."""
        return len(self), self.size, self.size, self.channels

    def path(self, index: int) -> str:
        """Return the path of file number `index`."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def open(self, index: int) -> Image.Image:
        """Decode file number `index`, upright, RGB.

        Raises:
            InputError: it cannot be read.
        """
        return open_upright(self.path(index))[0]

    def squared(self, image: Image.Image) -> np.ndarray:
        """Return an opened image as it is evaluated, `H x W x C`, uint8."""
        return as_channels(fit_square(image, self.size, self.crop), self.channels)

    def as_squares(self, size: int, channels: int) -> Self:
        """Return the files as squares of that side and so many channels."""
        return replace(self, size=size, channels=channels)

    def sample(self) -> np.ndarray:
        """Return some of the images, evenly spread, `n x H x W x C`; files that cannot be read are passed over.

        Raises:
            InputError: none of them can be read.
        """
        images, error = [], InputError(f"{self.root} holds no image files")
        for index in spread(len(self), SAMPLED):
            try:
                images.append(self.squared(self.open(index)))
            except InputError as one:
                error = one
        if not images:
            raise error
        return np.stack(images)

    def probe(self) -> tuple[list[tuple[int, int]], bool]:
        """Return (width, height) of some of the files, evenly spread, by their headers, and whether all are gray."""
        sizes, gray = [], True
        for index in spread(len(self), PROBED):
            try:
                with Image.open(self.path(index)) as image:
                    sizes.append(image.size)
                    gray &= image.mode in GRAY_MODES
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # whoever decodes it says so
        return sizes, gray and bool(sizes)


def side_of(sizes: list[tuple[int, int]]) -> int:
    """Return the side of the squares that images become: their own where all are one square, or the usual one.

    >>> side_of([(32, 32), (32, 32)]), side_of([(32, 32), (48, 32)])
    (32, 224)
    """
    return sizes[0][0] if len({*sizes, *(size[::-1] for size in sizes)}) == 1 else USUAL_SIZE


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` whole numbers from 0 to below `count`, evenly spread.

    >>> spread(10, 3)
    [0, 4, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist() if count else []
