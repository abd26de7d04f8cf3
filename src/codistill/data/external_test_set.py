"""Another set's test images for the evaluation of a run: resized like the run's own, with matched classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codistill.data.content_hashes import count_known, hash_images
from codistill.data.datasets import load_set
from codistill.data.image_set import Pixels
from codistill.utils import InputError


def load_external_test_set(
    name: str, data_dir: str | None, data_info: Mapping[str, Any]
) -> tuple[Pixels, np.ndarray, list[str]]:
    """Return another set's test images (all of a folder without parts), their labels in the run's numbers, and notes.

    Args:
        name: The other set, as `--data` takes it.
        data_dir: Its folder (see `load_set`).
        data_info: The run's data.json.

    Raises:
        InputError: the set cannot be read, or has other classes or another size than the run.
    """
    size, channels = data_info["image_size"], data_info["channels"]
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        from codistill.data.folder_listing import list_judged_part

        part, classes, left_out = list_judged_part(Path(path).expanduser())
        labels, notes = part.labels, left_out.messages()
        fit = {"crop": data_info.get("fit") == "crop", "bits": data_info.get("bits", 16)}
        images: Pixels = replace(part.files, size=size, channels=channels, **fit)
    else:
        other = load_set(name, data_dir).with_channels(channels)
        images, labels, classes, notes = other.x_test, other.y_test, other.classes, []
    if images.shape[1:] != (size, size, channels):
        shape = " x ".join(map(str, images.shape[1:]))
        raise InputError(f"--data {name}: its images are {shape}, and the run takes {size} x {size} x {channels}")
    numbers, note = match_classes(name, classes, tuple(data_info["classes"]))
    return images, numbers[labels], [note] * bool(note) + notes


def count_trained_images(images: Pixels, trained_hashes: np.ndarray) -> int:
    """Return how many of the images were trained on: files of the same content, or arrays of the same pixels.

    Args:
        images: Images to be judged on.
        trained_hashes: The hashes (`hash_images`) of the training images.
    """
    return count_known(hash_images(images), trained_hashes) if len(trained_hashes) else 0


def match_classes(name: str, classes: Sequence[str], known: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return the run's number of each class, and a note.

    Raises:
        InputError: a class is not among the run's.
    """
    note = "" if len(classes) == len(known) else f"{len(classes)} of the run's {len(known)} classes occur"
    classes, known = ([unicodedata.normalize("NFC", c) for c in names] for names in (classes, known))
    unknown = [c for c in classes if c not in known]
    if not unknown:
        return np.array([known.index(c) for c in classes], dtype=np.int64), note
    numbered = all(c == str(n) for n, c in enumerate(classes)) or all(c == str(n) for n, c in enumerate(known))
    if numbered and len(classes) <= len(known) and not name.startswith("folder:"):  # arrays have numbers only
        return np.arange(len(classes), dtype=np.int64), f"{note}{'; ' * bool(note)}classes are matched by their numbers"
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    raise InputError(
        f"--data {name}: the run does not know {', '.join(unknown[:3])}{more}; name the folders as its classes are "
        f"named ({', '.join(known[:5])}{', ...' * (len(known) > 5)})"
    )
