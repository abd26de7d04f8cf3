"""Named sets, their statistics and splits."""

import gzip
import struct
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from codistill.config.config import Config
from codistill.data import ImageSet, load_set, make_splits
from codistill.utils.errors import InputError
from helpers.images import image_set, random_images, shuffled_labels, write_npz

# ----------------------------------------------------------------------------------------------------------------------
# Digits


def test_digits_have_their_sizes_and_are_the_same_every_time():
    first = load_set("digits")
    np.random.seed(7)
    torch.manual_seed(7)
    second = load_set("digits")
    assert first.x_train.shape == (1000, 8, 8, 1)
    assert first.x_test.shape == (797, 8, 8, 1)
    assert first.x_train.dtype == first.x_test.dtype == np.uint8
    assert first.y_train.dtype == first.y_test.dtype == np.int64
    assert first.classes == tuple("0123456789")
    assert (first.pad, first.flip, first.channels, first.image_size) == (1, False, 1, 8)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert (first.mean, first.std) == (second.mean, second.std)


def test_digits_parts_hold_each_scikit_learn_digit_once():
    from sklearn.datasets import load_digits

    source = load_digits()
    data = load_set("digits")
    expected = sorted(
        (tuple(min(int(16 * v), 255) for v in image.flatten()), int(label))
        for image, label in zip(source.images, source.target)
    )
    images, labels = np.concatenate((data.x_train, data.x_test)), np.concatenate((data.y_train, data.y_test))
    assert sorted((tuple(int(v) for v in x.flatten()), int(y)) for x, y in zip(images, labels)) == expected
    assert min(np.bincount(data.y_train)) > 80  # the shuffle mixes the classes
    assert min(np.bincount(data.y_test)) > 60


def test_statistics_of_a_set_are_those_of_its_training_pixels():
    images = random_images(20)
    images[..., 1] //= 3
    data = ImageSet("made", images, np.zeros(20), images[:1], np.zeros(1), ("a",))
    for c in range(3):
        values = [int(v) / 255 for v in images[..., c].flatten()]
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        assert data.mean[c] == pytest.approx(mean, abs=5.1e-5)
        assert data.std[c] == pytest.approx(std, abs=5.1e-5)


def test_a_set_of_one_colour_can_still_be_normalised():
    images = np.full((4, 8, 8, 1), 9, dtype=np.uint8)
    data = ImageSet("made", images, np.zeros(4), images, np.zeros(4), ("a",))
    assert data.std[0] > 0


# ----------------------------------------------------------------------------------------------------------------------
# Splits


def test_splits_are_disjoint_and_hold_every_image_once():
    data = image_set(shuffled_labels([30, 50, 21]))
    splits = make_splits(data, 0.1, 0.2)
    assert sorted([*splits.train, *splits.val, *splits.holdout]) == list(range(101))
    assert len(splits.val)
    assert len(splits.holdout)


def test_validation_and_holdout_take_their_part_of_every_class():
    data = image_set(shuffled_labels([40, 80, 20]))
    splits = make_splits(data, 0.1, 0.25)
    assert np.bincount(data.y_train[splits.val]).tolist() == [4, 8, 2]
    # The holdout is a part of what validation leaves: 36, 72 and 18.
    assert np.bincount(data.y_train[splits.holdout]).tolist() == [9, 18, 4]
    assert np.bincount(data.y_train[splits.train]).tolist() == [27, 54, 14]


@pytest.mark.parametrize(("fraction", "val"), [(0.001, [1, 1, 0]), (0.999, [9, 1, 0])])
def test_every_class_is_in_training_and_if_possible_validation(fraction, val):
    data = image_set(shuffled_labels([10, 2, 1]))
    splits = make_splits(data, fraction)
    assert np.bincount(data.y_train[splits.val], minlength=3).tolist() == val


def test_no_validation_split_where_none_is_asked_for():
    splits = make_splits(image_set(shuffled_labels([5, 5])), 0.0)
    assert len(splits.val) == len(splits.holdout) == 0
    assert splits.train.tolist() == list(range(10))


