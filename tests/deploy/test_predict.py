"""codistill predict on files as people have them: turned, transparent, 16 bits, gray, damaged."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import codistill
from codistill.cli.main import main
from codistill.data.decode import open_upright, read_pixels
from codistill.deploy.predict import Predictor
from codistill.runs import DataInfo
from codistill.utils.errors import InputError
from helpers.folders import write_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_folder(folder / "images", names=["cat, black", 'dog "x"', "frog"], size=8, count=12)
    words = [
        "--model",
        "resnet8",
        "--batch-size",
        "12",
        "--epochs",
        "12",
        "--peers",
        "1",
        "--no-augment",
        "--lr",
        "0.05",
    ]
    assert main(["train", "independent", "--data", data, *words, "--out", str(folder / "run")]) == 0
    (folder / "images").rename(folder / "elsewhere")  # the data set is not needed any more
    return folder


def test_classes_are_named_in_csv_and_json(run, capsys):
    folder = run / "elsewhere" / "test"
    assert main(["predict", str(run / "run"), str(folder), "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 36
    right = [row["class1"] == row["file"].split("/")[-2] for row in rows]
    assert sum(right) >= 30
    assert all(float(row["probability1"]) >= float(row["probability2"]) for row in rows)
    assert main(["predict", str(run / "run"), str(folder / "frog" / "0.png"), "--json", "--top", "9"]) == 0
    (guess,) = json.loads(capsys.readouterr().out)
    assert {g["class"] for g in guess["top"]} == {"cat, black", 'dog "x"', "frog"}
    assert sum(g["probability"] for g in guess["top"]) == pytest.approx(1.0, abs=1e-6)


def test_python_predicts_and_has_the_student_without_the_images(run):
    predictor = codistill.load_predictor(run / "run")
    [guess] = predictor.predict([next((run / "elsewhere").rglob("*.png"))], top=2)
    assert guess["top"][0]["probability"] >= guess["top"][1]["probability"]
    assert repr(predictor) == "Predictor(ResNet, 3 classes)"
    with pytest.raises(InputError, match="there is no such folder"):
        codistill.load_run(run / "run")
    loaded = codistill.load_run(run / "run", with_images=False)
    assert "without images, epoch 12 of 12" in repr(loaded)
    assert not loaded.student.training
    x = torch.rand(2, loaded.data.channels, 8, 8)
    assert torch.allclose(loaded.student(x), predictor.network.to("cpu")(x), atol=1e-5)


def test_damaged_files_get_a_row_and_the_others_an_answer(run, tmp_path, capsys):
    whole = (run / "elsewhere" / "test" / "frog" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "whole.png").write_bytes(whole)
    assert main(["predict", str(run / "run"), str(tmp_path)]) == 0
    rows = {row["file"].split("/")[-1]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert rows["whole.png"]["error"] == ""
    assert "cannot be read as an image" in rows["cut.png"]["error"]
    assert rows["text.jpg"]["class1"] == ""
    assert main(["predict", str(run / "run"), str(tmp_path / "text.jpg")]) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing", "x.png"], "does not exist"),
        (["RUN"], "predict takes a RUN and image files"),
        (["RUN", "x.png"], "x.png does not exist"),
        (["RUN", "EMPTY"], "holds no image files"),
        (["RUN", "EMPTY", "--top", "0"], "--top is 0; give at least 1"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, run, tmp_path, capsys):
    words = [{"RUN": str(run / "run"), "EMPTY": str(tmp_path)}.get(word, word) for word in words]
    assert main(["predict", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.strip().count("\n") == 0


def test_a_photograph_that_was_held_sideways_is_turned(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    upright, gray = open_upright(tmp_path / "x.png")
    assert upright.size == (4, 6)
    assert not gray
    assert np.asarray(upright)[:, -1].min() == 255  # the top row is the right column now


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.array([[0, 256, 32_768, 65_535]] * 4, np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png")
    assert read_pixels(tmp_path / "x.png", 1, 4)[0, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(InputError, match="floating-point"):
        open_upright(tmp_path / "x.tiff")


def test_transparent_places_are_white_and_palettes_are_colours(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_pixels(tmp_path / "clear.png", 3, 4).min() == 255
    palette = Image.new("RGB", (4, 4), (200, 10, 10)).quantize(4)
    palette.save(tmp_path / "palette.png")
    assert read_pixels(tmp_path / "palette.png", 3, 4)[:, 0, 0].tolist() == [200, 10, 10]
    assert open_upright(tmp_path / "palette.png")[1] is False
    Image.new("L", (4, 4), 7).save(tmp_path / "gray.png")
    assert open_upright(tmp_path / "gray.png")[1] is True


def test_a_network_that_uses_view_predicts():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), Viewing(), torch.nn.Linear(32, 2)).eval()
    info = DataInfo(name="x", classes=["a", "b"], channels=3, image_size=4, mean=[0.5] * 3, std=[0.5] * 3)
    predictor = Predictor(network, info, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    turned = predictor.probabilities(images.transpose(0, 3, 1, 2))  # not contiguous, as decoded files are
    assert np.array_equal(turned, predictor.probabilities(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))


class Viewing(torch.nn.Module):
    """Flattens as PyTorch's tutorial does."""

    def forward(self, x):
        return x.view(len(x), 32)


def test_files_of_a_folder_that_are_left_out_are_told(run, tmp_path, capsys):
    for name in ("a.png", "b.heic", "c.heic", "notes.txt", ".thumbnails/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    assert main(["predict", str(run / "run"), str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert f"{tmp_path}: hidden and system folders are left out: .thumbnails" in said.err
    assert f"{tmp_path}: 3 files are left out for their endings (.heic 2, .txt 1); read are .bmp" in said.err


def test_outputs_that_are_not_finite_are_no_prediction(run, monkeypatch, capsys):
    file = str(next((run / "elsewhere").rglob("*.png")))
    monkeypatch.setattr(Predictor, "probabilities", lambda self, pixels: np.full((len(pixels), 3), np.nan))
    assert main(["predict", str(run / "run"), file]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[1].endswith(",the network's outputs are not finite: its training diverged")
    assert "predict: none of the 1 files can be classified (the network's outputs are not finite" in said.err
