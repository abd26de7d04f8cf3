"""A set of images, in memory or in files: training and test part, classes, and how training images are varied.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from codistill.data.class_balance import balanced_part
from codistill.data.from_python import class_names, read_pairs
from codistill.data.image_files import ImageFiles
from codistill.data.lazy_dataset import fields_of, read_lazily
from codistill.utils.errors import InputError

Pixels = np.ndarray | ImageFiles
GIVEN = "python"
"""The kind of a set that was given from Python."""


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, their classes, and how training images are varied."""

    name: str
    x_train: Pixels
    """uint8, `N x H x W x C`, or the files that are decoded to such."""
    y_train: np.ndarray
    """int64, `N`."""
    x_test: Pixels
    y_test: np.ndarray
    classes: tuple[str, ...]
    pad: int = 4
    """Pixels of zero padding for random crops, of images in memory."""
    flip: bool = True
    """Whether left and right may be swapped."""
    mean: tuple[float, ...] = ()
    """Per-channel mean of pixels / 255, for normalising; computed from images in memory if empty."""
    std: tuple[float, ...] = ()
    fit: str = "stretch"
    """How images of another shape become squares: stretch, or crop (see `fit_square`)."""
    own_val: int = 0
    """So many images at the end of the training part are the set's own validation part."""
    listing: str = ""
    """A checksum of the files' names and labels, where the set was read from files."""
    notes: tuple[str, ...] = ()
    """What a user should be told of how it was read."""
    stand_in: str = ""
    """Why the run's own images are not to be had; those here are noise of their shape."""

    def __post_init__(self) -> None:
        if not self.mean and len(self.x_train) and isinstance(self.x_train, np.ndarray):
            self._set(*statistics(self.x_train))

    @classmethod
    def from_dataset(
        cls,
        train: Iterable[Any] | Dataset,
        test: Iterable[Any] | Dataset | None = None,
        *,
        classes: Sequence[str] | None = None,
        image_size: int | None = None,
        flip: bool = True,
        name: str = "given",
        lazy: bool = False,
    ) -> ImageSet:
        """Take (image, label) pairs for `train(config, data=...)`: read into memory, each once, or `lazy`.

        Images are PIL images, uint8 arrays `H x W (x C)` or tensors `C x H x W`, or floating-point ones from 0 to 1:
        not yet normalised, and not yet varied at random, for what is read stays.

        Args:
            train: A map-style data set, or any iterable, of pairs.
            test: The test part; default a fifth of `train`, balanced over classes.
            classes: Their names, in the order of the labels; default the data set's `classes`, or numbers.
            image_size: Side to stretch images to; default as they are.
            flip: Whether left and right may be swapped in training.
            name: What the run calls the set.
            lazy: Read images anew in every epoch, in worker processes (`data_workers`), as image files are: cropped
                to squares of `image_size` (default their own, or 224 where sizes differ). For map-style data sets
                that memory cannot hold; labels are their `targets`, or else all items are read once for them.

        Raises:
            InputError: an item is no such pair, a label has no class, or images differ in size (and are not `lazy`).

        >>> pixels = np.zeros((8, 8), dtype=np.uint8)
        >>> ImageSet.from_dataset([(pixels, 0), (pixels + 9, 1)] * 5, classes=("dark", "light")).x_train.shape
        (8, 8, 8, 1)
        """
        read: Callable[..., tuple[Any, np.ndarray]] = read_lazily if lazy else read_pairs
        x, y = read(train, "training", image_size)
        if test is None:
            held = balanced_part(y, 0.2, seed=0)
            x, y, x_test, y_test = x[~held], y[~held], x[held], y[held]
        else:
            x_test, y_test = read(test, "test", image_size)
        names = class_names(classes, train, (y, y_test))
        more = (
            fields_of(x, x_test, (y, y_test))
            if lazy
            else {"x_train": x, "x_test": x_test, "pad": max(1, x.shape[1] // 8)}
        )
        return cls(f"{GIVEN}:{name}", y_train=y, y_test=y_test, classes=names, flip=flip, **more)

    def _set(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def from_files(self) -> bool:
        """Whether images are read from their files in every epoch, and not kept in memory."""
        return isinstance(self.x_train, ImageFiles)

    @property
    def channels(self) -> int:
        """Channels C of the images."""
        return self.x_train.shape[3]

    @property
    def image_size(self) -> int:
        """Height (and width) of the images."""
        return self.x_train.shape[1]

    def with_channels(self, channels: int) -> ImageSet:
        """Return the set with gray images repeated to 3 channels, or colour made gray (ITU-R 601) for 1."""
        if channels == self.channels:
            return self
        if isinstance(self.x_train, ImageFiles) and isinstance(self.x_test, ImageFiles):
            files = [replace(x, channels=channels) for x in (self.x_train, self.x_test)]
            return replace(self, x_train=files[0], x_test=files[1], mean=(), std=())
        if self.channels == 1:
            parts = [np.repeat(np.asarray(x), channels, axis=-1) for x in (self.x_train, self.x_test)]
            mean, std = self.mean * channels, self.std * channels
        elif self.channels == 3 and channels == 1:
            parts = [
                (x @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
                for x in (self.x_train, self.x_test)
            ]
            mean, std = (), ()
        else:
            raise InputError(f"--channels {channels}: images of {self.channels} channels cannot be made into that")
        return replace(self, x_train=parts[0], x_test=parts[1], mean=mean, std=std)

    def imbalance(self, part: np.ndarray) -> str | None:
        """Say how unequal the classes of a training part are, None where the largest is under twice the smallest."""
        counts = np.bincount(self.y_train[part], minlength=len(self.classes))
        if counts.max() < 2 * max(int(counts.min()), 1):
            return None
        most, least = int(counts.argmax()), int(counts.argmin())
        return (
            f"classes are unequal: {counts[most]:,} training images of {self.classes[most]}, "
            f"{counts[least]:,} of {self.classes[least]}"
        )

    def about(self) -> dict[str, Any]:
        """Return what a user of a trained network must know of its images."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "fit": self.fit,
            "checksum": self.checksum(),
        }

    def checksum(self) -> str:
        """Return what tells this set from another: of files their names and labels, of arrays every number."""
        if self.listing:
            return self.listing
        check = 0
        for numbers in (self.x_train, self.y_train, self.x_test, self.y_test):
            assert isinstance(numbers, np.ndarray)
            check = zlib.crc32(np.ascontiguousarray(numbers).data, check)
        return f"{check:08x}"

    def describe_augmentation(self, augment: bool, cutout: int) -> str:
        """Say in words what happens to training images."""
        parts = ["random resized crop" if self.from_files else f"pad {self.pad} and crop"] * bool(
            augment and (self.pad or self.from_files)
        )
        parts += ["flip"] * bool(augment and self.flip)
        return " + ".join(parts + [f"cutout {cutout}"] * bool(cutout)) or "none"


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of pixels / 255, a channel each, of uint8 images `N x H x W x C`."""
    pixels = images.reshape(-1, images.shape[-1])
    mean = [float(pixels[:, c].mean(dtype=np.float64) / 255) for c in range(pixels.shape[1])]
    std = [float(pixels[:, c].std(dtype=np.float64) / 255) or 1.0 for c in range(pixels.shape[1])]
    return tuple(round(m, 4) for m in mean), tuple(max(round(s, 4), 1e-4) for s in std)
