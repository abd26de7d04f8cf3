"""A folder of images, one sub-folder a class, read through torchvision's `ImageFolder` into one uint8 array."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from codistill.config import InputError
from codistill.data.image_set import ImageSet
from codistill.data.images import open_upright
from codistill.data.splits import balanced_part
from codistill.untrusted import links_out


def load_folder(path: Path, image_size: int | None) -> ImageSet:
    """Load `path/train` and `path/test` (or `path/val`), or one folder that is split 80/20, balanced over classes.

    Raises:
        InputError: the folder is missing or empty, an image cannot be read (it is named), or sizes differ and no
            `image_size` is given.
    """
    name = f"folder:{path}"
    if not path.is_dir():
        raise InputError(f"--data {name}: there is no such folder")
    test_dir = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
    if (path / "train").is_dir() and test_dir is not None:
        x_train, y_train, classes, gray = _read(path / "train", image_size)
        x_test, y_test, test_classes, test_gray = _read(test_dir, image_size)
        gray = gray and test_gray
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise InputError(f"--data {name}: train and {test_dir.name} differ in their classes ({', '.join(odd[:5])})")
    elif [part.name for part in path.iterdir() if part.is_dir()] == ["train"]:
        raise InputError(f"--data {name} holds a folder train, but none called test (or val) beside it")
    else:
        images, labels, classes, gray = _read(path, image_size)
        test = balanced_part(labels, 0.2, seed=0)
        x_train, y_train, x_test, y_test = images[~test], labels[~test], images[test], labels[test]
    if gray:
        x_train, x_test = x_train[..., :1], x_test[..., :1]
    return ImageSet(
        name, x_train, y_train, x_test, y_test, tuple(classes), pad=max(1, x_train.shape[1] // 8), flip=True
    )


def refuse_links_out(path: Path) -> None:
    """Raise for a link that leads out of the folder: an archive of strangers could name any file of this machine."""
    link = next(links_out(path), None)
    if link is not None:
        raise InputError(
            f"--data folder: {link} is a link out of {path}; links are followed inside only, so copy the file there"
        )


def _read(path: Path, image_size: int | None) -> tuple[np.ndarray, np.ndarray, list[str], bool]:
    """Return RGB images, labels, the classes' names, and whether all images are gray."""
    from PIL import Image
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except FileNotFoundError as error:
        raise InputError(f"--data folder:{path}: {str(error).splitlines()[0]}") from None
    refuse_links_out(path)
    all_gray, images = True, []
    for file, _ in folder.samples:
        try:
            upright, gray = open_upright(file)
        except InputError as error:
            raise InputError(f"--data folder: {error}") from None
        all_gray &= gray
        if image_size is not None:
            upright = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
        images.append(np.asarray(upright))
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"--data folder: {file} is {images[-1].shape[1]} x {images[-1].shape[0]}, others are "
                f"{images[0].shape[1]} x {images[0].shape[0]}; give --image-size"
            )
    labels = np.asarray([label for _, label in folder.samples], dtype=np.int64)
    return np.stack(images), labels, folder.classes, all_gray
