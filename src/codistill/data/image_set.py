"""A set of images in memory: a training and a test part, their classes, and how training images are varied.

Shapes: N images, H height, W width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codistill.config import InputError


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, their classes, and how training images are varied."""

    name: str
    x_train: np.ndarray
    """uint8, `N x H x W x C`."""
    y_train: np.ndarray
    """int64, `N`."""
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    pad: int = 4
    """Pixels of zero padding for random crops."""
    flip: bool = True
    """Whether left and right may be swapped."""
    mean: tuple[float, ...] = ()
    """Per-channel mean of pixels / 255, for normalising; computed from the training part if empty."""
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.mean and len(self.x_train):
            pixels = self.x_train.reshape(-1, self.channels)
            mean = [float(pixels[:, c].mean(dtype=np.float64) / 255) for c in range(self.channels)]
            std = [float(pixels[:, c].std(dtype=np.float64) / 255) or 1.0 for c in range(self.channels)]
            object.__setattr__(self, "mean", tuple(round(m, 4) for m in mean))
            object.__setattr__(self, "std", tuple(max(round(s, 4), 1e-4) for s in std))

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
        if self.channels == 1:
            parts = [np.repeat(x, channels, axis=-1) for x in (self.x_train, self.x_test)]
            mean, std = self.mean * channels, self.std * channels
        elif self.channels == 3 and channels == 1:
            parts = [(x @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None] for x in self.images]
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
        }

    @property
    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and test images."""
        return self.x_train, self.x_test

    def describe_augmentation(self, augment: bool, cutout: int) -> str:
        """Say in words what happens to training images."""
        parts = [f"pad {self.pad} and crop"] * bool(augment and self.pad) + ["flip"] * bool(augment and self.flip)
        return " + ".join(parts + [f"cutout {cutout}"] * bool(cutout)) or "none"
