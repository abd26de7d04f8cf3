"""A set of images, in memory or in files: training and test part, classes, augmentation, and where it comes from.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from codistill.data.class_balance import balanced_part
from codistill.data.from_python import class_names, match_labels, read_pairs
from codistill.data.lazy_dataset import as_common_squares, checksum, read_lazily
from codistill.data.lazy_images import LazyImages
from codistill.utils import InputError

Pixels = np.ndarray | LazyImages
GIVEN = "python"
"""The kind of a set that was given from Python."""


@dataclass(frozen=True)
class Provenance:
    """Where the images of a set come from."""

    files_checksum: str = ""
    """A checksum of the files' names and labels, where the set was read from files."""
    messages: tuple[str, ...] = ()
    """Messages to the user on how it was read."""
    placeholder_reason: str = ""
    """Why the run's own images are missing, where noise of their shape replaces them."""
    content_hashes: np.ndarray | None = field(default=None, repr=False, compare=False)
    """A hash of each training image's file (`hash_content`), where the files were decoded into memory."""
    test_hashes: np.ndarray | None = field(default=None, repr=False, compare=False)
    """The same of the test images."""
    file_names: Mapping[str, np.ndarray] | None = field(default=None, repr=False, compare=False)
    """The files' paths by part (training, test), as bytes, where the files were decoded into memory."""


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, their classes, the augmentation that suits them, and where they come from.

    `from_dataset` makes one of pairs (image, label); `codistill.train(config, data=...)` takes it.

    >>> pixels = np.zeros((6, 8, 8, 3), np.uint8)
    >>> ImageSet("black", pixels, np.arange(6) % 2, pixels[:2], np.arange(2), ("a", "b"))
    ImageSet('black', 6 training and 2 test images of 8 x 8 x 3, 2 classes)
    """

    name: str
    x_train: Pixels
    """uint8, `N x H x W x C`, or images that are decoded to such when they are needed."""
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
    """Per-channel mean of pixels / 255, for normalization; computed from images in memory if empty."""
    std: tuple[float, ...] = ()
    resize_mode: str = "stretch"
    """How images of another shape become squares, `stretch` or `crop` (see `fit_square`)."""
    bits: int = 16
    """Bits that image files of 16 bits a pixel use."""
    num_val: int = 0
    """Number of images at the end of the training part that are the set's own validation part."""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not self.mean and len(self.x_train) and isinstance(self.x_train, np.ndarray):
            mean, std = statistics(self.x_train)
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)

    def __repr__(self) -> str:
        """Return the set in one line."""
        size, channels = self.image_size, self.channels
        return (
            f"ImageSet({self.name!r}, {len(self.y_train):,} training and {len(self.y_test):,} test images of {size} x "
            f"{size} x {channels}, {len(self.classes):,} classes)"
        )

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
        """Make a set of pairs (image, label) for `train(config, data=...)`: read into memory, each once, or `lazy`.

        Images are PIL images, uint8 arrays `H x W (x C)` or tensors `C x H x W`, or floating-point ones from 0 to 1:
        neither normalized nor augmented, because each is read once.

        Args:
            train: A map-style data set, or any iterable, of pairs.
            test: The test part; default a fifth of `train`, balanced over classes.
            classes: Their names, in the order of the labels; default the data set's `classes`, or numbers. Where the
                test data lists `classes` (or `class_to_idx`) too, its labels are matched by these names.
            image_size: Side to stretch images to; default their own size.
            flip: Whether left and right may be swapped in training.
            name: Name of the set in the run.
            lazy: Read images again in every epoch, in worker processes (`data_workers`), like image files: cropped
                to squares of `image_size` (default their own, or 224 where sizes differ). For map-style data sets
                that memory cannot hold; labels are its `targets`, or else all items are read once.

        Raises:
            InputError: an item is no such pair, a label has no class, or images differ in size (and are not `lazy`).

        >>> pixels = np.zeros((8, 8), dtype=np.uint8)
        >>> ImageSet.from_dataset([(pixels, 0), (pixels + 9, 1)] * 5, classes=("dark", "light")).x_train.shape
        (8, 8, 8, 1)
        """
        read: Callable[..., tuple[Any, np.ndarray]] = read_lazily if lazy else read_pairs
        x, y = read(train, "training", image_size)
        note = None
        if test is None:
            mask = balanced_part(y, 0.2, seed=0)
            x, y, x_test, y_test = x[~mask], y[~mask], x[mask], y[mask]
        else:
            x_test, y_test = read(test, "test", image_size)
            y_test, note = match_labels(y_test, test, train, classes)
        notes = (note,) if note else ()
        names = class_names(classes, train, (y, y_test))
        name = f"{GIVEN}:{name}"
        if not lazy:
            provenance = Provenance(messages=notes)
            pad = max(1, x.shape[1] // 8)
            return cls(name, x, y, x_test, y_test, names, pad=pad, flip=flip, provenance=provenance)
        x, x_test = as_common_squares(x, x_test)
        message = f"{len(x) + len(x_test):,} images are read from the data set again in every epoch"
        provenance = Provenance(checksum(x, x_test, (y, y_test)), (message, *notes))
        return cls(name, x, y, x_test, y_test, names, pad=0, flip=flip, resize_mode="crop", provenance=provenance)

    @property
    def from_files(self) -> bool:
        """Whether images are read again in every epoch, and not kept in memory."""
        return isinstance(self.x_train, LazyImages)

    @property
    def channels(self) -> int:
        """Channels C of the images."""
        return self.x_train.shape[3]

    @property
    def image_size(self) -> int:
        """Height (and width) of the images."""
        return self.x_train.shape[1]

    def name_image(self, part: str, index: int) -> str:
        """Return an image's file, or its number where it is in no file of its own.

        Args:
            part: training or test.
            index: Its position there.

        >>> pixels = np.zeros((2, 8, 8, 1), dtype=np.uint8)
        >>> ImageSet("npz:a.npz", pixels, np.arange(2), pixels, np.arange(2), ("a", "b")).name_image("test", 1)
        'test image 1'
        """
        images = self.x_test if part == "test" else self.x_train
        if isinstance(images, LazyImages):
            return images.path(index)
        names = self.provenance.file_names
        return f"{part} image {index}" if names is None else os.fsdecode(names[part][index])

    def with_channels(self, channels: int) -> ImageSet:
        """Return the set with gray images repeated to 3 channels, or color images made gray (ITU-R 601) for 1."""
        if channels == self.channels:
            return self
        if isinstance(self.x_train, LazyImages) and isinstance(self.x_test, LazyImages):
            images = [replace(x, channels=channels) for x in (self.x_train, self.x_test)]
            return replace(self, x_train=images[0], x_test=images[1], mean=(), std=())
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
            raise InputError(
                f"--channels {channels}: images of {self.channels} channels cannot be converted; give 1 or 3, "
                "for images "
                "of 3 or 1"
            )
        return replace(self, x_train=parts[0], x_test=parts[1], mean=mean, std=std)

    def imbalance(self, part: np.ndarray) -> str | None:
        """Return a message on how unequal the classes of a training part are; None up to a factor of two."""
        counts = np.bincount(self.y_train[part], minlength=len(self.classes))
        if counts.max() < 2 * max(int(counts.min()), 1):
            return None
        largest, smallest = int(counts.argmax()), int(counts.argmin())
        return (
            f"classes are unequal: {counts[largest]:,} training images of {self.classes[largest]}, "
            f"{counts[smallest]:,} of {self.classes[smallest]}"
        )

    def check(self) -> ImageSet:
        """Return the set.

        Raises:
            InputError: it cannot be trained on.
        """
        flag = f"--data {self.name}"
        hint = "; give --image-size" if self.name.startswith("folder:") else ""
        for part, x, y in (("training", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            if not len(x):
                raise InputError(f"{flag} has no {part} images")
            if len(x) != len(y):
                raise InputError(f"{flag} has {len(x)} {part} images but {len(y)} labels")
        shape, test_shape = self.x_train.shape[1:], self.x_test.shape[1:]
        if shape != test_shape:
            raise InputError(f"{flag}: training images are {shape}, test images {test_shape}{hint}")
        if shape[0] != shape[1] == shape[-1] and shape[0] in (1, 3):
            raise InputError(
                f"{flag}: images are {' x '.join(map(str, shape))}, channels first; give them as N x H x W x C "
                "(images.transpose(0, 2, 3, 1))"
            )
        if shape[0] != shape[1]:
            raise InputError(f"{flag}: images are {shape[0]} x {shape[1]}; they must be square{hint}")
        if not shape[-1]:
            raise InputError(
                f"{flag}: images are of shape {' x '.join(map(str, shape))}, without a channel; give 1 or 3"
            )
        if shape[0] < 8:
            raise InputError(f"{flag}: images of {shape[0]} x {shape[0]} are too small; 8 x 8 is the minimum")
        counts = np.bincount(self.y_train)
        used = int((counts > 0).sum())
        if used < 2:
            raise InputError(f"{flag} has one class only in its training part; a classifier needs two or more")
        highest = int(max(counts.size, self.y_test.max() + 1)) - 1
        if highest >= len(self.classes):
            raise InputError(f"{flag} has a label {highest:,}, but {len(self.classes):,} classes; labels count from 0")
        if len(self.classes) > max(1_000, 2 * used):
            raise InputError(
                f"{flag} has {len(self.classes):,} classes, and training images of {used:,} of them; number the "
                "classes from 0 without gaps"
            )
        return self

    def metadata(self) -> dict[str, Any]:
        """Return the entries on the images in a run's data.json."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "fit": self.resize_mode,
            "checksum": self.checksum(),
        } | ({} if self.bits == 16 else {"bits": self.bits})

    def checksum(self) -> str:
        """Return a checksum that identifies the set: of files their names and labels, of arrays every number."""
        if self.provenance.files_checksum:
            return self.provenance.files_checksum
        check = 0
        for numbers in (self.x_train, self.y_train, self.x_test, self.y_test):
            assert isinstance(numbers, np.ndarray)
            check = zlib.crc32(np.ascontiguousarray(numbers).data, check)
        return f"{check:08x}"

    def describe_augmentation(
        self, *, augment: bool, cutout: int, auto_augment: str = "none", random_erasing: float = 0.0
    ) -> str:
        """Describe the augmentation of training images in words; the arguments are the options of a run."""
        parts = ["random resized crop" if self.from_files else f"pad {self.pad} and crop"] * bool(
            augment and (self.pad or self.from_files)
        )
        parts += ["flip"] * bool(augment and self.flip)
        parts += [auto_augment] * (auto_augment != "none") + [f"cutout {cutout}"] * bool(cutout)
        return " + ".join(parts + [f"random erasing {random_erasing:g}"] * bool(random_erasing)) or "none"


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per-channel mean and deviation of pixels / 255, of uint8 images `N x H x W x C`."""
    if not images.size:  # `ImageSet.check` refuses them
        return (0.0,) * images.shape[-1], (1.0,) * images.shape[-1]
    pixels = images.reshape(-1, images.shape[-1])
    mean = [float(pixels[:, c].mean(dtype=np.float64) / 255) for c in range(pixels.shape[1])]
    std = [float(pixels[:, c].std(dtype=np.float64) / 255) or 1.0 for c in range(pixels.shape[1])]
    return tuple(round(m, 4) for m in mean), tuple(max(round(s, 4), 1e-4) for s in std)