def test_splits_are_the_same_every_time():
    data = image_set(shuffled_labels([30, 50, 21]))
    first = make_splits(data, 0.1, 0.2, 5)
    np.random.seed(3)
    torch.manual_seed(3)
    second = make_splits(data, 0.1, 0.2, 5)
    for name in ("train", "val", "holdout"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_splits_are_drawn_and_not_the_first_images_of_a_class():
    splits = make_splits(image_set(np.repeat([0, 1], 50)), 0.2)
    assert splits.val.tolist() != [*range(10), *range(50, 60)]
    assert len(set(np.diff(splits.val))) > 2


def test_train_per_class_limits_classes_and_keeps_validation():
    data = image_set(shuffled_labels([30, 50, 21]))
    full, few = make_splits(data, 0.1), make_splits(data, 0.1, 0.0, 7)
    assert np.bincount(data.y_train[few.train]).tolist() == [7, 7, 7]
    assert len(set(few.train)) == 21
    assert set(few.train) < set(full.train)
    assert np.array_equal(few.val, full.val)
    held = make_splits(data, 0.1, 0.2, 7)  # a holdout comes out of the same few images: no labels that others lack
    assert set(held.train) | set(held.holdout) == set(few.train)
    assert np.bincount(data.y_train[held.holdout]).tolist() == [1, 1, 1]


def test_all_seeds_use_the_same_training_and_test_images():
    from codistill.training.build import build_run

    def splits_of(seed):
        config = Config(
            "independent", "resnet8", "digits", peers=1, seed=seed, train_per_class=3, batch_size=8, device="cpu"
        )
        return build_run(config.resolved()).splits

    first, second = splits_of(0), splits_of(1)
    assert len(first.train) == 30
    for name in ("train", "val", "holdout"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_too_few_images_in_a_class_names_the_flag_and_number():
    data = image_set(shuffled_labels([30, 50, 21]))
    assert len(make_splits(data, 0.1, 0.0, 19).train) == 57
    with pytest.raises(InputError, match=r"--train-per-class 20.*19"):
        make_splits(data, 0.1, 0.0, 20)


def test_splits_are_described_in_words():
    data = image_set(shuffled_labels([1500, 500]))
    assert make_splits(data, 0.1, 0.1).describe(data) == "1,620 train / 200 validation / 180 holdout / 2 test"
    assert make_splits(data, 0.0).describe(data) == "2,000 train / 2 test"


# ----------------------------------------------------------------------------------------------------------------------
# Named sets


@pytest.mark.parametrize("name", ["digit", "npz", "npz:", "folder:", "digits:x", "", "imagenet"])
def test_an_unknown_set_is_an_error_that_names_the_flag(name):
    with pytest.raises(InputError, match="--data"):
        load_set(name)


def test_a_misspelt_set_gets_a_suggestion():
    with pytest.raises(InputError, match='did you mean "digits"'):
        load_set("digit")


def test_image_size_is_for_folders_only():
    with pytest.raises(InputError, match="--image-size"):
        load_set("digits", image_size=16)


def test_cifar100_is_read_from_an_npz_in_data_dir(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise AssertionError("torchvision is not needed")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    train, test = random_images(200, 8), random_images(100, 8, seed=1)
    write_npz(
        tmp_path / "cifar100.npz",
        x_train=train,
        y_train=np.arange(200) % 100,
        x_test=test,
        y_test=np.arange(100),
    )
    data = load_set("cifar100", str(tmp_path))
    assert data.name == "cifar100"
    assert np.array_equal(data.x_train, train)
    assert np.array_equal(data.x_test, test)
    assert len(data.classes) == 100
    assert (data.pad, data.flip) == (4, True)
    assert data.mean == (0.5071, 0.4865, 0.4409)
    assert data.std == (0.2673, 0.2564, 0.2762)


def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch):
    class Fake:
        classes = ["cat", "dog"]

        def __init__(self, root, train, download):
            assert root == str(tmp_path)
            assert not download
            self.data = random_images(6 if train else 4, 32, seed=int(train))
            self.targets = [n % 2 for n in range(len(self.data))]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_set("cifar10", str(tmp_path))
    assert np.array_equal(data.x_train, random_images(6, 32, seed=1))
    assert np.array_equal(data.x_test, random_images(4, 32, seed=0))
    assert data.y_train.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.classes == ("cat", "dog")
    assert (data.pad, data.flip, data.mean) == (4, True, (0.4914, 0.4822, 0.4465))


def write_fashion_mnist(root, train, test):
    """Write images and labels as MNIST's idx files, where torchvision looks for them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, images in (("train", train), ("t10k", test)):
        labels = bytes(n % 10 for n in range(len(images)))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(images)) + labels)
    return raw


def test_fashion_mnist_is_read_from_torchvisions_files(tmp_path):
    train, test = random_images(20, 28, 1)[..., 0], random_images(11, 28, 1, seed=1)[..., 0]
    write_fashion_mnist(tmp_path, train, test)
    data = load_set("fashion-mnist", str(tmp_path))
    assert np.array_equal(data.x_train, train[..., None])
    assert np.array_equal(data.x_test, test[..., None])
    assert data.y_train.tolist() == [n % 10 for n in range(20)]
    assert data.y_test.tolist() == [n % 10 for n in range(11)]
    assert len(data.classes) == 10
    assert data.classes[9] == "Ankle boot"
    assert (data.pad, data.flip, data.channels) == (2, True, 1)


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "gzip"])
def test_damaged_fashion_mnist_is_an_error_that_names_the_folder(tmp_path, damage):
    images = random_images(20, 28, 1)[..., 0]
    file = write_fashion_mnist(tmp_path, images, images) / "train-images-idx3-ubyte"
    good = file.read_bytes()
    bad = {"cut": good[:1000], "other": b"\xff" * 100, "empty": b"", "gzip": gzip.compress(good)}
    file.write_bytes(bad[damage])
    with pytest.raises(InputError, match="--data-dir") as error:
        load_set("fashion-mnist", str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("name", "cls"), [("fashion-mnist", "FashionMNIST"), ("cifar100", "CIFAR100")])
@pytest.mark.parametrize("failure", [urllib.error.URLError("no route\nto host"), RuntimeError(), OSError("disk")])
def test_a_failed_download_is_one_sentence_naming_data_dir(tmp_path, monkeypatch, name, cls, failure):
    def fail(_self):
        raise failure

    monkeypatch.setattr(getattr(torchvision.datasets, cls), "download", fail)
    with pytest.raises(InputError, match="--data-dir") as error:
        load_set(name, str(tmp_path / "new"))
    text = str(error.value)
    assert "\n" not in text
    assert f"--data {name}" in text
    assert str(tmp_path / "new") in text
