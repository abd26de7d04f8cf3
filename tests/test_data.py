"""Sets, splits and batches, against loops over samples and pixels."""

import gzip
import io
import struct
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from codistill.config import Config, InputError
from codistill.data import DeviceLoader, ImageSet, load_set, make_splits
from codistill.data.loader import Augmentation, augment

# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def random_images(count, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def pixel_loader(images, augmentation=None, **options):
    """Return a loader that yields bare pixel values, in float64, with the image's number as its label."""
    channels = images.shape[3]
    options = {"batch_size": 16, "dtype": torch.float64} | options
    labels = np.arange(len(images))
    return DeviceLoader(images, labels, (0.0,) * channels, (1 / 255,) * channels, augmentation=augmentation, **options)


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


def test_digits_train_and_test_are_all_digits_of_scikit_learn_each_once():
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
def test_every_class_keeps_an_image_to_train_on_and_gives_one_if_it_can(fraction, val):
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


def test_train_per_class_takes_that_many_of_every_class_and_leaves_validation_alone():
    data = image_set(shuffled_labels([30, 50, 21]))
    full, few = make_splits(data, 0.1), make_splits(data, 0.1, 0.0, 7)
    assert np.bincount(data.y_train[few.train]).tolist() == [7, 7, 7]
    assert len(set(few.train)) == 21
    assert set(few.train) < set(full.train)
    assert np.array_equal(few.val, full.val)
    held = make_splits(data, 0.1, 0.2, 7)  # a holdout comes out of the same few images: no labels that others lack
    assert set(held.train) | set(held.holdout) == set(few.train)
    assert np.bincount(data.y_train[held.holdout]).tolist() == [1, 1, 1]


def test_all_seeds_train_on_the_same_few_images_and_are_judged_on_the_same():
    from codistill.setup import setup

    def splits_of(seed):
        config = Config(
            "independent", "resnet8", "digits", peers=1, seed=seed, train_per_class=3, batch_size=8, device="cpu"
        )
        return setup(config.resolved()).splits

    first, second = splits_of(0), splits_of(1)
    assert len(first.train) == 30
    for name in ("train", "val", "holdout"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_a_class_with_too_few_images_is_an_error_that_names_the_flag_and_the_number():
    data = image_set(shuffled_labels([30, 50, 21]))
    assert len(make_splits(data, 0.1, 0.0, 19).train) == 57
    with pytest.raises(InputError, match=r"--train-per-class 20.*19"):
        make_splits(data, 0.1, 0.0, 20)


def test_splits_are_described_in_words():
    data = image_set(shuffled_labels([1500, 500]))
    assert make_splits(data, 0.1, 0.1).describe(data) == "1,620 train / 200 validation / 180 holdout / 2 test"
    assert make_splits(data, 0.0).describe(data) == "2,000 train / 2 test"


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("pad", "flip"), [(2, True), (1, False), (0, True)])
def test_augment_equals_padding_cropping_and_flipping_one_image_at_a_time(views, pad, flip):
    images = random_images(9, size=6, channels=2)
    rng = torch.Generator().manual_seed(1)
    draws = {}
    if pad:
        draws["top"] = torch.randint(2 * pad + 1, (views, 9), generator=rng)
        draws["left"] = torch.randint(2 * pad + 1, (views, 9), generator=rng)
    if flip:
        draws["flip"] = torch.randint(2, (views, 9), generator=rng).bool()
    result = augment(torch.from_numpy(images), draws, Augmentation(pad=pad, flip=flip))
    assert result.dtype == torch.uint8
    assert result.shape == (views, 9, 6, 6, 2)
    for v in range(views):
        for b in range(9):
            top, left, flipped = (int(draws[k][v, b]) if k in draws else 0 for k in ("top", "left", "flip"))
            assert result[v, b].tolist() == slow_crop(images[b].tolist(), top, left, flipped, pad), (v, b)


