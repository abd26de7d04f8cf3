"""Loading a set of images by its name: public sets, arrays and folders.

torchvision reads the public sets; the digits are scikit-learn's.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from codistill.data.image_set import GIVEN, ImageSet
from codistill.utils import InputError, check_npz_sizes, first_line, suggest

SETS = {
    "digits": "1,797 handwritten digits, 8 x 8 gray, 10 classes; embedded, no download",
    "fashion-mnist": "60,000 + 10,000 images of clothing, 28 x 28 gray, 10 classes; downloaded on first use",
    "cifar10": "50,000 + 10,000 photographs, 32 x 32 RGB, 10 classes; downloaded on first use",
    "cifar100": "50,000 + 10,000 photographs, 32 x 32 RGB, 100 classes; downloaded on first use",
    "npz:PATH": "your arrays: x_train, y_train, x_test, y_test; uint8 images N x H x W (x C)",
    "folder:PATH": "your images: one folder per class, in PATH/train, val and test, or in PATH (then split 80/20)",
}

MAX_CLASSES = 1_000_000


def load_set(
    name: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    pipeline: str = "auto",
    *,
    skip_corrupt: bool = False,
    bits: int = 16,
) -> ImageSet:
    """Load a set by name.

    Args:
        name: digits, fashion-mnist, cifar10, cifar100, npz:PATH or folder:PATH.
        data_dir: Where torchvision finds or downloads it, or a folder with `cifar100.npz` (default ./data); for
            folder:PATH the folder instead of PATH, which has moved.
        image_size: Height and width for the images of a folder.
        pipeline: How a folder is read (see `load_folder`).
        skip_corrupt: Whether a folder's files that cannot be read are left out.
        bits: Bits that a folder's files of 16 bits a pixel use.

    Raises:
        InputError: the set is unknown, missing, unreadable, or cannot be trained on.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        from codistill.data.image_folder import load_folder

        place = Path(path if data_dir is None else data_dir).expanduser()
        data = load_folder(place, image_size, pipeline, skip_corrupt=skip_corrupt, bits=bits)
        return replace(data, name=name).check()
    if kind == GIVEN:
        raise InputError(
            f"--data {name}: these images were given from Python and are not stored; give them again, as in "
            "codistill.train(config, data=...) or codistill.load_run(run, data=...)"
        )
    if image_size is not None:
        raise InputError(f"--image-size resizes the images of a folder; --data {name} has its own size, so drop it")
    if pipeline == "files":
        raise InputError(f"--data-pipeline files reads the images of a folder; --data {name} is in memory, so drop it")
    if kind == "npz" and path:
        return _load_npz(name, Path(path).expanduser()).check()
    if name not in SETS or kind != name:
        raise InputError(f'--data: unknown set "{name}"{suggest(name, SETS)}')
    loader = {
        "digits": _load_digits,
        "fashion-mnist": _load_fashion_mnist,
        "cifar10": _load_cifar,
        "cifar100": _load_cifar,
    }[name]
    return loader(name, Path(data_dir or "data").expanduser()).check()


