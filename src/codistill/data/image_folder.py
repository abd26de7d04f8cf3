"""A folder of images, one sub-folder per class.

Small ones are decoded into one uint8 array; of large ones only names and labels are kept, and their files are decoded
in every epoch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from codistill.data.bit_depth import messages_on_bits
from codistill.data.class_balance import balanced_part
from codistill.data.decode import hash_content, open_upright
from codistill.data.folder_listing import Part, list_parts
from codistill.data.image_files import ImageFiles
from codistill.data.image_set import ImageSet, Provenance
from codistill.data.lazy_images import common_side
from codistill.utils import InputError, physical_memory, track

RESIDENT_LIMIT = 2 * 2**30
"""Bytes of decoded images (one per channel and pixel, 3 channels) up to which a folder is kept in memory."""


def load_folder(
    path: Path, image_size: int | None = None, pipeline: str = "auto", *, skip_corrupt: bool = False, bits: int = 16
) -> ImageSet:
    """Load `path/train` and `path/test` (or `path/val`, or both), or one folder that is split 80/20, balanced.

    Where there are three parts, `val` is the validation part; otherwise it is split off the training part. What is left
    out (see `list_parts`) is told in the messages of the set's provenance.

    Args:
        path: The folder.
        image_size: Side that images become; default their own, or 224 for files whose sizes differ.
        pipeline: resident (decode all into memory), files (decode in every epoch), or auto (by `RESIDENT_LIMIT`).
        skip_corrupt: Leave out files that cannot be read (in memory; loaders of files replace them).
        bits: Bits that files of 16 bits a pixel use.

    Raises:
        InputError: the folder is missing or empty, an image cannot be read (it is named), or sizes differ where images
            are kept in memory and no `image_size` is given.
    """
    classes, listed, left_out = list_parts(path)
    listed = {name: replace(part, files=replace(part.files, bits=bits)) for name, part in listed.items()}
    if "all" in listed:
        is_test = balanced_part(listed["all"].labels, 0.2, seed=0)
        train, val, test = listed["all"][~is_test], None, listed["all"][is_test]
    else:
        train = listed["train"]
        val = listed["val"] if len(listed) == 3 else None
        test = listed["test" if "test" in listed else "val"]
    parts = [train, val, test]
    messages = [*left_out.messages(), *messages_on_bits(train.files, bits)]
    sizes, gray = train.files.probe()
    area = image_size**2 if image_size else sum(w * h for w, h in sizes) / max(len(sizes), 1)
    count = sum(len(part.labels) for part in parts if part is not None)
    if pipeline == "files" or (pipeline == "auto" and count * area * 3 > RESIDENT_LIMIT):
        message = f"{count:,} image files are decoded again in every epoch"
        if pipeline == "auto":
            gib = count * area * 3 / 2**30
            message += f": {gib:.1f} GiB are more than the {RESIDENT_LIMIT // 2**30} kept in memory"
        provenance = Provenance(_checksum(parts), (message, *messages))
        fields = _lazy_fields(train, val, test, image_size or common_side(sizes), 1 if gray else 3)
    else:
        _check_memory(count * area * 3, count)
        fields, provenance = _resident_fields(parts, image_size, skip_corrupt=skip_corrupt)
        provenance = replace(provenance, messages=(*provenance.messages, *messages))
        _check_classes(
            f"--data folder:{path}", classes, fields["y_train"][: len(fields["y_train"]) - fields["num_val"]]
        )
    return ImageSet(f"folder:{path}", classes=classes, flip=True, bits=bits, provenance=provenance, **fields)


def _check_memory(num_bytes: float, count: int) -> None:
    """Raise where the decoded images are larger than the memory of this machine."""
    memory = physical_memory()
    if memory is not None and num_bytes > memory:
        raise InputError(
            f"--data folder: {count:,} decoded images take {num_bytes / 2**30:,.1f} GiB, and this machine has "
            f"{memory / 2**30:,.1f}; give --data-pipeline files, or a smaller --image-size"
        )


def _check_classes(flag: str, classes: Sequence[str], labels: np.ndarray) -> None:
    """Raise InputError for a class without training images, all of whose files were left out."""
    missing = np.setdiff1d(np.arange(len(classes)), labels)
    if len(missing):
        raise InputError(
            f"{flag}: no training image of the class {classes[missing[0]]} can be read; fix some, or remove the class"
        )


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
    hashes = np.concatenate([d.hashes for d in decoded[: len(decoded) - 1]])
    paths = [_paths(d.part) for d in decoded]
    file_names = {"training": np.concatenate(paths[: len(paths) - 1]), "test": paths[-1]}
    checksum = _checksum([d.part for d in decoded])
    how = {"content_hashes": hashes, "test_hashes": decoded[-1].hashes, "file_names": file_names}
    return fields, Provenance(checksum, messages, **how)


def _paths(part: Part) -> np.ndarray:
    """Return the paths of a part's files, as bytes of equal width."""
    return np.char.add(os.fsencode(os.path.join(part.files.root, "")), part.files.names)


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
    hashes: np.ndarray
    """Hashes of the files' contents, uint64."""


def _decode(part: Part, image_size: int | None, *, skip_corrupt: bool) -> _Decoded:
    images, kept, all_gray, bad = np.empty((0, 0, 0, 3), dtype=np.uint8), [], True, []
    hashes = np.zeros(len(part.labels), dtype=np.uint64)
    for index in track(range(len(part.labels)), "decoding images"):
        file = part.files.path(index)
        try:
            upright, gray = open_upright(file, part.files.bits)
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
        hashes[len(kept)] = hash_content(file)
        kept.append(index)
    kept_part = part[np.array(kept, dtype=np.int64)]
    return _Decoded(images[: len(kept)], kept_part, all_gray, bad, hashes[: len(kept)])
