"""The images of a torch Dataset that is too large for memory, read when they are needed.

Shapes: N items.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from codistill.data.bit_depth import NUM_DEEP_IMAGES, describe_ranges
from codistill.data.from_python import check_pair, class_index, range_of, to_uint8_hwc
from codistill.data.lazy_images import NUM_PROBED_IMAGES, LazyImages, common_side, evenly_spaced
from codistill.utils import InputError, first_line

NUM_CHECKED_ITEMS = 16
"""Items that are read to compare their labels with the data set's own list, and for the checksum of the set."""


@dataclass(frozen=True)
class DatasetImages(LazyImages):
    """Images of a map-style data set of pairs (image, label).

    Args:
        pairs: The data set; each process that decodes has a copy.
        part: Name of the part in messages: training or test.
        indices: Indices of the items, `N`.
    """

    pairs: Any
    part: str
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Self:
        return replace(self, indices=self.indices[index])

    def path(self, index: int) -> str:
        """Return the name of image number `index` in messages."""
        return f"item {self.indices[index]} of the {self.part} data"

    def open(self, index: int) -> Image.Image:
        """Read image number `index`, RGB.

        Raises:
            InputError: the data set fails, or its item is no pair of image and label.
        """
        pixels = to_uint8_hwc(self.item(index)[0], self.path(index))
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")

    def item(self, index: int) -> Sequence[Any]:
        """Return pair number `index`; raises the errors of `open`."""
        try:
            item = self.pairs[int(self.indices[index])]
        except Exception as error:  # whatever the user's data set raises
            reason = type(error).__name__ + f": {first_line(error)}" * bool(str(error).strip())
            raise InputError(f"{self.path(index)} cannot be read ({reason})") from error
        return check_pair(item, self.path(index))

    def probe(self) -> tuple[list[tuple[int, int]], bool]:
        """Return sizes and whether all are gray, from some of the images; see `LazyImages.probe`.

        Raises:
            InputError: none of them can be read.
        """
        shapes, error, ranges = [], None, []
        for index in evenly_spaced(len(self), NUM_PROBED_IMAGES):
            try:
                image = self.item(index)[0]
                shapes.append(to_uint8_hwc(image, self.path(index)).shape)
                ranges += [range_of(image)] if len(ranges) < NUM_DEEP_IMAGES else []
            except InputError as unreadable:  # reading it again raises an error that names it
                error = unreadable
        if not shapes and error is not None:
            raise error
        for message in describe_ranges(ranges, flag=False):
            warnings.warn(f"the {self.part} data: {message}", stacklevel=3)
        return [(width, height) for height, width, _ in shapes], all(channels == 1 for *_, channels in shapes)


def read_lazily(pairs: Any, part: str, image_size: int | None) -> tuple[DatasetImages, np.ndarray]:
    """Return a data set's images, not yet read, and its labels, `N`, int64.

    Labels are the data set's `targets`, as torchvision's data sets have them, where these agree with a few items that
    are read; otherwise all items are read once.

    Raises:
        InputError: it has no length or no items, or one is no pair of image and label.
    """
    if not (hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__")):
        raise InputError(f"the {part} data are a {type(pairs).__name__}; lazy=True takes a Dataset with a length")
    images = DatasetImages(pairs, part, np.arange(len(pairs)), size=image_size or 0)
    if not len(images):
        raise InputError(f"the {part} data hold no items")

    def read_label(index: int) -> int:
        return class_index(images.item(index)[1], images.path(index))

    targets = _listed_labels(pairs)
    if targets is not None and len(targets) == len(images):
        labels = [class_index(label, images.path(index)) for index, label in enumerate(targets)]
        firsts = np.unique(labels, return_index=True)[1].tolist()  # and one item of every class
        if all(
            read_label(index) == labels[index] for index in {*evenly_spaced(len(images), NUM_CHECKED_ITEMS), *firsts}
        ):
            return images, np.asarray(labels, dtype=np.int64)
    return images, np.asarray([read_label(index) for index in range(len(images))], dtype=np.int64)


def as_common_squares(train: DatasetImages, test: DatasetImages) -> tuple[DatasetImages, DatasetImages]:
    """Return both parts as squares of one size and of one number of channels, chosen by a sample of `train`."""
    sizes, gray = train.probe()
    side, channels = train.size or common_side(sizes), 1 if gray else 3
    return train.as_squares(side, channels), test.as_squares(side, channels)


def checksum(train: DatasetImages, test: DatasetImages, labels: Sequence[np.ndarray]) -> str:
    """Return a checksum of all labels and of some of the images."""
    check = zlib.crc32(np.concatenate(labels).data)
    for images in (train, test):
        for index in evenly_spaced(len(images), NUM_CHECKED_ITEMS):
            with suppress(InputError):
                check = zlib.crc32(images.squared(images.open(index)).tobytes(), check)
    return f"{len(train)}-{len(test)}-{check:08x}"


def _listed_labels(pairs: Any) -> Sequence[Any] | None:
    """Return the labels that a data set lists in `targets`, also for a `Subset`; None where it lists none."""
    if isinstance(pairs, Subset):
        whole = _listed_labels(pairs.dataset)
        return None if whole is None else [whole[index] for index in pairs.indices]
    if isinstance(pairs, ConcatDataset):
        parts = [_listed_labels(part) for part in pairs.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    return None if getattr(pairs, "target_transform", None) is not None else getattr(pairs, "targets", None)
