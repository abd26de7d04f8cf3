"""A torch Dataset too large for memory, as if its items were image files: they are read when somebody looks.

Shapes: N items.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from codistill.data.from_python import check_pair, class_index, to_uint8_hwc
from codistill.data.image_files import PROBED, ImageFiles, side_of, spread
from codistill.utils.errors import InputError

TRIED = 16
"""Items that are read to see whether they are what the data set's list of labels says, and to know the set again."""


@dataclass(frozen=True)
class DatasetImages(ImageFiles):
    """Images of a map-style data set of (image, label); `names` are their numbers in it, `root` says which part it is.

    Args:
        pairs: The data set; each process that decodes has a copy.
    """

    pairs: Any = None

    def path(self, index: int) -> str:
        """Return what errors call image number `index`."""
        return f"item {self.names[index]} of the {self.root} data"

    def open(self, index: int) -> Image.Image:
        """Read image number `index`, RGB.

        Raises:
            InputError: the data set fails, or its item is no pair of image and label.
        """
        pixels = to_uint8_hwc(self.item(index)[0], self.path(index))
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")

    def item(self, index: int) -> Sequence[Any]:
        """Return pair number `index`; raises as `open` does."""
        try:
            item = self.pairs[int(self.names[index])]
        except Exception as error:  # whatever somebody's data set raises
            raise InputError(f"{self.path(index)} cannot be read ({type(error).__name__}: {error})") from error
        return check_pair(item, self.path(index))

    def probe(self) -> tuple[list[tuple[int, int]], bool]:
        """Return (width, height) of some of the images, evenly spread, and whether all are gray.

        Raises:
            InputError: none of them can be read.
        """
        shapes, error = [], None
        for index in spread(len(self), PROBED):
            try:
                shapes.append(to_uint8_hwc(self.item(index)[0], self.path(index)).shape)
            except InputError as one:  # whoever reads it again says so
                error = one
        if not shapes and error is not None:
            raise error
        return [(width, height) for height, width, _ in shapes], all(channels == 1 for *_, channels in shapes)


def read_lazily(pairs: Any, part: str, image_size: int | None) -> tuple[DatasetImages, np.ndarray]:
    """Return a data set's images, unread, and its labels, `N`, int64.

    Labels are the data set's `targets` where it has some, as torchvision's have, and they are right for a few items;
    otherwise all items are read once.

    Raises:
        InputError: it has no length or no items, or one is no pair of image and label.
    """
    if not (hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__")):
        raise InputError(f"the {part} data are a {type(pairs).__name__}; lazy=True takes a Dataset with a length")
    files = DatasetImages(part, np.arange(len(pairs)), size=image_size or 0, pairs=pairs)
    if not len(files):
        raise InputError(f"the {part} data hold no items")
    read = lambda index: class_index(files.item(index)[1], files.path(index))  # noqa: E731
    targets = _targets(pairs)
    if targets is not None and len(targets) == len(files):
        labels = [class_index(label, files.path(index)) for index, label in enumerate(targets)]
        firsts = np.unique(labels, return_index=True)[1].tolist()  # one of every class, too
        if all(read(index) == labels[index] for index in {*spread(len(files), TRIED), *firsts}):
            return files, np.asarray(labels, dtype=np.int64)
    return files, np.asarray([read(index) for index in range(len(files))], dtype=np.int64)


def fields_of(train: DatasetImages, test: DatasetImages, labels: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return what an `ImageSet` holds of unread images, as it does of files (see `data.folder`)."""
    sizes, gray = train.probe()
    side, check = train.size or side_of(sizes), zlib.crc32(np.concatenate(labels).data)
    parts = [images.as_squares(side, 1 if gray else 3) for images in (train, test)]
    for images in parts:
        for index in spread(len(images), TRIED):
            with suppress(InputError):
                check = zlib.crc32(images.squared(images.open(index)).tobytes(), check)
    note = f"{len(train) + len(test):,} images are read from the data set anew in every epoch"
    listing = f"{len(train)}-{len(test)}-{check:08x}"
    return {"x_train": parts[0], "x_test": parts[1], "pad": 0, "fit": "crop", "listing": listing, "notes": (note,)}


def _targets(pairs: Any) -> Sequence[Any] | None:
    """Return the labels that a data set lists; of a part of one, its own."""
    if isinstance(pairs, Subset):
        whole = _targets(pairs.dataset)
        return None if whole is None else [whole[index] for index in pairs.indices]
    return None if getattr(pairs, "target_transform", None) is not None else getattr(pairs, "targets", None)
