"""A folder of images, one sub-folder a class, listed by torchvision's `ImageFolder`.

Small ones are decoded into one uint8 array; of large ones only names and labels are kept, and their files are read in
every epoch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codistill.data.class_balance import balanced_part
from codistill.data.decode import open_upright
from codistill.data.image_files import ImageFiles, side_of
from codistill.data.image_set import ImageSet
from codistill.utils.errors import InputError
from codistill.utils.safe_load import find_looping_links, find_outside_links

RESIDENT_LIMIT = 2 * 2**30
"""Bytes of decoded images (one a channel and pixel, 3 channels) up to which a folder is kept in memory."""


@dataclass(frozen=True)
class Part:
    """The files of one part, and their labels."""

    files: ImageFiles
    labels: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Part:
        return Part(self.files[index], self.labels[index])


def load_folder(
    path: Path, image_size: int | None = None, pipeline: str = "auto", skip_corrupt: bool = False
) -> ImageSet:
    """Load `path/train` and `path/test` (or `path/val`, or both), or one folder that is split 80/20, balanced.

    Where there are three parts, `val` is what validates; otherwise validation images are split off training.

    Args:
        path: The folder.
        image_size: Side that images become; default their own, or 224 for files whose sizes differ.
        pipeline: resident (decode all into memory), files (decode in every epoch), or auto: by `RESIDENT_LIMIT`.
        skip_corrupt: Leave out files that cannot be read (in memory; loaders of files replace them).

    Raises:
        InputError: the folder is missing or empty, an image cannot be read (it is named), or sizes differ where images
            are kept in memory and no `image_size` is given.
    """
    classes, train, val, test = _parts(path)
    parts = [train, val, test]
    sizes, gray = train.files.probe()
    area = image_size**2 if image_size else sum(w * h for w, h in sizes) / max(len(sizes), 1)
    count = sum(len(part.labels) for part in parts if part is not None)
    if pipeline == "files" or (pipeline == "auto" and count * area * 3 > RESIDENT_LIMIT):
        note = f"{count:,} image files are decoded anew in every epoch"
        if pipeline == "auto":
            note += f": {count * area * 3 / 2**30:.1f} GiB are more than the {RESIDENT_LIMIT // 2**30} kept in memory"
        fields = _as_files(train, val, test, image_size or side_of(sizes), 1 if gray else 3)
        fields |= {"notes": (note,), "listing": _checksum(parts)}
    else:
        fields = _resident(parts, image_size, skip_corrupt)
    return ImageSet(f"folder:{path}", classes=classes, flip=True, **fields)


def refuse_unsafe_links(path: Path) -> None:
    """Raise for a link out of the folder, or one whose following might not end.

    An archive of strangers could name any file of this machine, or hold links that go round in a circle.
    """
    link = next(find_outside_links(path), None)
    if link is not None:
        raise InputError(
            f"--data folder: {link} is a link out of {path}; links are followed inside only, so copy the file there"
        )
    link = next(find_looping_links(path), None)
    if link is not None:
        raise InputError(
            f"--data folder: {link} is a link to a folder, which only a class as a whole may be; copy what it leads to"
        )


def read_whole(path: Path) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
    """Return the files, labels and classes of a folder's test (or val) part, or of all of it where it has no parts."""
    if not path.is_dir():
        raise InputError(f"--data folder:{path}: there is no such folder")
    parts = [path / part for part in ("test", "val") if (path / "train").is_dir() and (path / part).is_dir()]
    part, classes = _list(parts[0] if parts else path)
    return part.files, part.labels, classes


def _parts(path: Path) -> tuple[tuple[str, ...], Part, Part | None, Part]:
    """List the classes and the parts: training, validation where there are three, test."""
    if not path.is_dir():
        raise InputError(f"--data folder:{path}: there is no such folder")
    there = [part for part in ("train", "val", "test") if (path / part).is_dir()]
    if "train" not in there or len(there) == 1:
        _refuse_misnamed(path, there)
        if [part.name for part in path.iterdir() if part.is_dir()] == ["train"]:
            raise InputError(f"--data folder:{path} holds a folder train, but none called test (or val) beside it")
        whole, classes = _list(path)
        test = balanced_part(whole.labels, 0.2, seed=0)
        return classes, whole[~test], None, whole[test]
    listed = {part: _list(path / part) for part in there}
    classes = listed["train"][1]
    for part, (_, names) in listed.items():
        if names != classes:
            odd = ", ".join(sorted(set(classes) ^ set(names))[:5])
            raise InputError(f"--data folder:{path}: train and {part} differ in their classes ({odd})")
    val = listed["val"][0] if len(there) == 3 else None
    return classes, listed["train"][0], val, listed[there[-1]][0]


