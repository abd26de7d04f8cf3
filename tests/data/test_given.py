"""Images given from Python, read into memory or lazily, and other folders that a run is judged on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import codistill as cd
from codistill.cli.main import main
from codistill.config.config import Config
from codistill.data import ImageSet
from codistill.training.loop import train
from codistill.utils.errors import InputError
from helpers.folders import train_on, write_images


class Squares(Dataset):
    """A data set that ends by its length alone, and that has names for its classes."""

    classes = ("dark", "light")

    def __init__(self, count, kind):
        self.count, self.kind = count, kind

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.full((8, 8, 3), 40 + 150 * (index % 2) + index, dtype=np.uint8)
        pixels[0, 0] = (1, 2, 3)
        made = {
            "array": lambda: pixels,
            "pil": lambda: Image.fromarray(pixels),
            "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1),
            "float": lambda: torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        }[self.kind]()
        return made, torch.tensor(index % 2) if self.kind == "tensor" else index % 2


def test_pairs_of_every_kind_give_the_same_set():
    sets = [ImageSet.from_dataset(Squares(20, kind), Squares(4, kind)) for kind in ("array", "pil", "tensor", "float")]
    stream = (Squares(20, "pil")[n] for n in range(20))
    sets.append(ImageSet.from_dataset(stream, Squares(4, "array"), classes=("dark", "light")))
    for data in sets:
        assert data.classes == ("dark", "light")
        assert data.x_train.tolist() == sets[0].x_train.tolist()
        assert data.y_train.tolist() == [0, 1] * 10
        assert data.checksum() == sets[0].checksum()
    split = ImageSet.from_dataset(Squares(20, "array"))
    assert (len(split.y_train), len(split.y_test)) == (16, 4)
    assert ImageSet.from_dataset(Squares(4, "pil"), image_size=16).image_size == 16


PIXELS = np.zeros((8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([(PIXELS, 0), "cat"], "item 1 of the training data is a str, not a pair"),
        ([("cat.jpg", 0)], "item 0 .*its image is a str"),
        ([(PIXELS, 0), (PIXELS, 1.5)], "item 1 .*its label is 1.5"),
        ([(PIXELS, -1)], "item 0 .*labels count from 0"),
        ([(PIXELS, 0), (PIXELS, 2)], "a label is 2, but there are 2 classes"),
        ([(PIXELS, 0), (np.zeros((8, 9, 3), dtype=np.uint8), 1)], "item 1 .* is 9 x 8, others are 8 x 8"),
        ([(PIXELS.astype(np.float32) - 1, 0)], "give it without normalization"),
        ([(PIXELS.astype(np.int32), 0)], "its image is of int32"),
        ([(np.zeros((8, 8, 4), dtype=np.uint8), 0)], r"has the shape \(8, 8, 4\)"),
        ([], "hold no items"),
        (3, "are a int; give a Dataset"),
    ],
)
def test_bad_items_are_named(pairs, sentence):
    with pytest.raises(InputError, match=sentence):
        ImageSet.from_dataset(pairs, classes=("a", "b"))


def test_a_run_on_images_from_python_is_resumed_and_judged_there(tmp_path, capsys):
    data = cd.ImageSet.from_dataset(Squares(40, "array"), Squares(10, "array"))
    config = cd.Config("dml", "resnet8", peers=2, epochs=1, batch_size=8, device="cpu", out=str(tmp_path / "run"))
    result = cd.train(config, data=data)  # the function, though the module of its name was imported before
    assert result.training.config.data == "python:given"
    assert cd.load_run(tmp_path / "run", data=data).data.classes == ("dark", "light")
    again = Config(**{**vars(config), "resume": "auto"})
    assert train(again, data=data).figures == result.figures
    other = cd.ImageSet.from_dataset(Squares(40, "array"), Squares(12, "array"))
    with pytest.raises(InputError, match="is not what it was when the run began"):
        train(again, data=other)
    one = cd.ImageSet.from_dataset([(PIXELS, 0)] * 9, classes=("a", "b"))
    with pytest.raises(InputError, match="one class only"):
        train(Config(**{**vars(config), "out": str(tmp_path / "one")}), data=one)
    run = str(tmp_path / "run")
    assert main(["evaluate", run]) == 2
    assert "were given from Python" in capsys.readouterr().err
    for n in range(2):
        (tmp_path / "other" / Squares.classes[n]).mkdir(parents=True)
        Image.fromarray(Squares(2, "array")[n][0]).save(tmp_path / "other" / Squares.classes[n] / "1.png")
    assert main(["evaluate", run, "--data", f"folder:{tmp_path / 'other'}"]) == 0
    assert main(["predict", run, str(tmp_path / "other")]) == 0
    assert main(["export", run]) == 0
    assert "images of noise" in (tmp_path / "run" / "student.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Other sets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("judged")
    folder = write_images(place / "images", per_class=20)
    assert train_on(folder, place / "run", "--epochs", "2", "--lr", "0.05") == 0
    return place


def judged(run, folder, capsys, *more):
    capsys.readouterr()
    code = main(["evaluate", str(run / "run"), "--data", f"folder:{folder}", "--json", *more])
    said = capsys.readouterr()
    return code, (json.loads(said.out) if code == 0 else None), said.err


def test_another_folder_is_judged_by_the_names_of_its_classes(run, tmp_path, capsys):
    # Colours tell the classes: written in another order, of other sizes, without one of them, without parts.
    write_images(tmp_path / "all", per_class=10, parts=("all",), seed=9)
    code, whole, said = judged(run, tmp_path / "all" / "all", capsys, "--per-class")
    assert (code, said) == (0, "")
    assert whole["members"]["samples"] == 30
    by_name = {row["class"]: row for row in whole["classes"]}
    (tmp_path / "two").mkdir()
    for name in ("cat", "bee"):
        (tmp_path / "all" / "all" / name).rename(tmp_path / "two" / name)
    code, two, said = judged(run, tmp_path / "two", capsys, "--per-class")
    assert code == 0
    assert "2 of the run's 3 classes occur" in said
    assert two["members"]["samples"] == 20
    rows = {row["class"]: row for row in two["classes"]}
    for name in ("cat", "bee"):
        assert rows[name]["recall"] == by_name[name]["recall"]
    assert rows["ant"]["images"] == 0
    (tmp_path / "two" / "bee").rename(tmp_path / "two" / "wasp")
    code, _, said = judged(run, tmp_path / "two", capsys)
    assert code == 2
    assert "the run does not know wasp; name the folders as its classes are named (ant, bee, cat)" in said
    (tmp_path / "two" / "wasp").rename(tmp_path / "two" / "1")
    (tmp_path / "two" / "cat").rename(tmp_path / "two" / "0")
    code, _, said = judged(run, tmp_path / "two", capsys)  # folders have names: numbers are no match for them
    assert code == 2
    assert "the run does not know 0, 1" in said


def test_a_copy_of_the_folder_gives_the_same_figures(run, capsys):
    images = run / "images"
    assert main(["evaluate", str(run / "run"), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    images.rename(run / "elsewhere")
    try:
        code, other, _ = judged(run, run / "elsewhere", capsys)
        assert main(["evaluate", str(run / "run")]) == 2
        assert "there is no such folder" in capsys.readouterr().err
    finally:
        (run / "elsewhere").rename(images)
    assert code == 0
    assert other["student"]["top1"] == own["student"]["top1"]
    assert abs(other["student"]["nll"] - own["student"]["nll"]) < 1e-6


def test_arrays_are_matched_by_number_and_must_have_the_size(run, tmp_path, capsys):
    labels = np.arange(12) % 3
    for size in (16, 12):
        images = np.zeros((12, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{size}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    capsys.readouterr()
    assert main(["evaluate", str(run / "run"), "--data", f"npz:{tmp_path / '16.npz'}"]) == 0
    assert "matched by their numbers" in capsys.readouterr().err
    assert main(["evaluate", str(run / "run"), "--data", f"npz:{tmp_path / '12.npz'}"]) == 2
    assert "its images are 12 x 12 x 3, and the run takes 16 x 16 x 3" in capsys.readouterr().err


class Photos(Squares):
    """Larger squares that count how often they are read."""

    def __init__(self, count, kind="pil", size=12, targets=True):
        super().__init__(count, kind)
        self.size, self.read = size, 0
        if targets:
            self.targets = [n % 2 for n in range(count)]

    def __getitem__(self, index):
        self.read += 1
        image, label = super().__getitem__(index % 60)
        return image.resize((self.size, self.size)), label


@pytest.mark.slow
def test_a_lazy_set_is_read_in_every_epoch_as_files_are(tmp_path):
    data = ImageSet.from_dataset(Photos(40), Photos(10), lazy=True)
    assert data.from_files
    assert data.x_train.shape == (40, 12, 12, 3)
    assert data.classes == ("dark", "light")
    for part, photos in (("train", Photos(40)), ("test", Photos(10))):
        for n in range(len(photos)):
            path = tmp_path / "photos" / part / Squares.classes[n % 2] / f"{n // 2:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photos[n][0].save(path)
    from_files = {"data": f"folder:{tmp_path / 'photos'}", "data_pipeline": "files"}
    options = {"peers": 2, "epochs": 2, "batch_size": 16, "data_workers": 1, "val_fraction": 0.0, "device": "cpu"}
    config = cd.Config("dml", "resnet8", **options, out=str(tmp_path / "lazy"))
    result = cd.train(config, data=data)
    assert result.figures["augmentation"] == "random resized crop + flip"
    # The same images in another order, by classes: put into it, they are trained on in the same way.
    order = [*range(0, 40, 2), *range(1, 40, 2)], [*range(0, 10, 2), *range(1, 10, 2)]
    parts = [torch.utils.data.Subset(Photos(count), places) for count, places in zip((40, 10), order)]
    ordered = ImageSet.from_dataset(*parts, lazy=True, classes=Squares.classes)
    ours = cd.train(cd.Config("dml", "resnet8", **options, out=str(tmp_path / "ordered")), data=ordered)
    files = cd.train(cd.Config("dml", "resnet8", **options, **from_files, out=str(tmp_path / "files")))
    for name, value in files.peers.state_dict().items():
        assert torch.equal(ours.peers.state_dict()[name], value), name
    assert cd.load_run(tmp_path / "lazy", data=ImageSet.from_dataset(Photos(40), Photos(10), lazy=True)).splits
    with pytest.raises(InputError, match="is not what it was when the run began"):
        cd.load_run(tmp_path / "lazy", data=ordered)


def test_labels_of_a_lazy_set_are_its_targets_if_these_are_right():
    listed, unlisted, wrong = Photos(300), Photos(300, targets=False), Photos(300)
    wrong.targets = [0] * 300
    for photos, most in ((listed, 300), (unlisted, 10**6), (wrong, 10**6)):
        data = ImageSet.from_dataset(photos, Photos(4), lazy=True)
        assert data.y_train.tolist() == [0, 1] * 150
        assert photos.read < most
    part = torch.utils.data.Subset(listed, range(1, 300, 2))
    assert set(ImageSet.from_dataset(part, Photos(4), lazy=True).y_train) == {1}
    assert ImageSet.from_dataset(Photos(20), lazy=True, image_size=8).x_test.shape == (4, 8, 8, 3)
    mixed = [(Image.new("L", (9 + n, 9)), n % 2) for n in range(6)]
    assert ImageSet.from_dataset(mixed, mixed, lazy=True, classes=("a", "b")).x_train.shape == (6, 224, 224, 1)


class Broken(Photos):
    """Fails at item 7."""

    def __getitem__(self, index):
        if index == 7:
            raise KeyError("no such record")
        return super().__getitem__(index)


def test_a_lazy_set_that_fails_is_named_or_passed_over(tmp_path):
    for pairs, sentence in (
        ((Photos(4)[n] for n in range(4)), "lazy=True takes a Dataset with a length"),
        ([], "hold no items"),
        ([("cat.jpg", 0)], "item 0 .*its image is a str"),
        ([PIXELS], "not a pair"),
    ):
        with pytest.raises(InputError, match=sentence):
            ImageSet.from_dataset(pairs, classes=("a", "b"), lazy=True)
    data = ImageSet.from_dataset(Broken(300), Photos(4), lazy=True)  # its list of labels is right where it was tried
    options = {"peers": 2, "epochs": 1, "batch_size": 64, "data_workers": 0, "device": "cpu", "out": str(tmp_path)}
    config = cd.Config("dml", "resnet8", **options)
    with pytest.raises(InputError, match=r"item 7 of the training data cannot be read \(KeyError.*--skip-corrupt"):
        cd.train(config, data=data)
    with pytest.warns(UserWarning, match="item 7 of the training data cannot be read"):
        cd.train(Config(**{**vars(config), "resume": "auto", "skip_corrupt": True}), data=data)


def test_targets_that_items_change_are_not_believed():
    items = [(PIXELS, n % 6) for n in range(60)]

    class Merged(torch.utils.data.Dataset):
        targets = [label for _, label in items]
        changed = 4

        def __len__(self):
            return 60

        def __getitem__(self, index):
            image, label = items[index]
            return image, 0 if label == self.changed else label

    merged = Merged()
    expected = [0 if label == 4 else label for label in merged.targets]
    assert ImageSet.from_dataset(merged, merged, lazy=True).y_train.tolist() == expected  # one of each class is tried
    merged.target_transform, merged.changed = (lambda label: label), 5
    expected = [0 if label == 5 else label for label in merged.targets]
    assert ImageSet.from_dataset(merged, merged, lazy=True).y_train.tolist() == expected


def test_an_iterable_dataset_with_a_length_is_iterated():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 10

        def __iter__(self):
            return ((PIXELS, n % 2) for n in range(10))

    assert len(ImageSet.from_dataset(Stream(), Stream()).y_train) == 10
