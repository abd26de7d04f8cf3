"""Folders and data sets that hold other things than the images of classes: stray files, other names, narrow ranges."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from codistill.data import ImageSet, load_set, sample_checksum, with_normalization
from codistill.data.folder_listing import list_parts
from codistill.data.image_folder import load_folder
from codistill.utils.errors import InputError
from helpers.folders import write_images
from helpers.images import random_images


def test_a_list_of_files_beside_the_classes_of_a_part_changes_nothing(tmp_path):
    write_images(tmp_path, per_class=2, parts=("train", "eval"))
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "ant"):
        (place / "labels.csv").write_text("file,label")
    classes, parts, left_out = list_parts(tmp_path)
    assert (classes, [*parts]) == (("ant", "bee", "cat"), ["train", "val"])
    assert (left_out.loose, left_out.endings) == (1, {".csv": 1})
    assert "files beside the folders of the classes are left out: 1" in left_out.messages()


def test_a_part_whose_images_are_in_no_class_is_named(tmp_path):
    write_images(tmp_path, per_class=2, parts=("train",))
    (tmp_path / "test").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "test" / "1.png")
    with pytest.raises(InputError, match="train has a folder for each class and test has not; sort its images"):
        list_parts(tmp_path)


def test_folders_that_network_drives_add_are_no_classes(tmp_path):
    write_images(tmp_path / "a", per_class=2, parts=("",))
    names = ("@Recycle", "@tmp", "#snapshot", "Network Trash Folder", "@eaDir", "__MACOSX")
    for name in names:
        (tmp_path / "a" / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / "a" / name / "1.png")
    (tmp_path / "a" / "ant" / "Icon\r").touch()
    classes, _, left_out = list_parts(tmp_path / "a")
    assert classes == ("ant", "bee", "cat")
    assert left_out.messages() == [
        "hidden and system folders are left out: #snapshot, @Recycle, @eaDir, @tmp, Network Trash Folder and 1 more"
    ]


def test_a_class_of_which_no_image_can_be_read_is_refused(tmp_path):
    write_images(tmp_path, per_class=3, parts=("train", "test"))
    for n in range(3):
        (tmp_path / "train" / "bee" / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no training image of the class bee can be read"):
        load_folder(tmp_path, 16, skip_corrupt=True)


@pytest.mark.parametrize("pipeline", ["resident", "files"])
def test_other_contents_under_the_same_names_are_noticed(pipeline, tmp_path):
    """Ranks of a job compare this; `checksum` is of the names, so that a run goes on where a file was repaired."""
    sets = []
    for name in ("a", "b", "c"):
        write_images(tmp_path / name, per_class=3, parts=("train", "test"))
        if name == "c":
            Image.new("RGB", (30, 30)).save(tmp_path / "c" / "test" / "cat" / "1.png")
        sets.append(load_folder(tmp_path / name, 16, pipeline))
    assert len({data.checksum() for data in sets}) == 1
    checksums = [*map(sample_checksum, sets)]
    assert checksums[0] == checksums[1] != checksums[2]
    assert sample_checksum(load_set("digits")) == ""


# -- class numbers -----------------------------------------------------------------------------------------------------


class Listed(list):
    """Pairs that list their classes in one of the ways that data sets have."""

    def __init__(self, labels, **attributes):
        super().__init__((random_images(1, seed=n)[0], label) for n, label in enumerate(labels))
        self.__dict__ |= attributes


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ({"class_to_idx": {"cat": 0, "dog": 1, "fox": 2}}, {"class_to_idx": {"fox": 1, "dog": 0}}),
        ({"classes": np.array(["cat", "dog", "fox"])}, {"classes": ("dog", "fox")}),
        ({"classes": {0: "cat", 1: "dog", 2: "fox"}}, {"classes": {"dog": 0, "fox": 1}}),
    ],
)
def test_names_are_matched_however_a_data_set_lists_them(train, test, lazy):
    data = ImageSet.from_dataset(Listed([0, 1, 2] * 4, **train), Listed([0, 1, 1], **test), lazy=lazy)
    assert data.classes == ("cat", "dog", "fox")
    assert data.y_test.tolist() == [1, 2, 2]


def test_labels_that_cannot_be_matched_by_names_are_told():
    named, bare = Listed([0, 1, 2] * 4, classes=["cat", "dog", "fox"]), Listed([0, 1])
    messages = ImageSet.from_dataset(named, bare).provenance.messages
    assert messages == (
        "the test data lists no class names, so the test data's labels are taken as numbers of the training data's "
        "classes",
    )
    changed = Listed([1, 2], classes=["dog", "fox"], target_transform=lambda label: label + 1)
    data = ImageSet.from_dataset(named, changed)
    assert data.y_test.tolist() == [1, 2]  # the transform has numbered them
    assert "labels are transformed" in data.provenance.messages[0]
    assert not ImageSet.from_dataset(bare, bare, classes=["a", "b"]).provenance.messages
    with pytest.raises(InputError, match="of equal names"):
        ImageSet.from_dataset(Listed([0, 1, 2], classes=["dog", "dog", "fox"]), Listed([0], classes=["dog"]))


# -- ranges ------------------------------------------------------------------------------------------------------------


def write_levels(root, levels, write, count=4):
    for name, level in levels.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            write(root / name / f"{n}.png", np.full((16, 16), level + n, np.uint16))
    return root


def gray(path, pixels):
    Image.fromarray(pixels).save(path)


def with_a_hot_pixel(path, pixels):
    pixels[3, 3] = 65_535
    gray(path, pixels)


def color(path, pixels):
    """Write a color PNG of 16 bits a channel, which Pillow cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.repeat(pixels[..., None], 3, axis=2).astype(">u2")
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("levels", "write", "message"),
    [
        (
            {"dim": 1100, "bright": 1200},
            gray,
            "use values up to 1,203 only, of 65,535, so .* --bits 11 reads that range$",
        ),
        ({"dim": 1100, "bright": 1200}, with_a_hot_pixel, r"most pixels .* up to 1,200 only.* --bits 11 .* \(brighter"),
        ({"dim": 32_900, "bright": 33_000}, gray, "use values from 32,900 to 33,003 only, .*; stretch them"),
        ({"dim": 1100, "bright": 1200}, color, "color files of 16 bits .* up to 4 only, of 255; stretch them"),
        ({"dim": 20_000, "bright": 50_000}, gray, None),
        ({"dim": 20_000, "bright": 50_000}, color, None),
    ],
)
def test_a_small_part_of_the_range_of_sixteen_bits_is_told(levels, write, message, tmp_path):
    messages = load_folder(write_levels(tmp_path, levels, write)).provenance.messages
    assert len(messages) == (message is not None)
    assert message is None or re.search(message, messages[0]), messages


@pytest.mark.parametrize("lazy", [False, True])
def test_given_images_of_sixteen_bits_are_told_too(lazy):
    pairs = [(Image.fromarray(np.full((16, 16), 1100 + 100 * (n % 2), np.uint16)), n % 2) for n in range(10)]
    with pytest.warns(UserWarning, match="up to 1,200 only, of 65,535, .*; stretch them to 0 to 255"):
        ImageSet.from_dataset(pairs, lazy=lazy)


@pytest.mark.parametrize("kind", ["npz", "files", "given"])
def test_a_set_of_one_color_is_told(kind, tmp_path):
    pixels, labels = np.full((20, 16, 16, 3), 7, np.uint8), np.arange(20) % 2
    if kind == "npz":
        np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
        data = load_set(f"npz:{tmp_path / 'a.npz'}")
    elif kind == "files":
        write = lambda path, _: Image.fromarray(pixels[0]).save(path)  # noqa: E731
        data = load_folder(write_levels(tmp_path / "a", {"a": 0, "b": 0}, write), pipeline="files")
    else:
        data = ImageSet.from_dataset([*zip(pixels, labels.tolist())])
    assert "all training images are of one and the same color" in with_normalization(data, None, {}).provenance.messages
