"""Read mutated image files of every accepted format: each is read, or refused with an `InputError` that names it.

    python benchmarks/odd_images.py --cases 1000

A case flips bits, cuts, repeats, inserts or overwrites bytes of a small sound file of one mode, and is read as training
and predict do. Nothing else may be raised, and no file may take longer than `LIMIT` seconds.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from codistill.data import read_pixels
from codistill.data.decode import FORMATS
from codistill.utils.errors import InputError

LIMIT = 10.0
"""Seconds that a file may take."""
MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F"),
    "BMP": ("RGB", "L", "P", "1"),
    "GIF": ("P", "L"),
    "PPM": ("RGB", "L", "1"),
}


def make_file(kind: str, mode: str, rng: np.random.Generator) -> bytes:
    """Return a sound file of noise, with EXIF data where the format has them."""
    size = int(rng.integers(8, 40))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65_536, (size, size), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = int(rng.integers(1, 9)), "maker"
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    if kind == "TIFF":
        options["compression"] = str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with one to four changes, half of them among the first 64 bytes."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(min(64, len(changed)) if rng.random() < 0.5 else len(changed)))
        end = place + int(rng.integers(1, 9))
        match int(rng.integers(5)):
            case 0:
                changed[place] ^= 1 << int(rng.integers(8))
            case 1:
                changed[place:end] = rng.bytes(end - place)
            case 2:
                changed[place:end] = b"\xff" * (end - place)
            case 3:
                changed[place:place] = changed[place:end]
            case _:
                del changed[max(place, 16) :]
    return bytes(changed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="mutated files of every format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(FORMATS):
            rng = np.random.default_rng((options.seed, number))
            path, seen, slowest, began = Path(folder) / "x.img", Counter[str](), 0.0, time.perf_counter()
            for case in range(options.cases):
                mode = MODES[kind][case % len(MODES[kind])]
                path.write_bytes(mutate(make_file(kind, mode, rng), rng))
                start = time.perf_counter()
                try:
                    read_pixels(path, 3, 32, crop=bool(case % 2))
                    seen["read"] += 1
                except InputError as error:
                    seen["refused"] += 1
                    failed += str(path) not in str(error)
                except Exception as error:  # what must not happen
                    seen[type(error).__name__] += 1
                    failed += 1
                    print(f"{kind}, {mode}, case {case}: {type(error).__name__}: {error}")
                slowest = max(slowest, time.perf_counter() - start)
            failed += slowest > LIMIT
            seconds = time.perf_counter() - began
            print(f"{kind}: {options.cases} files, {dict(seen)}, slowest {slowest:.2f} s, {seconds:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
