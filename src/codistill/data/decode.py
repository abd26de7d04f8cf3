"""Decoding one image file to uint8 pixels: upright, palettes and transparency resolved, 16 bits scaled to 8.

Every image file that codistill reads goes through `opened`, which says what is accepted (README, Data).
Shapes: H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from codistill.utils import InputError, first_line

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Formats that are read, by Pillow's names, and the endings of their files. A file's content decides on its format."""
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
MAX_PIXELS = 178_956_970
"""Pixels that a file may have: twice Pillow's `MAX_IMAGE_PIXELS`, above which Pillow refuses too."""
MAX_RESIZED_PIXELS = 2**24
"""Pixels of an image between resizing and cropping; a longer one is cropped first."""
GRAY_MODES = {"1", "L", "LA", "I;16", "I;16B", "I;16L", "I", "La"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by the value of its EXIF orientation."""


@contextmanager
def opened(file: str | Path) -> Iterator[Image.Image]:
    """Open a regular file of one of `FORMATS`; what the block raises while it decodes becomes an `InputError` too.

    Raises:
        InputError: the file is missing, no regular file, of another format, damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF data and large images; both can be read
            mode = os.stat(file).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(f"{file} cannot be read as an image (it is no regular file); remove it")
            stream = open(file, "rb", opener=_open_without_waiting)  # noqa: SIM115
            with stream, Image.open(stream, formats=[*FORMATS]) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width:,} x {image.height:,} pixels"
                    raise InputError(
                        f"{file} cannot be read as an image ({size}; the limit is {MAX_PIXELS:,}); fix or remove it"
                    )
                yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; name image files that are there") from None
    except Exception as error:  # whatever a decoder raises, MemoryError included: it is about this file alone
        reason = "its content is none of " + ", ".join(FORMATS)
        if not isinstance(error, Image.UnidentifiedImageError):
            reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{file} cannot be read as an image ({reason}); fix or remove it") from None


def _open_without_waiting(file: str, flags: int) -> int:
    """Open a file; should it have become a FIFO meanwhile, opening it does not wait for a writer."""
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


def open_upright(file: str | Path, bits: int = 16) -> tuple[Image.Image, bool]:
    """Return an image as RGB, rotated as its EXIF data says, and whether the file was gray.

    Transparent pixels are blended with white. Of an animation or of several pages the first image is taken.

    Args:
        file: An image file.
        bits: Bits that files of 16 bits a pixel use; their upper eight are kept.

    Raises:
        InputError: the file cannot be read (see `opened`), or has floating-point pixels, whose range is unknown.
    """
    with opened(file) as image:
        image.load()
        return as_rgb(_turn_upright(image), file, bits)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Return an image rotated as its EXIF data says; the data are not written again, as odd entries could not be."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels are sound, and nothing says how they are turned
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image, file: str | Path, bits: int = 16) -> tuple[Image.Image, bool]:
    """Return an opened image as RGB and whether it was gray; `file` is its name in messages.

    Raises:
        InputError: the range of its pixels is unknown.
    """
    gray = image.mode in GRAY_MODES
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise InputError(f"{file} has more than 16 bits per pixel; convert it to 8 or 16 bits")
        image = Image.fromarray(np.minimum(values >> (bits - 8), 255).astype(np.uint8))
    elif image.mode.startswith("F"):
        raise InputError(f"{file} has floating-point pixels, whose range is unknown; convert it to 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), gray


def hash_content(file: str | Path) -> int:
    """Return 64 bits of the BLAKE2 hash of a regular file's content; 0 where it cannot be read."""
    try:
        with open(file, "rb", opener=_open_without_waiting) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # a device may have no end
                return 0
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8))
    except OSError:
        return 0
    return int.from_bytes(digest.digest(), "little")


def fit_square(image: Image.Image, size: int, *, crop: bool) -> Image.Image:
    """Return an image as a square: stretched, or its shorter side resized and the center cut out.

    An image that already is a square of this size is returned unchanged.

    Args:
        image: Any image.
        size: Side of the square, in pixels.
        crop: Whether to cut: the square is then 7/8 of the shorter side (256 -> 224), as is usual on ImageNet.
    """
    if image.size == (size, size):
        return image
    if not crop:
        return image.resize((size, size), Image.Resampling.BILINEAR)

    shorter, (width, height) = round(size * 8 / 7), image.size
    if shorter * shorter * max(width, height) > MAX_RESIZED_PIXELS * min(width, height):  # a very long one
        half = min(width, height) * size / shorter / 2
        box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    from torchvision.transforms.v2 import functional

    return functional.center_crop(functional.resize(image, [shorter]), [size])  # pyrefly: ignore


def as_channels(image: Image.Image, channels: int) -> np.ndarray:
    """Return an RGB image as `H x W x C`, uint8, made gray (ITU-R 601) for one channel."""
    pixels = np.asarray(image.convert("L") if channels == 1 else image)
    return pixels.reshape(*pixels.shape[:2], channels)


def read_pixels(file: str | Path, channels: int, size: int, *, crop: bool = False, bits: int = 16) -> np.ndarray:
    """Return one file as `C x H x W`, uint8, as a square of `size` pixels (see `fit_square` and `open_upright`)."""
    image, _ = open_upright(file, bits)
    return as_channels(fit_square(image, size, crop=crop), channels).transpose(2, 0, 1)