def _refuse_misnamed(path: Path, parts: Sequence[str]) -> None:
    """Raise where a part of a set stands beside another whose name is none (train and validation, say)."""
    others = [other.name for other in path.iterdir() if other.is_dir()]
    for part in parts:
        beside = next((other for other in others if other != part), None)
        if beside is not None and not any(inner.is_file() for inner in (path / part).iterdir()):
            raise InputError(
                f"--data folder:{path}: {part} holds folders only, so it and {beside} are no classes but parts; call "
                "parts train, val and test"
            )


def _list(path: Path) -> tuple[Part, tuple[str, ...]]:
    """List one part and its classes."""
    from torchvision.datasets import ImageFolder

    refuse_unsafe_links(path)  # first: the listing follows links
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(f"--data folder:{path}: {str(error).splitlines()[0]}") from None
    labels = np.asarray([label for _, label in folder.samples], dtype=np.int64)
    return Part(ImageFiles.of(path, [file for file, _ in folder.samples]), labels), tuple(folder.classes)


def _as_files(train: Part, val: Part | None, test: Part, size: int, channels: int) -> dict[str, Any]:
    """Return what an `ImageSet` holds of files that are decoded in every epoch."""
    own_val = 0 if val is None else len(val.labels)
    if val is not None:  # behind the training part; both lie in one folder, so names begin there
        root = str(Path(train.files.root).parent)
        names = [np.char.add(f"{Path(part.files.root).name}/".encode(), part.files.names) for part in (train, val)]
        train = Part(ImageFiles(root, np.concatenate(names)), np.concatenate([train.labels, val.labels]))
    files = [part.files.as_squares(size, channels) for part in (train, test)]
    arrays = {"x_train": files[0], "y_train": train.labels, "x_test": files[1], "y_test": test.labels}
    return arrays | {"own_val": own_val, "fit": "crop", "pad": 0}


def _checksum(parts: Sequence[Part | None]) -> str:
    """Return what tells this list of files from another."""
    check = 0
    for part in parts:
        if part is not None:
            check = zlib.crc32(b"\0".join(part.files.names.tolist()), zlib.crc32(part.labels.data, check))
    return f"{check:08x}"


def _resident(parts: list[Part | None], image_size: int | None, skip_corrupt: bool) -> dict[str, Any]:
    """Decode all into memory and return what an `ImageSet` holds of it; validation stands behind training."""
    read = [_decode(part, image_size, skip_corrupt) for part in parts if part is not None]
    gray, bad = all(r[2] for r in read), [reason for r in read for reason in r[3]]
    images = [r[0][..., :1] if gray else r[0] for r in read]
    kept = [r[1] for r in read]
    labels = [part.labels for part in kept]
    own_val = len(labels[1]) if len(read) == 3 else 0
    if own_val:
        if images[0].shape[1:] != images[1].shape[1:]:
            shapes = " and ".join(f"{x.shape[2]} x {x.shape[1]}" for x in images[:2])
            raise InputError(f"--data folder: images of train and val are {shapes}; give --image-size")
        images[:2], labels[:2] = [np.concatenate(images[:2])], [np.concatenate(labels[:2])]
    note = f"{len(bad)} image files cannot be read and are left out, as in: {bad[0]}" if bad else ""
    arrays = {"x_train": images[0], "y_train": labels[0], "x_test": images[-1], "y_test": labels[-1]}
    fields = {"own_val": own_val, "pad": max(1, images[0].shape[1] // 8), "notes": (note,) * bool(bad)}
    return arrays | fields | {"listing": _checksum(kept)}  # of what could be read, for splits are drawn over that


def _decode(part: Part, image_size: int | None, skip_corrupt: bool) -> tuple[np.ndarray, Part, bool, list[str]]:
    """Return RGB images, the files that they are, whether all are gray, and why some are left out."""
    images, kept, all_gray, bad = np.empty((0, 0, 0, 3), dtype=np.uint8), [], True, []
    for index in range(len(part.labels)):
        file = part.files.path(index)
        try:
            upright, gray = open_upright(file)
        except InputError as error:
            if skip_corrupt:
                bad.append(str(error).partition("; ")[0])
                continue
            raise InputError(f"--data folder: {error}, or leave such files out with --skip-corrupt") from None
        all_gray &= gray
        if image_size is not None:
            upright = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
        pixels = np.asarray(upright)
        if not kept:  # one array from the start: a list of images would need twice the memory
            images = np.empty((len(part.labels), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise InputError(
                f"--data folder: {file} is {pixels.shape[1]} x {pixels.shape[0]}, others are "
                f"{images.shape[2]} x {images.shape[1]}; give --image-size"
            )
        images[len(kept)] = pixels
        kept.append(index)
    return images[: len(kept)], part[np.array(kept, dtype=np.int64)], all_gray, bad