def _load_digits(name: str, _data_dir: Path) -> ImageSet:
    """Load the 1,797 digits of scikit-learn; the last 797 of a fixed shuffle are the test part."""
    pixels, labels = _read_digits()
    images = np.minimum(pixels.reshape(-1, 8, 8, 1) * 16, 255).astype(np.uint8)
    order = np.random.default_rng(1797).permutation(len(labels))
    train, test = order[:1000], order[1000:]
    classes = tuple(str(c) for c in range(10))
    return ImageSet(name, images[train], labels[train], images[test], labels[test], classes, pad=1, flip=False)


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits, 64 values from 0 to 16 per image, and their labels.

    Its file is read without its package, whose import takes longer than a short run's training.
    """
    found = find_spec("sklearn")
    file = Path(found.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if found is not None else None
    if file is not None and file.is_file():
        table = np.loadtxt(file, dtype=np.int64, delimiter=",")
        return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def _load_fashion_mnist(name: str, data_dir: Path) -> ImageSet:
    from torchvision.datasets import FashionMNIST

    train, test = _load_torchvision(FashionMNIST, name, data_dir)
    return ImageSet(
        name,
        train.data.numpy()[..., None],
        train.targets.numpy().astype(np.int64),
        test.data.numpy()[..., None],
        test.targets.numpy().astype(np.int64),
        tuple(train.classes),
        pad=2,
        flip=True,
    )


def _load_cifar(name: str, data_dir: Path) -> ImageSet:
    """Load CIFAR-10 or CIFAR-100, with the statistics by which the papers' code normalizes."""
    statistics = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    mean, std = statistics[name]
    archive = data_dir / f"{name}.npz"
    if archive.exists():
        data = _load_npz(name, archive)
        if data.channels != 3:
            raise InputError(f"--data {name}: {archive} has {data.channels} channels; photographs have 3")
        return replace(data, name=name, mean=mean, std=std, pad=4, flip=True)
    from torchvision.datasets import CIFAR10, CIFAR100

    train, test = _load_torchvision({"cifar10": CIFAR10, "cifar100": CIFAR100}[name], name, data_dir)
    labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
    return ImageSet(name, train.data, labels[0], test.data, labels[1], tuple(train.classes), 4, True, mean, std)


def _load_torchvision(cls: Any, name: str, data_dir: Path) -> tuple[Any, ...]:
    """Read both parts through torchvision, downloading them on first use."""
    try:
        return tuple(cls(str(data_dir), train=part, download=False) for part in (True, False))
    except Exception:  # not there, or damaged, where torchvision may raise an AssertionError
        pass
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return tuple(cls(str(data_dir), train=part, download=True) for part in (True, False))
    except Exception as error:  # a download may raise anything
        raise InputError(
            f"--data {name} can neither be read from {data_dir} nor downloaded ({first_line(error)}); "
            "name its folder with --data-dir"
        ) from None


def _load_npz(name: str, path: Path) -> ImageSet:
    """Read x_train, y_train, x_test, y_test; other arrays are ignored. Pickled objects are refused."""
    if not path.is_file():
        what = "cannot be read, as it is no file" if path.exists() else "does not exist"
        raise InputError(f"--data {name}: {path} {what}; name an .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in archive.files]
            if missing:
                raise InputError(
                    f"--data {name}: {path} lacks {', '.join(missing)}; it needs x_ and y_, train and test"
                )
            check_npz_sizes(path, ("x_train", "y_train", "x_test", "y_test"))  # before memory is allocated
            x_train, y_train, x_test, y_test = (archive[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    except InputError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(f"--data {name}: {path} cannot be read ({first_line(error)})") from None
    parts = [_check_pixels(x, key, path) for x, key in ((x_train, "x_train"), (x_test, "x_test"))]
    labels = [_check_labels(y, key, path) for y, key in ((y_train, "y_train"), (y_test, "y_test"))]
    num_classes = int(max((y.max() for y in labels if len(y)), default=-1)) + 1
    return ImageSet(name, parts[0], labels[0], parts[1], labels[1], tuple(str(c) for c in range(num_classes)), 2, False)


def _check_pixels(x: np.ndarray, key: str, path: Path) -> np.ndarray:
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.dtype != np.uint8:
        raise InputError(
            f"{path}: {key} is {x.dtype} of shape {x.shape}; it must be uint8 of shape N x H x W or N x H x W x C"
        )
    return x


def _check_labels(y: np.ndarray, key: str, path: Path) -> np.ndarray:
    y = y.reshape(-1)
    if not np.issubdtype(y.dtype, np.integer) or (len(y) and not 0 <= y.min() <= y.max() < MAX_CLASSES):
        raise InputError(f"{path}: {key} must be whole numbers from 0 up, and below {MAX_CLASSES:,}")
    return y.astype(np.int64)
