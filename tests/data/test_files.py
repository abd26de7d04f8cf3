"""Image files decoded in every epoch: what a batch holds depends on seed, epoch and place alone."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.cli.main import main
from codistill.config.config import Config
from codistill.data import FileLoader, load_set, make_splits
from codistill.data import image_files as files_module
from codistill.data import image_folder as folder_module
from codistill.data import lazy_images as lazy_module
from codistill.data.decode import fit_square, read_pixels
from codistill.data.image_files import ImageFiles
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.training.build import build_run
from codistill.utils.errors import InputError
from helpers.folders import write_images

VARIED = Augmentation(flip=True, resized_crop=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def loader_of(folder, size=16, augmentation=VARIED, **options):
    data = load_set(f"folder:{folder}", image_size=size, pipeline="files")
    options = {"batch_size": 5, "dtype": torch.float64, "seed": 3} | options
    decoding = {key: options.pop(key) for key in ("workers", "skip_corrupt") if key in options}
    options = LoaderOptions(augmentation=augmentation, **options)
    loader = FileLoader(data.x_train, data.y_train, (0.0,) * 3, (1 / 255,) * 3, options, **decoding)
    return loader, data


def whole_epoch(loader, epoch=0, start=0):
    batches = list(loader.epoch(epoch, start))
    return torch.cat([views for views, _ in batches], 1), torch.cat([labels for _, labels in batches])


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("augmentation", [VARIED, Augmentation(flip=True, resized_crop=True, cutout=5), None])
def test_workers_views_and_the_first_batch_change_nothing(folder, augmentation):
    views = 2 if augmentation else 1
    pixels, labels = whole_epoch(loader_of(folder, augmentation=augmentation, views=views)[0], epoch=4)
    by_workers, data = loader_of(folder, augmentation=augmentation, views=views, workers=2)
    for start in (0, 2):  # the second time with workers that live on
        tail, tail_labels = whole_epoch(by_workers, epoch=4, start=start)
        assert torch.equal(tail, pixels[:, 5 * start :])
        assert torch.equal(tail_labels, labels[5 * start :])
    assert pixels.shape == (views, 24, 3, 16, 16)
    alone, _ = whole_epoch(loader_of(folder, augmentation=augmentation)[0], epoch=4)
    if augmentation is None or not augmentation.cutout:
        assert torch.equal(alone[0], pixels[0])
    if augmentation is not None:
        assert not torch.equal(pixels[0], pixels[1])
        assert not torch.equal(whole_epoch(by_workers, epoch=5)[0], pixels)
        assert sorted(labels.tolist()) == sorted(data.y_train.tolist())
    if augmentation is not None and augmentation.cutout:
        blank = (pixels == 0).all(2).flatten(2).sum(-1)
        assert blank.min() >= 6  # a corner of the square at least
        assert blank.max() <= 25


def test_processes_decode_disjoint_parts_of_the_batch(folder, monkeypatch):
    opened = []
    original = ImageFiles.open
    monkeypatch.setattr(ImageFiles, "open", lambda files, index: opened.append(index) or original(files, index))
    whole = list(loader_of(folder, views=4)[0].epoch(1))
    parts, decoded = [], []
    for index in range(2):
        loader, _ = loader_of(folder, views=4)
        loader.shard(index, 2, range(2 * index, 2 * index + 2))
        opened.clear()
        parts.append(list(loader.epoch(1)))
        decoded.append(set(opened))
    assert decoded[0].isdisjoint(decoded[1])
    assert len(decoded[0] | decoded[1]) == 24
    for batch, (views, labels) in enumerate(whole):
        for index in range(2):
            own, own_labels = parts[index][batch]
            assert torch.equal(own_labels, labels)
            cut = (len(labels) + 1) // 2
            rows = slice(0, cut) if index == 0 else slice(cut, None)
            assert torch.equal(own, views[2 * index : 2 * index + 2, rows])


def test_nobodys_random_numbers_are_touched(folder):
    before = torch.get_rng_state()
    whole_epoch(loader_of(folder)[0])
    loader, _ = loader_of(folder, workers=1)
    whole_epoch(loader)
    assert loader.sample_batch().shape == (1, 5, 3, 16, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_cuts_the_centre_as_predict_does(folder):
    loader, data = loader_of(folder, augmentation=None)
    pixels, labels = whole_epoch(loader)
    assert labels.tolist() == data.y_train.tolist()
    for n in (0, 9, 23):
        expected = torch.from_numpy(read_pixels(data.x_train.path(n), 3, 16, crop=True).copy())
        assert (pixels[0, n] - expected).abs().max() < 1e-9
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = 255  # the middle half is white
    square = np.asarray(fit_square(Image.fromarray(wide), 16, crop=True))
    assert square.shape == (16, 16, 3)
    assert square.min() == 255
    already = Image.fromarray(wide[:16, :16])
    assert fit_square(already, 16, crop=True) is already


# ----------------------------------------------------------------------------------------------------------------------
# Sets


def test_a_large_folder_starts_without_being_decoded(tmp_path, monkeypatch):
    write_images(tmp_path, per_class=60, parts=("train", "val"), classes=("a", "b"))
    opened = []
    original = files_module.open_upright
    monkeypatch.setattr(files_module, "open_upright", lambda file, bits: opened.append(file) or original(file, bits))
    monkeypatch.setattr(lazy_module, "NUM_STATISTICS_IMAGES", 10)
    monkeypatch.setattr(folder_module, "RESIDENT_LIMIT", 240 * 16 * 16 * 3)
    assert not load_set(f"folder:{tmp_path}", image_size=16).from_files  # just fits
    monkeypatch.setattr(folder_module, "RESIDENT_LIMIT", 240 * 16 * 16 * 3 - 1)
    data = load_set(f"folder:{tmp_path}", image_size=16)
    assert data.from_files
    assert "240 image files" in data.provenance.messages[0]
    splits = make_splits(data, 0.1)
    assert np.bincount(data.y_train[splits.val]).tolist() == [6, 6]
    assert opened == []
    config = Config("dml", "resnet8", f"folder:{tmp_path}", image_size=16, peers=2, batch_size=16, device="cpu")
    t = build_run(config.resolved())
    assert len(opened) <= 10 + 8  # ten to normalise by, eight to try the networks on
    assert t.data.mean
    assert load_set(f"folder:{tmp_path}", pipeline="files").image_size == 224  # sizes differ and none is given


def test_a_folder_of_three_parts_validates_on_its_own(tmp_path):
    write_images(tmp_path, per_class=4, parts=("train", "val", "test"), classes=("a", "b"))
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    for pipeline in ("resident", "files"):
        data = load_set(f"folder:{tmp_path}", image_size=8, pipeline=pipeline, skip_corrupt=True)
        splits = make_splits(data, 0.1)
        val = data.x_train[splits.val]
        assert len(splits.val) == data.num_val == 8
        assert len(splits.train) == (8 if pipeline == "files" else 7)
        assert len(make_splits(data, 0.0).val) == 0
        assert len(make_splits(data, 0.0).train) == len(splits.train)  # left aside, not trained on
        if pipeline == "files":
            assert {val.path(n) for n in range(8)} == {str(p) for p in (tmp_path / "val").rglob("*.png")}


def test_odd_files_are_decoded_as_everywhere(tmp_path):
    write_images(tmp_path, per_class=3, classes=("a", "b"))
    place = tmp_path / "train" / "a"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    sideways = np.zeros((20, 20, 3), dtype=np.uint8)
    sideways[:10] = 255
    Image.fromarray(sideways).save(place / "x1.jpg", exif=exif)
    Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)).save(place / "x2.png")
    Image.fromarray(sideways).convert("P").save(place / "x3.png")
    Image.fromarray(np.full((20, 20, 4), (9, 9, 9, 0), dtype=np.uint8)).save(place / "x4.png")
    data = load_set(f"folder:{tmp_path}", image_size=20, pipeline="files")
    loader = FileLoader(data.x_train, data.y_train, (0.0,) * 3, (1 / 255,) * 3, LoaderOptions(99))
    pixels, _ = whole_epoch(loader)
    odd = {data.x_train.path(n).rpartition("/")[2]: pixels[0, n] for n in range(len(data.y_train))}
    assert odd["x1.jpg"][:, :, 15:].mean() > 250 > 5 > odd["x1.jpg"][:, :, :5].mean()
    assert odd["x2.png"].unique().tolist() == [40_000 // 256]
    assert odd["x3.png"][:, :9].mean() == 255
    assert odd["x4.png"].min() == 255


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def words(folder, out, *more):
    return ["train", "dml", "--model", "resnet8", "--peers", "2", "--data", f"folder:{folder}", "--data-pipeline",
            "files", "--image-size", "16", "--batch-size", "5", "--epochs", "2", "--lr", "0.01", "--device", "cpu",
            "--data-workers", "0", "--out", str(out), *more]  # fmt: skip


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["peers"]


@pytest.mark.slow
def test_a_run_stopped_by_a_corrupt_file_resumes_to_the_same_end(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    given = ("--normalise", "imagenet")  # statistics of its own would pass the bad file over
    assert main(words(folder, tmp_path / "whole", *given)) == 0
    data = load_set(f"folder:{folder}", image_size=16, pipeline="files")
    config = Config.from_file(tmp_path / "whole")
    t = build_run(config.resolved())
    order = t.splits.train[t.loader._order(t.loader._generator(1)).numpy()]
    first = t.splits.train[t.loader._order(t.loader._generator(0)).numpy()][:8].tolist()
    place = next(n for n in range(5, 10) if order[n] not in first)  # in the second batch; not what setup tries
    file = data.x_train.path(order[place])
    with open(file, "rb") as stream:
        content = stream.read()
    with open(file, "wb") as stream:
        stream.write(content[:100])
    capsys.readouterr()
    assert main(words(folder, tmp_path / "cut", *given, "--data-workers", "1")) == 2
    said = capsys.readouterr().err
    sentence = said.splitlines()[-1]
    assert file in sentence
    assert "--skip-corrupt" in sentence
    assert "--resume auto" in sentence
    assert "Traceback" not in said
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert (0, 1) <= (state["epoch"], state["step"]) <= (1, 1)
    with open(file, "wb") as stream:
        stream.write(content)
    assert main(words(folder, tmp_path / "cut", *given, "--data-workers", "2", "--resume", "auto")) == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_corrupt_files_are_replaced_from_their_class_and_counted(tmp_path, capsys):
    folder = write_images(tmp_path / "images", per_class=6)
    for n in (1, 2):
        (folder / "train" / "bee" / f"{n}.png").write_bytes(b"no image")
    assert main(words(folder, tmp_path / "run", "--skip-corrupt")) == 0
    assert "the next one of its class replaces it (1 so far)" in capsys.readouterr().err
    loader, data = loader_of(folder, augmentation=Augmentation(), skip_corrupt=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels, labels = whole_epoch(loader)
        judged = whole_epoch(loader_of(folder, augmentation=None, skip_corrupt=True)[0])[1]
    assert judged.tolist() == [0] * 6 + [1] * 4 + [2] * 6  # where they are left out
    places = loader._draw_epoch(0)[0].argsort()
    pixels, labels = pixels[:, places], labels[places]
    assert labels.tolist() == data.y_train.tolist()
    numbers = [n for n in range(18) if data.x_train.path(n).endswith(("bee/1.png", "bee/2.png"))]
    third = next(n for n in range(18) if data.x_train.path(n).endswith("bee/3.png"))
    for n in numbers:
        assert torch.equal(pixels[0, n], pixels[0, third])
    for n in range(6):
        (folder / "train" / "bee" / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bee.*cannot be read"):
        whole_epoch(loader_of(folder, augmentation=Augmentation(), skip_corrupt=True)[0])


def test_files_that_came_or_went_end_a_continuation(tmp_path, capsys):
    folder = write_images(tmp_path / "images", per_class=6)
    assert main(words(folder, tmp_path / "run")) == 0
    (folder / "train" / "cat" / "3.png").unlink()
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "is not what it was when the run began" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run")]) == 0  # which needs no images
    assert "checked on noise" in capsys.readouterr().err


def test_resident_folders_leave_corrupt_files_out_if_asked(tmp_path):
    folder = write_images(tmp_path, per_class=4)
    (folder / "train" / "ant" / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2\.png cannot be read.*--skip-corrupt"):
        load_set(f"folder:{folder}", image_size=8)
    data = load_set(f"folder:{folder}", image_size=8, skip_corrupt=True)
    assert np.bincount(data.y_train).tolist() == [3, 4, 4]
    assert "1 image files cannot be read" in data.provenance.messages[0]
    (folder / "train" / "ant" / "2.png").unlink()
    assert data.checksum() == load_set(f"folder:{folder}", image_size=8).checksum()  # the splits are the same
    (folder / "val" / "bee" / "1.png").write_bytes(b"no image")
    assert data.checksum() != load_set(f"folder:{folder}", image_size=8, skip_corrupt=True).checksum()


def test_a_resident_run_does_not_go_on_with_other_readable_files(tmp_path, capsys):
    folder = write_images(tmp_path / "images", per_class=6)
    given = [*words(folder, tmp_path / "run"), "--data-pipeline", "resident"]
    assert main(given) == 0
    (folder / "train" / "cat" / "3.png").write_bytes(b"no image")
    (tmp_path / "run" / "result.json").unlink()
    capsys.readouterr()
    assert main([*given, "--skip-corrupt", "--resume", "auto"]) == 2
    assert "is not what it was when the run began" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "digits", "--data-pipeline", "files"], "--data-pipeline files reads the images of a folder"),
        (["--data", "digits", "--data-workers", "-1"], "--data-workers is -1"),
        (["--data", "digits", "--normalise", "0.5,x"], "--normalize 0.5,x: give imagenet"),
        (["--data", "digits", "--normalise", "0.5,0"], "--normalize 0.5,0: give imagenet"),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, capsys):
    assert main(["train", "dml", "--model", "resnet8", "--out", str(tmp_path / "run"), *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_grid_decodes_with_workers_of_its_own(folder, tmp_path, capsys):
    out = tmp_path / "grid"
    options = ["--model", "resnet8", "--image-size", "16", "--batch-size", "8", "--epochs", "1", "--seeds", "1"]
    files = ["--data", f"folder:{folder}", "--data-pipeline", "files", "--data-workers", "1"]
    assert main(["compare", "independent", *files, *options, "--peers", "2", "--out", str(out)]) == 0
    assert (out / "one-plain-network" / "seed0" / "result.json").exists()
