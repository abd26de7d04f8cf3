"""A contact sheet of the worst mistakes: the images that a network got wrong with the highest probability.

Shapes: N images, C classes (of logits) or channels (of pixels), H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from codistill.utils import InputError, on_one_line, write_atomically

if TYPE_CHECKING:
    from PIL import Image

SHOWN_MISTAKES = 24
"""Mistakes on a sheet."""
COLUMNS = 6
TILE, LINE, MARGIN = 144, 15, 8
"""Pixels: side of an image on the sheet, height of a line of text, distance between tiles."""
MAX_LETTERS = 24
"""Of a line of text below an image."""


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly."""

    name: str
    """Its file, or its number in its part of the data set."""
    true: str
    predicted: str
    probability: float
    """Of the predicted class."""
    pixels_HWC: np.ndarray
    """uint8."""


def worst_mistakes(logits_NC: Tensor, labels_N: Tensor, count: int = SHOWN_MISTAKES) -> list[tuple[int, int, float]]:
    """Return (position, predicted class, its probability) of the wrong predictions, the most probable first.

    >>> import torch
    >>> worst_mistakes(torch.tensor([[0.0, 9.0], [2.0, 0.0], [5.0, 0.0]]), torch.tensor([1, 1, 1]), count=1)
    [(2, 0, 0.9933071490757153)]
    """
    probability_N, guess_N = logits_NC.double().softmax(-1).max(-1)
    wrong = (guess_N != labels_N).nonzero().flatten()
    order = wrong[probability_N[wrong].argsort(descending=True, stable=True)][:count]
    return [(int(n), int(guess_N[n]), float(probability_N[n])) for n in order]


def draw_contact_sheet(mistakes: Sequence[Mistake]) -> Image.Image:
    """Return the sheet: each image, enlarged without smoothing, above its name, its class and the wrong one.

    One channel is drawn gray, three in color; of any other number the mean of all channels, in gray.

    >>> pixels = np.zeros((8, 8, 5), dtype=np.uint8)
    >>> draw_contact_sheet([Mistake("a.png", "cat", "dog", 0.9, pixels)]).size
    (160, 205)
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    columns = min(len(mistakes), COLUMNS) or 1
    rows = -(-len(mistakes) // COLUMNS) or 1
    width, height = TILE + MARGIN, TILE + 3 * LINE + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    if not mistakes:
        draw.text((MARGIN, MARGIN), "no mistakes", "black", font)
    for number, mistake in enumerate(mistakes):
        x, y = MARGIN + number % COLUMNS * width, MARGIN + number // COLUMNS * height
        image = Image.fromarray(as_rgb(mistake.pixels_HWC))
        factor = TILE / max(image.size)
        size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
        smooth = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BILINEAR
        sheet.paste(image.resize(size, smooth), (x, y))
        predicted = f"predicted {mistake.predicted}"
        lines = (
            (shorten(mistake.name, keep_end=True), "gray"),
            (shorten(f"true {mistake.true}"), "black"),
            (f"{shorten(predicted, MAX_LETTERS - 6)} {100 * mistake.probability:.0f} %", "#b00000"),
        )
        for row, (text, color) in enumerate(lines):
            draw.text((x, y + TILE + row * LINE), text, color, font)
    return sheet


def as_rgb(pixels_HWC: np.ndarray) -> np.ndarray:
    """Return pixels with three channels; see `draw_contact_sheet`."""
    if pixels_HWC.shape[-1] == 3:
        return pixels_HWC
    gray_HW1 = pixels_HWC.mean(-1, keepdims=True).round().astype(np.uint8)
    return np.repeat(gray_HW1, 3, axis=-1)


def shorten(text: str, letters: int = MAX_LETTERS, *, keep_end: bool = False) -> str:
    """Return text on one line that the font can draw, cut to so many letters.

    >>> shorten("a name that is too long for it", 12), shorten("train/cat/0001.png", 12, keep_end=True)
    ('a name th...', '...0001.png')
    """
    text = on_one_line(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if len(text) <= letters:
        return text
    return "..." + text[-(letters - 3) :].lstrip("/") if keep_end else text[: letters - 3] + "..."


def check_sheet_path(path: Path) -> None:
    """Check that a sheet can have this name.

    Raises:
        InputError: the name does not end in .png, or is a folder's.
    """
    if path.suffix.lower() != ".png" or path.is_dir():
        raise InputError(f"--contact-sheet {path}: give a name of a file that ends in .png")


def write_contact_sheet(path: Path, mistakes: Sequence[Mistake]) -> None:
    """Write the sheet as a PNG file."""
    content = png_bytes(draw_contact_sheet(mistakes))
    write_atomically(path, lambda stream: stream.write(content))


def png_bytes(image: Image.Image, colors: int | None = None) -> bytes:
    """Return an image as PNG; with so many colors only, which takes a fraction of the bytes."""
    stream = io.BytesIO()
    (image if colors is None else image.quantize(colors)).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def collect_mistakes(
    logits_NC: Tensor,
    labels_N: Tensor,
    classes: Sequence[str],
    pixels_of: Callable[[int], np.ndarray],
    name_of: Callable[[int], str],
    count: int = SHOWN_MISTAKES,
) -> list[Mistake]:
    """Return the worst mistakes with their images and names.

    Args:
        logits_NC: The network's outputs.
        labels_N: The true classes.
        classes: Their names.
        pixels_of: Returns the image at a position, `H x W x C`, uint8.
        name_of: Returns its name.
        count: How many at most.
    """
    return [
        Mistake(name_of(n), classes[int(labels_N[n])], classes[guess], probability, pixels_of(n))
        for n, guess, probability in worst_mistakes(logits_NC, labels_N, count)
    ]
