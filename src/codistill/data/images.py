"""One image file -> uint8 pixels, as a person sees it: upright, palettes and transparency resolved, 16 bits scaled.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from codistill.errors import InputError

GRAY_MODES = {"1", "L", "LA", "I;16", "I;16B", "I;16L", "I", "La"}


def open_upright(file: str | Path) -> tuple[Image.Image, bool]:
    """Return an image as RGB, turned as its EXIF data says, and whether the file was gray.

    Transparent places are laid on white. Sixteen bits a channel become the eight that a screen shows.

    Raises:
        InputError: the file is missing, truncated, no image, or holds numbers that have no range (floating point).
    """
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and large images; both are read
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image), file)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; name image files that are there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as an image ({error}); mend or remove it") from None


def _as_rgb(image: Image.Image, file: str | Path) -> tuple[Image.Image, bool]:
    gray = image.mode in GRAY_MODES
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65_535:
            raise InputError(f"{file} has more than 16 bits a pixel; convert it to 8 or 16 bits")
        image = Image.fromarray((values // 256).astype(np.uint8))
    elif image.mode.startswith("F"):
        raise InputError(f"{file} holds floating-point numbers, whose range nobody knows; convert it to 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), gray


def read_pixels(file: str | Path, channels: int, size: int) -> np.ndarray:
    """Return one file as `C x H x W`, uint8, resized to a square."""
    image, _ = open_upright(file)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.convert("L") if channels == 1 else image).reshape(size, size, channels).transpose(2, 0, 1)
