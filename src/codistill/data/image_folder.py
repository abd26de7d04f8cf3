"""A folder of images, one sub-folder per class, listed by torchvision's `ImageFolder`.

Small ones are decoded into one uint8 array; of large ones only names and labels are kept, and their files are decoded
in every epoch.
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
from codistill.data.image_files import ImageFiles
from codistill.data.image_set import ImageSet, Provenance
from codistill.data.lazy_images import common_side
from codistill.utils.errors import InputError, first_line
from codistill.utils.safe_load import find_looping_links, find_outside_links

RESIDENT_LIMIT = 2 * 2**30
"""Bytes of decoded images (one per channel and pixel, 3 channels) up to which a folder is kept in memory."""


@dataclass(frozen=True)
class Part:
    """The files of one part, and their labels."""

    files: ImageFiles
    labels: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Part:
        return Part(self.files[index], self.labels[index])


def load_folder(
    path: Path, image_size: int | None = None, pipeline: str = "auto", *, skip_corrupt: bool = False
) -> ImageSet:
    """Load `path/train` and `path/test` (or `path/val`, or both), or one folder that is split 80/20, balanced.

    Where there are three parts, `val` is the validation part; otherwise it is split off the training part.

    Args:
        path: The folder.
        image_size: Side that images become; default their own, or 224 for files whose sizes differ.
        pipeline: resident (decode all into memory), files (decode in every epoch), or auto (by `RESIDENT_LIMIT`).
        skip_corrupt: Leave out files that cannot be read (in memory; loaders of files replace them).

    Raises:
        InputError: the folder is missing or empty, an image cannot be read (it is named), or sizes differ where images
            are kept in memory and no `image_size` is given.
    """
    classes, train, val, test = _list_parts(path)
    parts = [train, val, test]
    sizes, gray = train.files.probe()
    area = image_size**2 if image_size else sum(w * h for w, h in sizes) / max(len(sizes), 1)
    count = sum(len(part.labels) for part in parts if part is not None)
    if pipeline == "files" or (pipeline == "auto" and count * area * 3 > RESIDENT_LIMIT):
        message = f"{count:,} image files are decoded again in every epoch"
        if pipeline == "auto":
            gib = count * area * 3 / 2**30
            message += f": {gib:.1f} GiB are more than the {RESIDENT_LIMIT // 2**30} kept in memory"
        provenance = Provenance(_checksum(parts), (message,))
        fields = _lazy_fields(train, val, test, image_size or common_side(sizes), 1 if gray else 3)
    else:
        fields, provenance = _resident_fields(parts, image_size, skip_corrupt=skip_corrupt)
    return ImageSet(f"folder:{path}", classes=classes, flip=True, provenance=provenance, **fields)


def refuse_unsafe_links(path: Path) -> None:
    """Raise for a link out of the folder, or one that could make a recursive walk loop.

    A downloaded archive could link to any file of this machine, or contain links that form a circle.
    """
    link = next(find_outside_links(path), None)
    if link is not None:
        raise InputError(
            f"--data folder: {link} is a link out of {path}; only links inside are followed, so copy the file there"
        )
    link = next(find_looping_links(path), None)
    if link is not None:
        raise InputError(
            f"--data folder: {link} is a link to a folder, as only the folder of a class may be; copy its target"
        )


def read_whole(path: Path) -> tuple[ImageFiles, np.ndarray, tuple[str, ...]]:
    """Return the files, labels and classes of a folder's test (or val) part, or of all of it where it has no parts."""
    if not path.is_dir():
        raise InputError(f"--data folder:{path}: there is no such folder")
    parts = [path / part for part in ("test", "val") if (path / "train").is_dir() and (path / part).is_dir()]
    part, classes = _list_part(parts[0] if parts else path)
    return part.files, part.labels, classes


def _list_parts(path: Path) -> tuple[tuple[str, ...], Part, Part | None, Part]:
    """List the classes and the parts: training, validation where there are three, test."""
    if not path.is_dir():
        raise InputError(f"--data folder:{path}: there is no such folder")
    names = [part for part in ("train", "val", "test") if (path / part).is_dir()]
    if "train" not in names or len(names) == 1:
        _refuse_misnamed(path, names)
        if [part.name for part in path.iterdir() if part.is_dir()] == ["train"]:
            raise InputError(f"--data folder:{path} has a folder train, but none called test (or val) beside it")
        whole, classes = _list_part(path)
        test = balanced_part(whole.labels, 0.2, seed=0)
        return classes, whole[~test], None, whole[test]
    listed = {part: _list_part(path / part) for part in names}
    classes = listed["train"][1]
    for part, (_, part_classes) in listed.items():
        if part_classes != classes:
            different = ", ".join(sorted(set(classes) ^ set(part_classes))[:5])
            raise InputError(f"--data folder:{path}: train and {part} differ in their classes ({different})")
    val = listed["val"][0] if len(names) == 3 else None
    return classes, listed["train"][0], val, listed[names[-1]][0]


