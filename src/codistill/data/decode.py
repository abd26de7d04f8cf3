"""Decoding one image file to uint8 pixels: upright, palettes and transparency resolved, 16 bits scaled to 8.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from codistill.utils import InputError, first_line

GRAY_MODES = {"1", "L", "LA", "I;16", "I;16B", "I;16L", "I", "La"}


def open_upright(file: str | Path) -> tuple[Image.Image, bool]:
    """Return an image as RGB, rotated as its EXIF data says, and whether the file was gray.

    Transparent pixels are blended with white. Sixteen bits per channel are reduced to the upper eight.

    Raises:
        InputError: the file is missing, truncated, no image, or has floating-point pixels, whose range is unknown.
    """
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # Pillow warns about odd EXIF data and large images; both can be read
            image.load()
            return as_rgb(ImageOps.exif_transpose(image), file)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; name image files that are there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image ({first_line(error)}); fix or remove it") from None


def as_rgb(image: Image.Image, file: str | Path) -> tuple[Image.Image, bool]:
    """Return an opened image as RGB and whether it was gray; `file` is its name in messages.

    Raises:
        InputError: the range of its pixels is unknown.
    """
    gray = image.mode in GRAY_MODES
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise InputError(f"{file} has more than 16 bits per pixel; convert it to 8 or 16 bits")
        image = Image.fromarray((values // 256).astype(np.uint8))
    elif image.mode.startswith("F"):
        raise InputError(f"{file} has floating-point pixels, whose range is unknown; convert it to 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), gray


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
    from torchvision.transforms.v2 import functional

    shorter = round(size * 8 / 7)
    return functional.center_crop(functional.resize(image, [shorter]), [size])  # pyrefly: ignore


def as_channels(image: Image.Image, channels: int) -> np.ndarray:
    """Return an RGB image as `H x W x C`, uint8, made gray (ITU-R 601) for one channel."""
    pixels = np.asarray(image.convert("L") if channels == 1 else image)
    return pixels.reshape(*pixels.shape[:2], channels)


def read_pixels(file: str | Path, channels: int, size: int, *, crop: bool = False) -> np.ndarray:
    """Return one file as `C x H x W`, uint8, as a square of `size` pixels (see `fit_square`)."""
    image, _ = open_upright(file)
    return as_channels(fit_square(image, size, crop=crop), channels).transpose(2, 0, 1)
