"""Folders, files and labels as people have them: other names, hidden files, odd formats, labels that are none."""

import os
import struct
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from codistill.config import Config
from codistill.data import FileLoader, ImageSet, count_trained_images, decode, load_set
from codistill.data.decode import FORMATS, fit_square, hash_content, open_upright
from codistill.data.external_test_set import match_classes
from codistill.data.folder_listing import list_judged_part
from codistill.data.image_folder import load_folder
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.methods.base import check_targets
from codistill.utils import set_progress_display
from codistill.utils.errors import InputError
from codistill.utils.shares import share_out
from helpers.folders import train_on, write_images
from helpers.images import pixel_loader, random_images, whole_epoch


def write(root, counts, size=8, first=0):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            Image.fromarray(random_images(1, size, seed=first + n)[0]).save(root / name / f"{n}.png")
    return root


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "down"), [(("Train", "Test"), ""), (("training_set", "testing"), ""), (("train", "valid"), "archive")]
)
def test_parts_are_found_by_their_usual_names(names, down, tmp_path):
    write(tmp_path / down / names[0], {"cat": 4, "dog": 3})
    write(tmp_path / down / names[1], {"cat": 2, "dog": 2})
    data = load_folder(tmp_path)
    assert data.classes == ("cat", "dog")
    assert (len(data.y_train), len(data.y_test)) == (7, 4)
    assert len(list_judged_part(tmp_path)[0].labels) == 4


def test_valid_beside_train_and_test_is_the_validation_part(tmp_path):
    for part, count in (("train", 5), ("valid", 3), ("test", 2)):
        write(tmp_path / part, {"cat": count, "dog": count})
    data = load_folder(tmp_path)
    assert (len(data.y_train), data.num_val, len(data.y_test)) == (16, 6, 4)


def test_two_folders_of_one_part_are_refused(tmp_path):
    for part in ("val", "valid", "train"):
        write(tmp_path / part, {"cat": 1, "dog": 1})
    with pytest.raises(InputError, match="val and valid are both the part val"):
        load_folder(tmp_path)


def test_what_is_left_out_is_told(tmp_path):
    for part in ("train", "test", ".cache"):
        write(tmp_path / part, {"cat": 3, "dog": 3, ".thumbnails": 1, "__MACOSX": 1})
    write(tmp_path, {"extra": 1})
    (tmp_path / "train" / "cat" / "a.heic").write_text("")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_text("")
    data = load_folder(tmp_path)
    assert data.classes == ("cat", "dog")
    said = " ".join(data.provenance.messages)
    assert "folders beside the parts are left out: extra" in said
    assert "hidden and system folders are left out: .thumbnails, __MACOSX" in said
    assert "1 files are left out for their endings (.heic 1)" in said


def test_names_that_differ_in_their_unicode_form_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    write(tmp_path / "train", {apart: 2, "x": 2})
    write(tmp_path / "test", {composed: 2, "x": 2})
    assert load_folder(tmp_path).classes == ("x", composed)
    assert match_classes("folder:x", ("x", composed), (apart, "x"))[0].tolist() == [1, 0]


def test_files_of_all_listed_endings_are_read(tmp_path):
    write(tmp_path, {"cat": 5, "dog": 5})
    for number, (kind, endings) in enumerate(FORMATS.items()):
        for ending in endings:
            Image.new("RGB", (8, 8)).save(tmp_path / "cat" / f"{kind}{number}{ending.upper()}", format=kind)
    data = load_folder(tmp_path)
    assert len(data.y_train) + len(data.y_test) == 10 + sum(map(len, FORMATS.values()))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_photograph_whose_exif_cannot_be_written_again_is_turned(tmp_path):
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x0128, 5, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 0, 0)
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright, _ = open_upright(tmp_path / "x.jpg")
    assert upright.size == (8, 16)
    assert np.asarray(upright)[:, 5:].min() > 200


def test_only_listed_formats_are_decoded(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="its content is none of JPEG, PNG"):
        open_upright(tmp_path / "x.png")


def test_no_fifo_device_or_folder_is_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for path in (tmp_path / "x.png", "/dev/zero", tmp_path):
        with pytest.raises(InputError, match="it is no regular file"):
            open_upright(path)


def test_a_link_to_itself_is_an_unreadable_file(tmp_path):
    folder = write(tmp_path / "images", {"ant": 6, "bee": 6})
    (folder / "ant" / "loop.png").symlink_to("loop.png")
    with pytest.raises(InputError, match=r"loop.png cannot be read as an image \(Too many levels of symbolic links\)"):
        load_set(f"folder:{folder}")
    (folder / "loop").symlink_to("loop")  # beside the classes
    messages = load_set(f"folder:{folder}", skip_corrupt=True).provenance.messages
    assert any("1 image files cannot be read and are left out" in message for message in messages)


