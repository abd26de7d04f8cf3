"""Sets in npz files: what they may hold, damage, and code that must not run."""

import io

import numpy as np
import pytest

from codistill.data import load_set
from codistill.utils.errors import InputError
from helpers.images import Malicious, arrays, random_images, write_npz


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
    "channels first in both": (
        {"x_train": np.zeros((12, 3, 9, 9), np.uint8), "x_test": np.zeros((6, 3, 9, 9), np.uint8)},
        "images are 3 x 9 x 9, channels first; give them as N x H x W x C",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_npz_that_cannot_be_trained_on_is_an_error_that_says_why(tmp_path, case):
    changes, words = BAD_ARRAYS[case]
    with pytest.raises(InputError, match=words):
        load_set(write_npz(tmp_path / "bad.npz", **changes))


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


@pytest.mark.parametrize("shape", [(0, 0, 3), (3, 0, 0), (0, 8, 3), (8, 8, 0)])
def test_images_without_pixels_are_an_error(shape, tmp_path):
    x = np.zeros((4, *shape), np.uint8)
    y = np.arange(4) % 2
    np.savez(tmp_path / "none.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(InputError, match=r"--data npz:.*none\.npz: "):
        load_set(f"npz:{tmp_path / 'none.npz'}")