def _refuse_misnamed(path: Path, parts: Sequence[str]) -> None:
    """Raise where a part is beside a folder that seems to be a part of another name (validation, say)."""
    others = [other.name for other in path.iterdir() if other.is_dir()]
    for part in parts:
        beside = next((other for other in others if other != part), None)
        if beside is not None and not any(inner.is_file() for inner in (path / part).iterdir()):
            raise InputError(
                f"--data folder:{path}: {part} contains only folders, so it and {beside} are parts and not classes; "
                "call parts train, val and test"
            )


def _list_part(path: Path) -> tuple[Part, tuple[str, ...]]:
    """List one part and its classes."""
    from torchvision.datasets import ImageFolder

    refuse_unsafe_links(path)  # first: the listing follows links
    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(f"--data folder:{path}: {first_line(error)}") from None
    labels = np.asarray([label for _, label in folder.samples], dtype=np.int64)
    return Part(ImageFiles.from_paths(path, [file for file, _ in folder.samples]), labels), tuple(folder.classes)


def _lazy_fields(train: Part, val: Part | None, test: Part, size: int, channels: int) -> dict[str, Any]:
    """Return fields of an `ImageSet` of files that are decoded in every epoch."""
    num_val = 0 if val is None else len(val.labels)
    if val is not None:  # appended to the training part; names are relative to the folder that contains both
        root = str(Path(train.files.root).parent)
        names = [np.char.add(f"{Path(part.files.root).name}/".encode(), part.files.names) for part in (train, val)]
        train = Part(ImageFiles(root, np.concatenate(names)), np.concatenate([train.labels, val.labels]))
    files = [part.files.as_squares(size, channels) for part in (train, test)]
    arrays = {"x_train": files[0], "y_train": train.labels, "x_test": files[1], "y_test": test.labels}
    return arrays | {"num_val": num_val, "resize_mode": "crop", "pad": 0}


def _checksum(parts: Sequence[Part | None]) -> str:
    """Return a checksum of the files' names and labels."""
    check = 0
    for part in parts:
        if part is not None:
            check = zlib.crc32(b"\0".join(part.files.names.tolist()), zlib.crc32(part.labels.data, check))
    return f"{check:08x}"


def _resident_fields(
    parts: list[Part | None], image_size: int | None, *, skip_corrupt: bool
) -> tuple[dict[str, Any], Provenance]:
    """Decode all into memory; return fields of an `ImageSet`, and its provenance."""
    decoded = [_decode(part, image_size, skip_corrupt=skip_corrupt) for part in parts if part is not None]
    gray, bad = all(d.gray for d in decoded), [reason for d in decoded for reason in d.unreadable]
    images = [d.images[..., :1] if gray else d.images for d in decoded]
    labels = [d.part.labels for d in decoded]
    num_val = len(labels[1]) if len(decoded) == 3 else 0
    if num_val:  # appended to the training part
        if images[0].shape[1:] != images[1].shape[1:]:
            shapes = " and ".join(f"{x.shape[2]} x {x.shape[1]}" for x in images[:2])
            raise InputError(f"--data folder: images of train and val are {shapes}; give --image-size")
        images[:2], labels[:2] = [np.concatenate(images[:2])], [np.concatenate(labels[:2])]
    messages = (f"{len(bad)} image files cannot be read and are left out, such as: {bad[0]}",) if bad else ()
    fields: dict[str, Any] = {"x_train": images[0], "y_train": labels[0], "x_test": images[-1], "y_test": labels[-1]}
    fields |= {"num_val": num_val, "pad": max(1, images[0].shape[1] // 8)}
    # Of the files that could be read: splits are drawn over those.
    return fields, Provenance(_checksum([d.part for d in decoded]), messages)


@dataclass(frozen=True)
class _Decoded:
    """The decoded images of one part."""

    images: np.ndarray
    """uint8, `N x H x W x 3`."""
    part: Part
    """Their files and labels."""
    gray: bool
    """Whether all are gray."""
    unreadable: list[str]
    """Why other files are left out, one message each."""


def _decode(part: Part, image_size: int | None, *, skip_corrupt: bool) -> _Decoded:
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
        if not kept:  # one array from the start; a list of images would need twice the memory
            images = np.empty((len(part.labels), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise InputError(
                f"--data folder: {file} is {pixels.shape[1]} x {pixels.shape[0]}, others are "
                f"{images.shape[2]} x {images.shape[1]}; give --image-size"
            )
        images[len(kept)] = pixels
        kept.append(index)
    return _Decoded(images[: len(kept)], part[np.array(kept, dtype=np.int64)], all_gray, bad)