def test_images_larger_than_the_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "images", parts=("train", "test"))
    monkeypatch.setattr("codistill.data.image_folder.physical_memory", lambda: 2**30)
    with pytest.raises(InputError, match=r"decoded images take .* GiB, and this machine has 1.0; .* --image-size"):
        load_set(f"folder:{folder}", image_size=4096, pipeline="resident")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("broken"), KeyError("x"), RecursionError()])
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")

    def fail(*_):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(InputError, match=r"x.png cannot be read as an image"):
        open_upright(tmp_path / "x.png")


def test_more_pixels_than_the_limit_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 1599)
    with pytest.raises(InputError, match=r"40 x 40 pixels; the limit is 1,599"):
        open_upright(tmp_path / "x.png")


def test_a_long_narrow_image_is_cropped_before_it_is_resized():
    pixels = np.zeros((2, 40_000, 3), np.uint8)
    pixels[:, 19_990:20_010] = 200
    square = fit_square(Image.fromarray(pixels), 224, crop=True)
    assert square.size == (224, 224)
    assert np.asarray(square).min() == 200
    wide = Image.fromarray(random_images(1, 64)[0]).resize((300, 40))  # both ways agree away from the edge
    usual = np.asarray(fit_square(wide, 28, crop=True)).astype(int)
    decode_limit, decode.MAX_RESIZED_PIXELS = decode.MAX_RESIZED_PIXELS, 1
    try:
        cropped = np.asarray(fit_square(wide, 28, crop=True)).astype(int)
    finally:
        decode.MAX_RESIZED_PIXELS = decode_limit
    assert abs(usual - cropped)[2:-2, 2:-2].max() <= 12


def test_modes_have_their_colors(tmp_path):
    for name, image, color in (
        ("one.png", Image.new("1", (8, 8), 1), (255, 255, 255)),
        ("la.png", Image.new("LA", (8, 8), (90, 0)), (255, 255, 255)),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (254, 0, 0)),
        ("p.gif", Image.new("RGB", (8, 8), (10, 200, 30)).quantize(2), (10, 200, 30)),
    ):
        image.save(tmp_path / name)
        assert np.asarray(open_upright(tmp_path / name)[0])[3, 3].tolist() == pytest.approx(color, abs=2), name
    frames = [Image.new("RGB", (8, 8), c) for c in ((200, 0, 0), (0, 200, 0))]
    for ending in ("gif", "png", "webp"):
        path = tmp_path / f"frames.{ending}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {})
        )
        assert np.asarray(open_upright(path)[0])[3, 3].tolist() == [200, 0, 0], ending


def test_a_narrow_range_of_sixteen_bits_is_told_and_read(tmp_path):
    for name, level in (("bright", 1200), ("dim", 1100)):
        (tmp_path / name).mkdir()
        for n in range(5):
            Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / name / f"{n}.png")
    assert "--bits 11" in " ".join(load_folder(tmp_path).provenance.messages)
    data = load_set(f"folder:{tmp_path}", bits=12)
    assert sorted({int(x[0, 0, 0]) for x in data.x_train}) == [1100 >> 4, 1200 >> 4]
    assert data.metadata()["bits"] == 12
    assert "bits" not in load_folder(tmp_path).metadata()


def test_images_that_were_trained_on_are_noticed(tmp_path):
    write(tmp_path / "a", {"cat": 6, "dog": 6})
    data = load_folder(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    files = list_judged_part(tmp_path / "moved")[0].files
    assert count_trained_images(files, data.provenance.content_hashes) == len({*data.provenance.content_hashes}) * 2
    write(tmp_path / "b", {"cat": 3}, first=50)
    assert count_trained_images(list_judged_part(tmp_path / "b")[0].files, data.provenance.content_hashes) == 0
    assert hash_content(tmp_path / "none") == 0


def test_other_contents_under_the_same_names_are_no_ground_to_go_on(tmp_path, capsys):
    write_images(tmp_path / "images", parts=("train", "test"))
    assert train_on(tmp_path / "images", tmp_path / "run") == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "run" / "result.json").unlink()  # as if killed before the test set was read
    assert train_on(tmp_path / "moved", tmp_path / "run", "--resume", "auto") == 0
    write_images(tmp_path / "other", parts=("train", "test"), seed=1)
    (tmp_path / "run" / "result.json").unlink()
    capsys.readouterr()
    assert train_on(tmp_path / "other", tmp_path / "run", "--resume", "auto") == 2
    assert "21 of the 21 training images are not those that the run" in capsys.readouterr().err


def test_files_that_are_judged_show_their_progress(tmp_path):
    files = list_judged_part(write_images(tmp_path, parts=("cat",)) / "cat")[0]
    loader = FileLoader(
        replace(files.files, size=8), files.labels, (0.5,) * 3, (0.5,) * 3, LoaderOptions(batch_size=10)
    )
    shown = []
    set_progress_display(lambda items, text: shown.append((len(items), text)) or (item for item in items))
    try:
        assert len([*loader.epoch()]) == 3
    finally:
        set_progress_display(None)
    assert shown == [(3, "decoding batches")]


# -- sets from Python, labels ------------------------------------------------------------------------------------------


