"""Image files of a folder, decoded when they are needed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from PIL import Image

from codistill.data.decode import GRAY_MODES, open_upright, opened
from codistill.data.lazy_images import NUM_PROBED_IMAGES, LazyImages, evenly_spaced
from codistill.utils import InputError


@dataclass(frozen=True)
class ImageFiles(LazyImages):
    """The files of one part of a folder.

    Args:
        root: Folder that holds them.
        names: Their paths in it, as bytes of equal width: a tenth of the memory of as many Python strings.
        bits: Bits that files of 16 bits a pixel use (see `open_upright`).
    """

    root: str
    names: np.ndarray
    bits: int = 16

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Self:
        return replace(self, names=self.names[index])

    def path(self, index: int) -> str:
        """Return the path of file number `index`."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def open(self, index: int) -> Image.Image:
        """Decode file number `index`; see `LazyImages.open`."""
        return open_upright(self.path(index), self.bits)[0]

    def probe(self) -> tuple[list[tuple[int, int]], bool]:
        """Return sizes and whether all are gray, from the headers of some files; see `LazyImages.probe`."""
        sizes, gray = [], True
        for index in evenly_spaced(len(self), NUM_PROBED_IMAGES):
            try:
                with opened(self.path(index)) as image:
                    sizes.append(image.size)
                    gray &= image.mode in GRAY_MODES
            except InputError:
                continue  # decoding it raises an error that names it
        return sizes, gray and bool(sizes)
