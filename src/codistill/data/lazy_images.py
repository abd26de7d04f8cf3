"""Images that are decoded when they are needed: `LazyImages` is the protocol of image files and of large data sets.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from codistill.utils import InputError

if TYPE_CHECKING:
    from PIL import Image

NUM_PROBED_IMAGES = 256
"""Images whose size and colors are read to choose the size and channels of a set."""
NUM_STATISTICS_IMAGES = 512
"""Images that are decoded to estimate mean and deviation."""
DEFAULT_SIZE = 224
"""Side of the squares that images of unequal sizes become by default, as is usual on ImageNet."""


@dataclass(frozen=True, kw_only=True)
class LazyImages(ABC):
    """Images with a shape and an index like an array's, which are decoded one by one.

    Args:
        size: Side of the square that each becomes (see `fit_square`).
        channels: Channels C that each becomes.
        crop: Whether the square is cut out; otherwise the image is stretched.
    """

    size: int = 0
    channels: int = 3
    crop: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images N."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Self:
        """Return the images at `index`, an index array or a slice."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return the name of image number `index` in messages: its path, or its position in a data set."""

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Decode image number `index`, upright, RGB.

        Raises:
            InputError: it cannot be read.
        """

    @abstractmethod
    def probe(self) -> tuple[list[tuple[int, int]], bool]:
        """Return (width, height) of some of the images, evenly spaced, and whether all are gray."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The array's shape `N x H x W x C`."""
        return len(self), self.size, self.size, self.channels

    def squared(self, image: Image.Image) -> np.ndarray:
        """Return an opened image in the form for evaluation, `H x W x C`, uint8."""
        from codistill.data.decode import as_channels, fit_square

        return as_channels(fit_square(image, self.size, crop=self.crop), self.channels)

    def as_squares(self, size: int, channels: int) -> Self:
        """Return the same images as squares of side `size`."""
        return replace(self, size=size, channels=channels)

    def sample(self) -> np.ndarray:
        """Return some of the images, evenly spaced, `n x H x W x C`; images that cannot be read are skipped.

        Raises:
            InputError: none of them can be read.
        """
        images, error = [], InputError("the data hold no images")
        for index in evenly_spaced(len(self), NUM_STATISTICS_IMAGES):
            try:
                images.append(self.squared(self.open(index)))
            except InputError as unreadable:
                error = unreadable
        if not images:
            raise error
        return np.stack(images)


def common_side(sizes: list[tuple[int, int]]) -> int:
    """Return the side of the squares that images become: their own where all are one square, else `DEFAULT_SIZE`.

    >>> common_side([(32, 32), (32, 32)]), common_side([(32, 32), (48, 32)])
    (32, 224)
    """
    return sizes[0][0] if len({*sizes, *(size[::-1] for size in sizes)}) == 1 else DEFAULT_SIZE


def evenly_spaced(count: int, max_numbers: int) -> list[int]:
    """Return at most `max_numbers` whole numbers from 0 to below `count`, evenly spaced.

    >>> evenly_spaced(10, 3)
    [0, 4, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(count, max_numbers)).astype(int)).tolist() if count else []
