"""Sets in folders of image files."""

import io

import numpy as np
import pytest
from PIL import Image

from codistill.data import ImageSet, load_set
from codistill.data.image_folder import load_folder
from codistill.utils.errors import InputError
from helpers.images import random_images


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


def test_a_folder_keeps_its_parts_images_and_class_names(tmp_path):
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


def test_different_classes_in_train_and_test_are_named(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, parts=("train",))
    write_folder(tmp_path, {"a": 2, "c": 2}, parts=("test",))
    with pytest.raises(InputError, match=r"train and test differ in their classes \(b, c\)"):
        load_set(f"folder:{tmp_path}")


def test_train_without_test_is_not_taken_for_a_class(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, parts=("train",))
    with pytest.raises(InputError, match=r"has a folder train, but none called test \(or val\)"):
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


def test_images_of_other_sizes_need_image_size(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    odd = tmp_path / "train" / "b" / "001.png"
    save(odd, random_images(1, 10)[0])
    with pytest.raises(InputError, match="--image-size") as error:
        load_set(f"folder:{tmp_path}")
    assert str(odd) in str(error.value)
    assert "10 x 10" in str(error.value)
    assert load_set(f"folder:{tmp_path}", image_size=8).x_train.shape == (4, 8, 8, 3)


def test_other_test_sizes_and_non_square_images_need_image_size(tmp_path):
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
    with pytest.raises(InputError, match=r"--data folder:.*there is no folder of a class"):
        load_set(f"folder:{tmp_path / 'empty'}")
    write_folder(tmp_path / "half", {"a": 2, "b": 2})
    (tmp_path / "half" / "train" / "c").mkdir()
    (tmp_path / "half" / "test" / "c").mkdir()
    with pytest.raises(InputError, match="no image file is in the class c"):
        load_set(f"folder:{tmp_path / 'half'}")
    write_folder(tmp_path / "one", {"a": 4})
    with pytest.raises(InputError, match="one class only"):
        load_set(f"folder:{tmp_path / 'one'}")
    write_folder(tmp_path / "single", {"a": 1, "b": 1}, parts=("",))
    with pytest.raises(InputError, match="no test images"):
        load_set(f"folder:{tmp_path / 'single'}")


@pytest.mark.parametrize("names", [("train", "check"), ("first", "test"), ("val", "test")])
def test_a_part_of_another_name_is_not_taken_for_a_class(names, tmp_path):
    for part in names:
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / kind / "1.png")
    with pytest.raises(InputError, match=r"contains only folders, so it and .* are parts and not classes"):
        load_folder(tmp_path)
    for kind in ("train", "plane"):  # a vehicle, with images of its own
        (tmp_path / "vehicles" / kind).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (8, 8)).save(tmp_path / "vehicles" / kind / f"{n}.png")
    assert load_folder(tmp_path / "vehicles").classes == ("plane", "train")
