"""Images, sets and the slow way of varying them, pixel by pixel."""

import numpy as np
import torch

from codistill.data import DeviceLoader, ImageSet, LoaderOptions


def random_images(count, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def pixel_loader(images, augmentation=None, **options):
    """Return a loader that yields bare pixel values, in float64, with the image's number as its label."""
    channels = images.shape[3]
    options = {"batch_size": 16, "dtype": torch.float64} | options
    labels = np.arange(len(images))
    options = LoaderOptions(augmentation=augmentation, **options)
    return DeviceLoader(images, labels, (0.0,) * channels, (1 / 255,) * channels, options)


def whole_epoch(loader, epoch=0, start=0):
    batches = list(loader.epoch(epoch, start))
    return torch.cat([views for views, _ in batches], 1), torch.cat([labels for _, labels in batches])


def slow_crop(image_HWC, top, left, flip, pad):
    """Pad with zeros, crop at (top, left), then swap left and right; nested lists, pixel by pixel."""
    height, width, channels = len(image_HWC), len(image_HWC[0]), len(image_HWC[0][0])
    padded = [[[0] * channels for _ in range(width + 2 * pad)] for _ in range(height + 2 * pad)]
    for i in range(height):
        for j in range(width):
            padded[i + pad][j + pad] = image_HWC[i][j]
    crop = [[padded[top + i][left + j] for j in range(width)] for i in range(height)]
    return [list(reversed(row)) for row in crop] if flip else crop


def slow_square(size, y, x, side):
    """Return a mask, 0 in the square of `side` pixels whose pixel number side // 2 is (y, x), clipped at the edge."""
    mask = [[1] * size for _ in range(size)]
    for i in range(y - side // 2, y - side // 2 + side):
        for j in range(x - side // 2, x - side // 2 + side):
            if 0 <= i < size and 0 <= j < size:
                mask[i][j] = 0
    return mask


def image_set(labels, num_classes=None, size=8):
    labels = np.asarray(labels, dtype=np.int64)
    images = np.zeros((len(labels), size, size, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels)) % 256
    classes = tuple(str(c) for c in range(num_classes or labels.max() + 1))
    return ImageSet("made", images, labels, images[:2], labels[:2], classes)


def shuffled_labels(counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def arrays(**changes):
    parts = {
        "x_train": random_images(12, size=9),
        "y_train": np.arange(12) % 4,
        "x_test": random_images(6, size=9, seed=1),
        "y_test": np.arange(6) % 4,
    }
    return {k: v for k, v in (parts | changes).items() if v is not None}


def write_npz(path, **changes):
    np.savez(path, **arrays(**changes))
    return f"npz:{path}"


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