@pytest.mark.parametrize("views", [1, 3])
def test_every_training_image_is_a_crop_of_its_own_source_and_every_place_occurs(views):
    pad, images = 1, random_images(60, channels=1)
    pixels, labels = whole_epoch(pixel_loader(images, Augmentation(pad=pad, flip=True), views=views))
    assert pixels.shape == (views, 60, 1, 8, 8)
    found = []
    for place, label in enumerate(labels.tolist()):
        crops = {
            str(slow_crop(images[label].tolist(), top, left, flip, pad)): (top, left, flip)
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
        }
        for v in range(views):
            pixel = pixels[v, place].permute(1, 2, 0).round().to(torch.int64)
            assert str(pixel.tolist()) in crops
            found.append(crops[str(pixel.tolist())])
    for axis, places in enumerate(({0, 1, 2}, {0, 1, 2}, {False, True})):
        assert {draw[axis] for draw in found} == places
    assert {top == left for top, left, _ in found} == {True, False}  # drawn apart
    assert {(top > 0) == flip for top, _, flip in found} == {True, False}


@pytest.mark.parametrize("side", [1, 3, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_cutout_blanks_one_square_an_image_and_view_and_every_centre_occurs(side, views):
    size = 6
    images = np.full((400, size, size, 1), 255, dtype=np.uint8)
    loader = DeviceLoader(
        images,
        np.arange(400),
        (0.0,),
        (1.0,),
        batch_size=150,
        augmentation=Augmentation(cutout=side),
        views=views,
        dtype=torch.float64,
    )
    masks = {str(slow_square(size, y, x, side)): (y, x) for y in range(size) for x in range(size)}
    assert len(masks) == size * size
    pixels, _ = whole_epoch(loader)
    assert pixels.shape == (views, 400, 1, size, size)
    found = [masks[str(image.long().tolist())] for image in pixels.flatten(0, 2)]
    assert set(found) == {(y, x) for y in range(size) for x in range(size)}


def test_cutout_blanks_with_the_mean_colour_after_cropping():
    images = np.full((50, 8, 8, 1), 255, dtype=np.uint8)
    loader = DeviceLoader(
        images,
        np.arange(50),
        (0.25,),
        (0.5,),
        batch_size=50,
        augmentation=Augmentation(pad=2, cutout=3),
        dtype=torch.float64,
    )
    pixels, _ = whole_epoch(loader)
    # White is (1 - 0.25) / 0.5, black padding (0 - 0.25) / 0.5, and what is cut out is 0.
    assert sorted({round(float(v), 12) for v in pixels.flatten()}) == [-0.5, 0.0, 1.5]
    assert 4 <= int((pixels[0, 0] == 0).sum()) <= 9


def test_padding_is_black_before_normalising():
    images = np.full((40, 8, 8, 3), 255, dtype=np.uint8)
    mean, std = (0.25, 0.5, 0.1), (0.5, 0.2, 0.3)
    loader = DeviceLoader(
        images, np.arange(40), mean, std, batch_size=40, augmentation=Augmentation(pad=2), dtype=torch.float64
    )
    pixels, _ = whole_epoch(loader)
    for c in range(3):
        values = sorted({round(float(v), 10) for v in pixels[:, :, c].flatten()})
        assert values == pytest.approx([-mean[c] / std[c], (1 - mean[c]) / std[c]], abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_pixels_over_255_minus_mean_over_deviation(dtype, tolerance, channels):
    images = random_images(5, channels=channels)
    mean, std = (0.5071, 0.4865, 0.4409)[:channels], (0.2673, 0.2564, 0.2762)[:channels]
    loader = DeviceLoader(images, np.arange(5), mean, std, batch_size=2, dtype=dtype)
    pixels, _ = whole_epoch(loader)
    assert pixels.dtype == dtype
    for n in range(5):
        for c in range(channels):
            for i in range(8):
                for j in range(8):
                    expected = (int(images[n, i, j, c]) / 255 - mean[c]) / std[c]
                    assert float(pixels[0, n, c, i, j]) == pytest.approx(expected, abs=tolerance)


def test_without_augmentation_the_order_is_kept_and_the_last_batch_is_smaller():
    images = random_images(10)
    loader = pixel_loader(images, batch_size=4, views=3)
    batches = list(loader.epoch(5))
    assert len(loader) == len(batches) == 3
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    pixels = torch.cat([views for views, _ in batches], 1)
    assert pixels.shape == (1, 10, 3, 8, 8)
    assert np.array_equal(pixels[0].permute(0, 2, 3, 1).round().numpy(), images)


FULL = Augmentation(pad=2, flip=True, cutout=3)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_image_appears_once_an_epoch_in_an_order_of_its_own(epoch):
    loader = pixel_loader(random_images(50), FULL)
    _, labels = whole_epoch(loader, epoch)
    assert sorted(labels.tolist()) == list(range(50))
    assert labels.tolist() != list(range(50))
    assert labels.tolist() != whole_epoch(loader, epoch + 1)[1].tolist()


def test_labels_stay_with_their_images():
    images = random_images(30)
    pixels, labels = whole_epoch(pixel_loader(images, Augmentation()))
    assert np.array_equal(pixels[0].permute(0, 2, 3, 1).round().numpy(), images[labels.numpy()])


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    images = random_images(50)
    first = whole_epoch(pixel_loader(images, FULL, seed=3), 4)
    other = pixel_loader(images, FULL, seed=3, batch_size=9)
    torch.manual_seed(99)
    np.random.seed(99)
    whole_epoch(other, 2)
    next(other.epoch(4))
    before = torch.get_rng_state()
    second = whole_epoch(other, 4)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    for changed in (whole_epoch(pixel_loader(images, FULL, seed=4), 4), whole_epoch(other, 5)):
        assert not torch.equal(changed[1], first[1])


def test_augmentation_is_drawn_anew_in_every_epoch():
    images = np.repeat(random_images(1), 40, 0)  # one image, so that the order cannot tell
    loader = pixel_loader(images, FULL)
    assert not torch.equal(whole_epoch(loader, 0)[0], whole_epoch(loader, 1)[0])


@pytest.mark.parametrize("augmentation", [None, FULL])
def test_an_epoch_from_batch_k_on_is_exactly_the_tail_of_the_epoch(augmentation):
    loader = pixel_loader(random_images(50), augmentation, batch_size=8, views=2)
    whole = list(loader.epoch(6))
    for start in range(len(whole) + 1):
        tail = list(loader.epoch(6, start=start))
        assert len(tail) == len(whole) - start
        for (views, labels), (expected_views, expected_labels) in zip(tail, whole[start:]):
            assert torch.equal(views, expected_views)
            assert torch.equal(labels, expected_labels)


def test_view_0_and_the_order_are_the_same_whatever_the_number_of_views():
    images = random_images(50)
    one, labels = whole_epoch(pixel_loader(images, FULL), 2)
    for views in (2, 4):
        more, same_labels = whole_epoch(pixel_loader(images, FULL, views=views), 2)
        assert more.shape[0] == views
        assert torch.equal(more[0], one[0])
        assert torch.equal(same_labels, labels)


@pytest.mark.parametrize("augmentation", [Augmentation(pad=2), Augmentation(flip=True), Augmentation(cutout=3)])
def test_views_differ(augmentation):
    pixels, _ = whole_epoch(pixel_loader(random_images(50), augmentation, views=3))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(pixels[a], pixels[b])


@pytest.mark.parametrize("augmentation", [None, FULL])
@pytest.mark.parametrize("channels", [1, 3])
def test_both_memory_formats_hold_the_same_values(augmentation, channels):
    images = random_images(20, channels=channels)
    last = list(pixel_loader(images, augmentation, batch_size=8, views=2, channels_last=True).epoch(1))
    first = list(pixel_loader(images, augmentation, batch_size=8, views=2, channels_last=False).epoch(1))
    for (a, _), (b, _) in zip(last, first):
        assert torch.equal(a, b)
        assert b.is_contiguous()
        for view in a:
            assert view.is_contiguous(memory_format=torch.channels_last)
            if channels > 1:
                assert view.stride() == (8 * 8 * channels, 1, 8 * channels, channels)


def test_the_images_given_are_not_changed():
    images = random_images(20)
    before = images.copy()
    whole_epoch(pixel_loader(images, FULL, views=2))
    assert np.array_equal(images, before)


# ----------------------------------------------------------------------------------------------------------------------
# npz


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


def test_npz_gives_back_its_arrays_and_counts_the_classes(tmp_path):
    parts = arrays(y_train=(np.arange(12) % 4).astype(np.uint8).reshape(12, 1), extra=np.zeros(3))
    data = load_set(write_npz(tmp_path / "mine.npz", **parts))
    assert np.array_equal(data.x_train, parts["x_train"])
    assert np.array_equal(data.x_test, parts["x_test"])
    assert data.y_train.tolist() == [n % 4 for n in range(12)]
    assert data.y_test.tolist() == [n % 4 for n in range(6)]
    assert data.y_train.dtype == np.int64
    assert data.classes == ("0", "1", "2", "3")
    assert (data.channels, data.image_size) == (3, 9)


def test_npz_may_hold_gray_images_without_a_channel_axis(tmp_path):
    parts = arrays()
    gray = {"x_train": parts["x_train"][..., 0], "x_test": parts["x_test"][..., 0]}
    data = load_set(write_npz(tmp_path / "gray.npz", **gray))
    assert data.x_train.shape == (12, 9, 9, 1)
    assert np.array_equal(data.x_train[..., 0], gray["x_train"])


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_npz_that_lacks_an_array_is_an_error_that_names_it(tmp_path, key):
    with pytest.raises(InputError, match=f"lacks {key}"):
        load_set(write_npz(tmp_path / "part.npz", **{key: None}))


BAD_ARRAYS = {
    "float images": ({"x_train": np.zeros((12, 9, 9, 3))}, "x_train is float64.*must be uint8"),
    "int images": ({"x_test": np.zeros((6, 9, 9, 3), np.int32)}, "x_test is int32.*must be uint8"),
    "flat images": ({"x_train": np.zeros((12, 243), np.uint8)}, r"x_train is uint8 of shape \(12, 243\)"),
    "five axes": ({"x_train": np.zeros((12, 1, 9, 9, 3), np.uint8)}, "x_train is uint8 of shape"),
    "channels first": ({"x_train": np.zeros((12, 3, 9, 9), np.uint8)}, "training images are"),
    "float labels": ({"y_train": np.zeros(12)}, "y_train must be whole numbers"),
    "word labels": ({"y_train": np.array(["cat"] * 12)}, "y_train must be whole numbers"),
    "negative labels": ({"y_test": np.arange(6) - 1}, "y_test must be whole numbers from 0 up"),
    "labels beyond int64": ({"y_train": np.arange(12, dtype=np.uint64) + 2**63}, "y_train must be whole numbers"),
    "labels that number people": ({"y_train": np.arange(12) + 4 * 10**12}, "y_train must be.*below 1,000,000"),
    "labels of another length": ({"y_train": np.arange(11) % 4}, "12 training images but 11 labels"),
    "one-hot labels": ({"y_test": np.eye(4, dtype=int)[np.arange(6) % 4]}, "6 test images but 24 labels"),
    "one class": ({"y_train": np.zeros(12, int)}, "one class only"),
    "no training images": ({"x_train": np.zeros((0, 9, 9, 3), np.uint8), "y_train": np.zeros(0, int)}, "no training"),
    "no test images": ({"x_test": np.zeros((0, 9, 9, 3), np.uint8), "y_test": np.zeros(0, int)}, "no test images"),
    "other size in test": ({"x_test": np.zeros((6, 10, 10, 3), np.uint8)}, "training images are.*test images"),
    "too small": ({"x_train": random_images(12, 7), "x_test": random_images(6, 7)}, "7 x 7 are too small; 8 x 8"),
    "not square": (
        {"x_train": np.zeros((12, 8, 9, 3), np.uint8), "x_test": np.zeros((6, 8, 9, 3), np.uint8)},
        "8 x 9; they must be square",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_npz_that_cannot_be_trained_on_is_an_error_that_says_why(tmp_path, case):
    changes, words = BAD_ARRAYS[case]
    with pytest.raises(InputError, match=words):
        load_set(write_npz(tmp_path / "bad.npz", **changes))


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("key", ["y_train", "extra"])
def test_npz_with_pickled_objects_runs_no_code(tmp_path, key):
    mark = tmp_path / "ran"
    objects = np.array([Malicious(mark)] * 12, dtype=object)
    name = write_npz(tmp_path / "evil.npz", **{key: objects})
    if key == "extra":
        assert len(load_set(name).x_train) == 12  # arrays that are not needed are never opened
    else:
        with pytest.raises(InputError, match="cannot be read"):
            load_set(name)
    assert not mark.exists()


def test_a_pickle_that_calls_itself_npz_runs_no_code(tmp_path):
    import pickle

    mark = tmp_path / "ran"
    (tmp_path / "evil.npz").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(InputError, match="cannot be read"):
        load_set(f"npz:{tmp_path / 'evil.npz'}")
    assert not mark.exists()


def test_damaged_npz_is_an_error_wherever_the_damage_is(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    good = buffer.getvalue()
    path = tmp_path / "damaged.npz"
    rng = np.random.default_rng(0)
    for length in (0, 1, 4, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(InputError, match="cannot be read"):
            load_set(f"npz:{path}")
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(bad))
        try:
            load_set(f"npz:{path}")  # a changed time stamp, say, does no harm
        except InputError:
            refused += 1
    assert refused > 50


def test_a_failure_without_words_is_still_an_error_with_words(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise EOFError  # what zipfile raises where an archive ends too early

    name = write_npz(tmp_path / "mine.npz")
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(InputError, match=r"mine\.npz cannot be read \(EOFError\)"):
        load_set(name)


def test_missing_npz_and_a_folder_in_its_place_are_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_set(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_set(f"npz:{tmp_path / 'folder.npz'}")


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


def test_fashion_mnist_is_read_from_the_files_that_torchvision_keeps(tmp_path):
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
def test_a_set_that_cannot_be_downloaded_is_one_sentence_that_names_data_dir(tmp_path, monkeypatch, name, cls, failure):
    def fail(_self):
        raise failure

    monkeypatch.setattr(getattr(torchvision.datasets, cls), "download", fail)
    with pytest.raises(InputError, match="--data-dir") as error:
        load_set(name, str(tmp_path / "new"))
    text = str(error.value)
    assert "\n" not in text
    assert f"--data {name}" in text
    assert str(tmp_path / "new") in text


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def write_folder(root, counts, size=8, channels=3, parts=("train", "test")):
    """Write random images in root/PART/CLASS; return {part: {class: [array]}}."""
    written, seed = {}, 0
    for part in parts:
        for name, count in counts.items():
            for n in range(count):
                seed += 1
                array = random_images(1, size, channels, seed)[0]
                save(root / part / name / f"{n:03}.png", array[..., 0] if channels == 1 else array)
                written.setdefault(part, {}).setdefault(name, []).append(array)
    return written


def test_a_folder_with_train_and_test_keeps_its_images_and_class_names(tmp_path):
    written = write_folder(tmp_path, {"zebra": 3, "ant": 2})
    data = load_set(f"folder:{tmp_path}")
    assert data.classes == ("ant", "zebra")
    for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        expected = [(image, label) for label, name in enumerate(("ant", "zebra")) for image in written[part][name]]
        assert y.tolist() == [label for _, label in expected]
        assert np.array_equal(x, np.stack([image for image, _ in expected]))
        assert (x.dtype, y.dtype) == (np.uint8, np.int64)


def test_a_folder_may_call_its_test_part_val(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 3}, parts=("train", "val"))
    data = load_set(f"folder:{tmp_path}")
    assert (len(data.x_train), len(data.x_test)) == (5, 5)


def test_a_folder_in_one_part_is_split_80_to_20_in_every_class(tmp_path):
    for name, count in (("a", 10), ("b", 5)):
        for n in range(count):
            save(tmp_path / name / f"{n}.png", np.full((8, 8), 20 * n + (name == "b"), np.uint8))
    data, again = load_set(f"folder:{tmp_path}"), load_set(f"folder:{tmp_path}")
    assert np.bincount(data.y_train).tolist() == [8, 4]
    assert np.bincount(data.y_test).tolist() == [2, 1]
    numbers = [int(x[0, 0, 0]) for x in (*data.x_train, *data.x_test)]
    assert sorted(numbers) == sorted([20 * n for n in range(10)] + [20 * n + 1 for n in range(5)])
    for x, y in zip((*data.x_train, *data.x_test), (*data.y_train, *data.y_test)):
        assert int(x[0, 0, 0]) % 2 == y
    assert np.array_equal(data.x_test, again.x_test)


def test_train_and_test_with_other_classes_are_an_error_that_names_them(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, parts=("train",))
    write_folder(tmp_path, {"a": 2, "c": 2}, parts=("test",))
    with pytest.raises(InputError, match=r"train and test differ in their classes \(b, c\)"):
        load_set(f"folder:{tmp_path}")


def test_train_without_test_is_not_taken_for_a_class(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, parts=("train",))
    with pytest.raises(InputError, match=r"holds a folder train, but none called test \(or val\)"):
        load_set(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"bus": 5, "train": 5}, parts=("",))
    assert load_set(f"folder:{tmp_path}").classes == ("bus", "train")


def test_gray_images_have_one_channel(tmp_path):
    written = write_folder(tmp_path, {"a": 2, "b": 2}, channels=1)
    data = load_set(f"folder:{tmp_path}")
    assert data.channels == len(data.mean) == 1
    assert np.array_equal(data.x_train, np.stack([*written["train"]["a"], *written["train"]["b"]]))


def test_a_colour_image_among_gray_ones_makes_three_channels(tmp_path):
    written = write_folder(tmp_path, {"a": 2, "b": 2}, channels=1)
    colour = random_images(1, seed=77)[0]
    save(tmp_path / "train" / "b" / "000.png", colour)
    data = load_set(f"folder:{tmp_path}")
    assert data.x_train.shape == (4, 8, 8, 3)
    assert data.x_test.shape == (4, 8, 8, 3)
    assert np.array_equal(data.x_train[2], colour)
    for c in range(3):
        assert np.array_equal(data.x_train[0][..., c], written["train"]["a"][0][..., 0])
        assert np.array_equal(data.x_test[0][..., c], written["test"]["a"][0][..., 0])


def test_palette_images_have_their_colours(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    places = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    image = Image.fromarray(places).convert("P")
    image = Image.frombytes("P", (8, 8), places.tobytes())
    image.putpalette([255, 0, 0, 0, 200, 0, 10, 20, 30])
    image.save(tmp_path / "train" / "a" / "000.png")
    data = load_set(f"folder:{tmp_path}")
    colours = [(255, 0, 0), (0, 200, 0), (10, 20, 30)]
    for i in range(8):
        for j in range(8):
            assert tuple(data.x_train[0, i, j].tolist()) == colours[places[i, j]]


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1), (8, 1)])
def test_images_are_turned_upright_as_their_exif_says(tmp_path, orientation, turns):
    write_folder(tmp_path, {"a": 2, "b": 2})
    stored = random_images(1, seed=50)[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "train" / "a" / "000.png", stored, exif=exif)
    data = load_set(f"folder:{tmp_path}")
    assert np.array_equal(data.x_train[0], np.rot90(stored, turns))
    assert not np.array_equal(data.x_train[0], stored)


def test_images_of_other_sizes_need_image_size_and_the_file_is_named(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    odd = tmp_path / "train" / "b" / "001.png"
    save(odd, random_images(1, 10)[0])
    with pytest.raises(InputError, match="--image-size") as error:
        load_set(f"folder:{tmp_path}")
    assert str(odd) in str(error.value)
    assert "10 x 10" in str(error.value)
    assert load_set(f"folder:{tmp_path}", image_size=8).x_train.shape == (4, 8, 8, 3)


def test_other_sizes_in_test_and_images_that_are_not_square_need_image_size_too(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, size=8, parts=("train",))
    write_folder(tmp_path, {"a": 2, "b": 2}, size=12, parts=("test",))
    with pytest.raises(InputError, match="--image-size"):
        load_set(f"folder:{tmp_path}")
    assert load_set(f"folder:{tmp_path}", image_size=8).x_test.shape == (4, 8, 8, 3)
    for part in ("train", "test"):
        for name in "ab":
            for n in range(2):
                save(tmp_path / part / name / f"{n:03}.png", np.zeros((8, 10, 3), np.uint8))
    with pytest.raises(InputError, match=r"square.*--image-size"):
        load_set(f"folder:{tmp_path}")


def test_image_size_resizes_to_a_square(tmp_path):
    quarters = np.zeros((32, 48, 3), np.uint8)
    quarters[:16, :24], quarters[:16, 24:], quarters[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    for part in ("train", "test"):
        for name in "ab":
            save(tmp_path / part / name / "0.png", quarters)
    data = load_set(f"folder:{tmp_path}", image_size=16)
    assert data.image_size == 16
    for image in (*data.x_train, *data.x_test):
        assert image.shape == (16, 16, 3)
        for rows, columns, colour in (
            (slice(0, 7), slice(0, 7), (250, 0, 0)),
            (slice(0, 7), slice(9, 16), (0, 250, 0)),
            (slice(9, 16), slice(0, 7), (0, 0, 250)),
            (slice(9, 16), slice(9, 16), (0, 0, 0)),
        ):
            assert (image[rows, columns] == colour).all()


def test_images_below_8_pixels_are_too_small(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, size=7)
    with pytest.raises(InputError, match="too small"):
        load_set(f"folder:{tmp_path}")
    assert load_set(f"folder:{tmp_path}", image_size=8).image_size == 8


@pytest.mark.parametrize("content", [b"", b"no image", "half a png", "half a jpeg"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    write_folder(tmp_path, {"a": 2, "b": 2})
    if isinstance(content, str):
        buffer = io.BytesIO()
        Image.fromarray(random_images(1)[0]).save(buffer, content.split()[-1])
        content = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    bad = tmp_path / "test" / "b" / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        load_set(f"folder:{tmp_path}")
    assert str(bad) in str(error.value)


def test_an_image_too_big_to_be_honest_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a": 2, "b": 2})
    big = tmp_path / "train" / "a" / "big.png"
    save(big, random_images(1, 40)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        load_set(f"folder:{tmp_path}", image_size=8)
    assert str(big) in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_images_of_16_bits_are_scaled_and_not_clipped_to_white(tmp_path, dtype):
    write_folder(tmp_path, {"a": 2, "b": 2}, channels=1)
    deep = np.arange(64).reshape(8, 8) * 1000
    save(tmp_path / "train" / "a" / "deep.tiff", deep.astype(dtype))
    data = load_set(f"folder:{tmp_path}")
    assert any((image[..., 0] == deep // 256).all() for image in data.x_train)


def test_floating_point_images_are_refused(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, channels=1)
    deep = tmp_path / "train" / "a" / "deep.tiff"
    save(deep, (np.arange(64).reshape(8, 8) * 1000).astype(np.float32))
    with pytest.raises(InputError, match="8 or 16 bits") as error:
        load_set(f"folder:{tmp_path}")
    assert str(deep) in str(error.value)


def test_unequal_classes_are_told():
    labels = np.repeat([0, 1, 2], [20, 5, 9])
    images = np.zeros((34, 8, 8, 1), np.uint8)
    data = ImageSet("x", images, labels, images, labels, ("ant", "bee", "cat"), mean=(0.5,), std=(0.5,))
    assert data.imbalance(np.arange(34)) == "classes are unequal: 20 training images of ant, 5 of bee"
    assert data.imbalance(np.arange(15, 34)) is None or "cat" in data.imbalance(np.arange(15, 34))
    assert data.imbalance(np.array([0, 1, 20, 21, 25, 26])) is None


def test_gray_is_repeated_and_colour_made_gray():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(6) % 2
    data = ImageSet("x", images, labels, images, labels, ("a", "b"))
    three = data.with_channels(3)
    assert three.channels == 3
    assert (three.x_train == images).all()
    assert three.mean == data.mean * 3
    assert (three.with_channels(1).x_test == images).all()


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        load_set(f"folder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--data folder:.*find any class folder"):
        load_set(f"folder:{tmp_path / 'empty'}")
    write_folder(tmp_path / "half", {"a": 2, "b": 2})
    (tmp_path / "half" / "train" / "c").mkdir()
    (tmp_path / "half" / "test" / "c").mkdir()
    with pytest.raises(InputError, match="no valid file for the classes c"):
        load_set(f"folder:{tmp_path / 'half'}")
    write_folder(tmp_path / "one", {"a": 4})
    with pytest.raises(InputError, match="one class only"):
        load_set(f"folder:{tmp_path / 'one'}")
    write_folder(tmp_path / "single", {"a": 1, "b": 1}, parts=("",))
    with pytest.raises(InputError, match="no test images"):
        load_set(f"folder:{tmp_path / 'single'}")
