"""Reading pairs of image and label from Python into arrays: of a torch Dataset, or of any iterable.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from codistill.data.bit_depth import NUM_DEEP_IMAGES, PixelRange, describe_ranges, pixel_range
from codistill.data.decode import as_rgb
from codistill.utils import InputError, first_line

_RUN_BY_PROGRAMS = frozenset({"EPS", "WMF"})
"""Formats that Pillow gives to Ghostscript or to Windows."""


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
    ranges = []
    for number, item in enumerate(_iterate(pairs, part)):
        where = f"item {number} of the {part} data"
        image, label = check_pair(item, where)
        ranges += [range_of(image)] if len(ranges) < NUM_DEEP_IMAGES else []
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
    for message in describe_ranges(ranges, flag=False):
        warnings.warn(f"the {part} data: {message}", stacklevel=3)
    if len({image.shape[2] for image in images}) > 1:  # gray and color images
        images = [np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image for image in images]
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def range_of(image: Any) -> PixelRange | None:
    """Return the range of a PIL image of 16 bits; None for other images, and for one that cannot be decoded."""
    with suppress(Exception):  # decoding it for its pixels raises an error that names it
        return pixel_range(image) if isinstance(image, Image.Image) and image.format not in _RUN_BY_PROGRAMS else None
    return None


def _iterate(pairs: Any, part: str) -> Iterator[Any]:
    """Iterate over a data set by its length (not every one raises IndexError at its end), or over an iterable."""
    if hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__") and not isinstance(pairs, IterableDataset):
        return (_read_item(pairs, index, part) for index in range(len(pairs)))
    if isinstance(pairs, Iterable):
        return iter(pairs)
    raise InputError(f"the {part} data are a {type(pairs).__name__}; give a Dataset or an iterable of (image, label)")


def _read_item(pairs: Any, index: int, part: str) -> Any:
    """Return an item of a data set; whatever it raises becomes an `InputError` with the item's number."""
    try:
        return pairs[index]
    except Exception as error:
        reason = type(error).__name__ + f": {first_line(error)}" * bool(str(error).strip())
        raise InputError(f"item {index} of the {part} data cannot be read ({reason})") from error


def check_pair(item: Any, where: str) -> Sequence[Any]:
    """Return an item, or raise InputError where it is not one."""
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        raise InputError(f"{where} is a {type(item).__name__}, not a pair (image, label)")
    return item


def to_uint8_hwc(image: Any, where: str) -> np.ndarray:
    """Return an image as `H x W x C`, uint8, or raise InputError."""
    if isinstance(image, Image.Image):
        if image.format in _RUN_BY_PROGRAMS:
            raise InputError(
                f"{where} is an image of the format {image.format}, which a program would draw; convert it"
            )
        try:
            rgb, gray = as_rgb(image, where)
        except InputError:
            raise
        except Exception as error:  # a file that PIL decodes only now may be damaged in any way
            raise InputError(f"{where} cannot be read as an image ({first_line(error)})") from None
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


def listed_classes(pairs: Any) -> tuple[str, ...] | None:
    """Return the class names that a data set lists, also through `Subset` and `ConcatDataset`; None if it lists none.

    They are its `classes` (a sequence, or a mapping from or to numbers), or else its `class_to_idx`, as torchvision's
    data sets have them.

    Raises:
        InputError: the parts of a `ConcatDataset` list different classes.
    """
    if isinstance(pairs, Subset):
        return listed_classes(pairs.dataset)
    if isinstance(pairs, ConcatDataset):
        listed = {listed_classes(part) for part in pairs.datasets}
        if len(listed) > 1:
            raise InputError("the data sets of a ConcatDataset number their classes differently; give equal ones")
        return listed.pop()
    for listed in (getattr(pairs, "classes", None), getattr(pairs, "class_to_idx", None)):
        if isinstance(listed, Mapping):
            names = {number: name for name, number in listed.items()} if 0 not in listed else listed
            listed = [names[number] for number in range(len(names))] if {*names} == {*range(len(names))} else None
        if isinstance(listed, np.ndarray | Tensor):
            listed = listed.tolist()
        if isinstance(listed, Sequence) and not isinstance(listed, str) and listed:
            return tuple(unicodedata.normalize("NFC", str(name)) for name in listed)
    return None


def _numbers_its_own_way(pairs: Any) -> bool:
    """Return whether a data set changes its labels after they were numbered as its classes are listed."""
    if isinstance(pairs, ConcatDataset):
        return any(map(_numbers_its_own_way, pairs.datasets))
    if isinstance(pairs, Subset):
        return _numbers_its_own_way(pairs.dataset)
    return getattr(pairs, "target_transform", None) is not None


def match_labels(
    labels: np.ndarray, test: Any, train: Any, classes: Sequence[str] | None
) -> tuple[np.ndarray, str | None]:
    """Return the test data's labels in the training data's numbers, matched by the class names that both list.

    Where only one of them lists names, or changes its labels (`target_transform`), they are taken as they are, and the
    second value says so.

    Args:
        labels: Labels of the test data.
        test: The test data.
        train: The training data.
        classes: Names that the caller gives; they apply where the training data lists none.

    Raises:
        InputError: the test data lists a class that the training data does not.
    """
    own, listed = listed_classes(train), listed_classes(test)
    known = own or classes
    if (own is None and listed is None) or (known is not None and tuple(known) == listed):
        return labels, None
    if known is None or listed is None or _numbers_its_own_way(test) or _numbers_its_own_way(train):
        which = "training" if known is None else "test"
        why = f"the {which} data lists no class names" if known is None or listed is None else "labels are transformed"
        return labels, f"{why}, so the test data's labels are taken as numbers of the training data's classes"
    unknown = [name for name in listed if name not in known]
    if unknown or len(set(listed)) < len(listed) or len(set(known)) < len(known):
        raise InputError(
            f"the test data has the classes {', '.join(unknown[:3]) or 'of equal names'}, which the training data does "
            "not list, so its labels cannot be matched; give both the same classes"
        )
    if labels.max(initial=0) >= len(listed):
        raise InputError(f"the test data has a label {labels.max()}, but lists {len(listed)} classes")
    return np.array([list(known).index(name) for name in listed], dtype=np.int64)[labels], None


def class_names(given: Sequence[str] | None, pairs: Any, labels: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return the classes' names: as given, as the data set has them, or their numbers.

    Raises:
        InputError: a label is larger than the last class.
    """
    highest = max(int(part.max(initial=0)) for part in labels)
    given = listed_classes(pairs) if given is None else given
    if given is None:
        return tuple(str(number) for number in range(highest + 1))
    if highest >= len(given):
        raise InputError(f"a label is {highest}, but there are {len(given)} classes; labels count from 0")
    return tuple(str(name) for name in given)
