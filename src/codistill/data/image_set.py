"""A set of images in memory: a training and a test part, their classes, and how training images are varied.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codistill.data.files import ImageFiles
from codistill.errors import InputError

Pixels = np.ndarray | ImageFiles


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
