"""Files of 16 bits a channel that use a small part of their range, as cameras and microscopes of 10 to 14 bits do.

Pixels are read by their upper eight bits, so that such images would be nearly of one color.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codistill.data.decode import opened
from codistill.data.image_files import ImageFiles
from codistill.data.lazy_images import evenly_spaced
from codistill.utils import InputError

NUM_DEEP_IMAGES = 16
"""Files that are decoded to find out which range files of 16 bits use."""


@dataclass(frozen=True)
class PixelRange:
    """Values of the pixels of one image of 16 bits a channel; one pixel in a hundred lies below low, one above high."""

    low: int
    high: int
    largest: int
    is_color: bool = False
    """Whether it is of three channels; those are read as 8 bits, in which these values are."""


def pixel_range(image: Image.Image) -> PixelRange | None:
    """Return the range of an opened image of 16 bits a channel; None for other images."""
    is_color = image.mode.startswith("RGB") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if not (is_color or image.mode.startswith("I")):
        return None
    values = np.asarray(image)
    low, high = (int(value) for value in np.quantile(values, (0.01, 0.99), method="nearest"))
    return PixelRange(low, high, int(values.max()), is_color)


def _read_range(file: str | Path) -> PixelRange | None:
    try:
        with opened(file) as image:
            return pixel_range(image)
    except InputError:  # decoding it again raises an error that names it
        return None


def messages_on_bits(files: ImageFiles, bits: int) -> list[str]:
    """Return a message where most files of 16 bits use a small part of their range.

    Args:
        files: The training part's files, some of which are decoded.
        bits: The value of --bits.
    """
    return describe_ranges(
        [_read_range(files.path(index)) for index in evenly_spaced(len(files), NUM_DEEP_IMAGES)], bits
    )


def describe_ranges(ranges: list[Any], bits: int = 16, flag: bool = True) -> list[str]:
    """Return a message on the ranges of some images, of which None is left out; see `messages_on_bits`.

    Args:
        ranges: What `pixel_range` returned.
        bits: Bits that are read.
        flag: Whether --bits can be given.

    >>> describe_ranges([PixelRange(90, 900, 950)])
    ['files of 16 bits a pixel use values up to 950 only, of 65,535, so the upper 8 bits hardly differ; --bits 10 ...']
    """
    known = [found for found in ranges if found is not None]
    if not known:
        return []
    typical = sorted(found.high for found in known)[len(known) // 2]
    largest = max(found.largest for found in known)
    if any(found.is_color for found in known):
        what = (
            f"color files of 16 bits a channel are read by their upper 8 bits, of which most use values up to {typical}"
        )
        return [f"{what} only, of 255; stretch them to the full range"] if typical < 64 else []
    if typical < 2 ** (bits - 2):
        few_are_brighter = largest >= 2 ** (bits - 2)
        used = typical if few_are_brighter else largest
        what = "most pixels of files of 16 bits are" if few_are_brighter else "files of 16 bits a pixel use values"
        white = " (brighter pixels become white)" if few_are_brighter else ""
        fix = (
            f"--bits {max(used.bit_length(), 8)} reads that range{white}" if flag else "stretch them to 0 to 255, uint8"
        )
        return [f"{what} up to {used:,} only, of {2**bits - 1:,}, so the upper 8 bits hardly differ; {fix}"]
    low, high = min(found.low for found in known), max(found.high for found in known)
    if (high - low) >> (bits - 8) > 2:
        return []
    return [
        f"files of 16 bits a pixel use values from {low:,} to {high:,} only, so the upper 8 bits hardly "
        "differ; stretch them to the full range"
    ]