class Named(list):
    """Pairs with class names."""

    def __init__(self, pairs, classes):
        super().__init__(pairs)
        self.classes = classes


def pairs(labels):
    return [(random_images(1, seed=n)[0], label) for n, label in enumerate(labels)]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_test_set_that_numbers_its_classes_otherwise_is_matched_by_names(lazy):
    train, test = Named(pairs([0, 1, 2] * 4), ["cat", "dog", "fox"]), Named(pairs([0, 1]), ["dog", "fox"])
    assert ImageSet.from_dataset(train, test, lazy=lazy).y_test.tolist() == [1, 2]
    both = ConcatDataset([Subset(test, [1]), Subset(test, [0])])
    data = ImageSet.from_dataset(Subset(train, range(9)), both, lazy=lazy)
    assert data.classes == ("cat", "dog", "fox")
    assert data.y_test.tolist() == [2, 1]
    with pytest.raises(InputError, match="the classes wolf, which the training data does not list"):
        ImageSet.from_dataset(train, Named(pairs([0]), ["wolf"]), lazy=lazy)
    with pytest.raises(InputError, match="number their classes differently"):
        ImageSet.from_dataset(ConcatDataset([train, test]), lazy=lazy)


def test_a_set_says_itself_in_one_line():
    text = repr(ImageSet.from_dataset(pairs([0, 1] * 5)))
    assert text == "ImageSet('python:given', 8 training and 2 test images of 8 x 8 x 3, 2 classes)"


def test_labels_with_a_gap_of_a_million_are_refused(tmp_path):
    x = random_images(4)
    np.savez(tmp_path / "x.npz", x_train=x, y_train=[0, 999_999, 0, 999_999], x_test=x, y_test=[0] * 4)
    with pytest.raises(InputError, match=r"1,000,000 classes, and training images of 2 of them"):
        load_set(f"npz:{tmp_path / 'x.npz'}")
    with pytest.raises(InputError, match=r"--peers is 1,000,000; give 1,000 or fewer"):
        Config("independent", "resnet8", "digits", peers=1_000_000).resolved()


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (torch.zeros(2, 1), "shape 2 x 1"),
        (torch.zeros(1, 3), "shape 1 x 3"),
        (torch.tensor([[1.0, 1, 0], [0, 1, 0]]), "no soft labels"),
        (torch.tensor([[1.5, -0.5, 0], [0, 1, 0]]), "no soft labels"),
        (torch.tensor([0, -100]), "a target is -100"),
        (torch.tensor([0, 3]), "a target is 3, which is none of the 3 classes"),
        (torch.tensor([0, 1], dtype=torch.uint8), r"torch.uint8; give class numbers as int64"),
        (torch.tensor([[0], [1]]), "shape 2 x 1"),
        ([0, 1], "a list"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets, sentence):
    with pytest.raises(InputError, match=sentence):
        check_targets(torch.zeros(4, 2, 3), targets)


def test_soft_labels_and_class_numbers_are_accepted():
    check_targets(torch.zeros(4, 2, 3), torch.tensor([0, 2]))
    check_targets(torch.zeros(4, 2, 3), torch.full((2, 3), 1 / 3))


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size", "lengths"), [(33, 16, [16, 17]), (17, 16, [17]), (34, 16, [16, 16, 2])])
def test_a_last_batch_of_one_joins_the_one_before(count, size, lengths):
    loader = pixel_loader(random_images(count), Augmentation(), batch_size=size)
    assert [len(labels) for _, labels in loader.epoch()] == lengths
    assert len(loader) == len(lengths)
    assert sorted(whole_epoch(loader)[1].tolist()) == [*range(count)]
    last = [labels.tolist() for _, labels in loader.epoch(0, len(lengths) - 1)]
    assert last == [[labels.tolist() for _, labels in loader.epoch()][-1]]
    judged = pixel_loader(random_images(count), batch_size=size)
    assert len(judged) == -(-count // size)


def test_no_share_of_a_batch_is_a_single_sample():
    for count in range(2, 40):
        for shares in range(1, 9):
            parts = share_out(count, shares)
            assert sum(parts) == count
            assert 1 not in parts
            assert parts == sorted(parts, reverse=True)
            if count >= 2 * shares:
                assert max(parts) - min(parts) <= 1


def test_unreadable_files_are_left_out_when_judging(tmp_path):
    write(tmp_path / "train", {"cat": 4, "dog": 4})
    write(tmp_path / "test", {"cat": 3, "dog": 3})
    (tmp_path / "test" / "cat" / "1.png").write_bytes(b"no image")
    from codistill.data import FileLoader, LoaderOptions

    data = load_set(f"folder:{tmp_path}", pipeline="files")
    options = LoaderOptions(batch_size=4)
    loader = FileLoader(data.x_test, data.y_test, (0.5,) * 3, (0.5,) * 3, options, skip_corrupt=True)
    with pytest.warns(UserWarning, match="it is left out"):
        views, labels = whole_epoch(loader)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert views.shape[1] == 5
