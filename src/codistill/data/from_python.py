"""Reading pairs of image and label from Python into arrays: of a torch Dataset, or of any iterable.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from codistill.data.decode import as_rgb
from codistill.utils.errors import InputError


def read_pairs(pairs: Iterable[Any] | Dataset, part: str, image_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read every pair once and return images `N x H x W x C`, uint8, and labels, int64.

    Args:
        pairs: A map-style data set, or any iterable, of (image, label).
        part: Its name in messages: training or test.
        image_size: Side to stretch the images to; default their own size.

    Raises:
        InputError: an item is no such pair, or images differ in size; the message has its number.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for number, item in enumerate(_iterate(pairs, part)):
        where = f"item {number} of the {part} data"
        image, label = check_pair(item, where)
        pixels = _resize(to_uint8_hwc(image, where), image_size)
        if images and pixels.shape[:2] != images[0].shape[:2]:
            raise InputError(
                f"{where} is {pixels.shape[1]} x {pixels.shape[0]}, others are {images[0].shape[1]} x "
                f"{images[0].shape[0]}; resize them, or give image_size"
            )
        images.append(pixels)
        labels.append(class_index(label, where))
    if not images:
        raise InputError(f"the {part} data hold no items")
    if len({image.shape[2] for image in images}) > 1:  # gray and color images
        images = [np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image for image in images]
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _iterate(pairs: Any, part: str) -> Iterator[Any]:
    """Iterate over a data set by its length (not every one raises IndexError at its end), or over an iterable."""
    if hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__") and not isinstance(pairs, IterableDataset):
        return (pairs[index] for index in range(len(pairs)))
    if isinstance(pairs, Iterable):
        return iter(pairs)
    raise InputError(f"the {part} data are a {type(pairs).__name__}; give a Dataset or an iterable of (image, label)")


def check_pair(item: Any, where: str) -> Sequence[Any]:
    """Return an item, or raise InputError where it is not one."""
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        raise InputError(f"{where} is a {type(item).__name__}, not a pair (image, label)")
    return item


def to_uint8_hwc(image: Any, where: str) -> np.ndarray:
    """Return an image as `H x W x C`, uint8, or raise InputError."""
    if isinstance(image, Image.Image):
        rgb, gray = as_rgb(image, where)
        return np.asarray(rgb)[..., :1] if gray else np.asarray(rgb)
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise InputError(f"{where}: its image is a {type(image).__name__}; give a PIL image, a tensor or an array")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise InputError(
            f"{where}: its image has the shape {tuple(image.shape)}; tensors are C x H x W, arrays H x W x C, with 1 "
            "or 3 channels, or H x W"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.size and array.min() >= 0 and array.max() <= 1):
            raise InputError(
                f"{where}: its image has numbers outside of 0 to 1; give it without normalization, which codistill does"
            )
        return (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{where}: its image is of {array.dtype}; give uint8, or floating-point numbers from 0 to 1")
    return array


def _resize(pixels: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or pixels.shape[:2] == (size, size):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return resized.reshape(size, size, pixels.shape[2])


def class_index(label: Any, where: str) -> int:
    """Return a label as a whole number, or raise InputError."""
    value = label
    if isinstance(label, Tensor | np.ndarray | np.generic) and math.prod(label.shape) == 1:
        value = label.item()
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: its label is {label!r}; give a whole number, the index of a class")
    if value < 0:
        raise InputError(f"{where}: its label is {value}; labels count from 0")
    return value


def class_names(given: Sequence[str] | None, pairs: Any, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return the classes' names: as given, as the data set has them, or their numbers.

    Raises:
        InputError: a label is larger than the last class.
    """
    highest = max(int(part.max(initial=0)) for part in labels)
    listed = getattr(pairs, "classes", None)
    if given is None and isinstance(listed, Sequence) and not isinstance(listed, str):
        given = listed
    if given is None:
        return tuple(str(number) for number in range(highest + 1))
    if highest >= len(given):
        raise InputError(f"a label is {highest}, but there are {len(given)} classes; labels count from 0")
    return tuple(str(name) for name in given)
