"""Exported students in their own runtimes: checked, described, and used by a process that cannot import codistill."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from codistill.cli.main import main
from codistill.deploy.export import SUFFIXES, _export_errors_as_sentence
from codistill.deploy.predict import load_predictor
from codistill.training.load import load_run
from codistill.training.teacher import read_export_metadata
from codistill.utils.errors import InputError
from codistill.utils.tables import escape_markdown
from helpers.command_line import one_sentence
from helpers.common import read_json
from helpers.folders import ODD, write_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_folder(folder / "images")
    words = ["--model", "resnet8", "--batch-size", "8", "--epochs", "2", "--peers", "3", "--val-fraction", "0.2"]
    assert main(["train", "okddip", "--data", data, *words, "--out", str(folder / "run")]) == 0
    return folder / "run"


ALONE = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "codistill":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np, torch
pixels = np.load("pixels.npy")  # uint8, B x C x H x W
answers = {}
if "safetensors" in sys.argv:
    import s as student
    model, about = student.load("s.safetensors")
    answers["safetensors"] = model(student.normalise(torch.from_numpy(pixels), about))
if "torch-export" in sys.argv:
    extra = {"codistill.json": ""}
    program = torch.export.load("s.pt2", extra_files=extra)
    about = json.loads(extra["codistill.json"])
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(pixels) / 255 - mean) / std
    answers["torch-export"] = program.module()(x)
if "onnx" in sys.argv:
    import onnxruntime
    session = onnxruntime.InferenceSession("s.onnx")
    about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    x = (pixels / 255 - np.array(about["mean"]).reshape(-1, 1, 1)) / np.array(about["std"]).reshape(-1, 1, 1)
    answers["onnx"] = torch.from_numpy(session.run(None, {"images": x.astype(np.float32)})[0])
assert "codistill" not in sys.modules
torch.save({k: (v.detach(), about["classes"]) for k, v in answers.items()}, "answers.pt")
"""


def export(run, kind, out, capsys):
    assert main(["export", str(run), "--format", kind, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "largest difference" in said
    assert float(said.rsplit(":", 1)[1]) < 1e-4
    return out


@pytest.mark.slow
def test_all_three_formats_work_without_codistill(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the ONNX part needs the extra codistill[onnx]")
    for kind, suffix in (("safetensors", ".safetensors"), ("torch-export", ".pt2"), ("onnx", ".onnx")):
        export(run, kind, tmp_path / f"s{suffix}", capsys)
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-c", ALONE, "safetensors", "torch-export", "onnx"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    answers = torch.load(tmp_path / "answers.pt")
    t = load_run(run, device="cpu")
    mean, std = torch.tensor(t.data.mean).view(-1, 1, 1), torch.tensor(t.data.std).view(-1, 1, 1)
    with torch.no_grad():
        expected = t.peers.eval()((torch.from_numpy(pixels) / 255 - mean) / std).logits_PBC[t.method.deployed]
    for kind, (logits, classes) in answers.items():
        assert torch.allclose(logits, expected, atol=1e-4), kind
        assert classes == sorted(ODD)


def test_the_card_describes_the_folder_and_escapes_names(run, tmp_path, capsys):
    out = export(run, "safetensors", tmp_path / "my|student.safetensors", capsys)
    card = out.with_suffix(".md").read_text()
    _, front, body = card.split("---\n", 2)
    assert f"value: {read_json(run / 'result.json')['student']['top1'] / 100:.6f}" in front
    assert 'license: "unknown"' in front
    assert "<script>" not in body
    assert "&lt;script&gt;" in body
    assert "[link](" not in body
    assert "## License\n\nNot stated." in body
    for line in front.strip().splitlines():
        assert ":" in line or line.startswith("-")


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "kind"), [("crop", "safetensors"), ("stretch", "torch-export"), ("stretch", "onnx")])
def test_the_code_of_the_card_answers_as_predict_does(fit, kind, run, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    place = Path(shutil.copytree(run, tmp_path / "run"))
    info = json.loads((place / "data.json").read_text())
    (place / "data.json").write_text(json.dumps(info | {"temperature": 3.5, "fit": fit}))
    config = json.loads((place / "config.json").read_text())  # without images the fit of data.json counts
    (place / "config.json").write_text(json.dumps(config | {"data": "folder:moved"}))
    out = export(place, kind, tmp_path / ("my student" + SUFFIXES[kind]), capsys)
    pixels = np.random.default_rng(3).integers(0, 256, (23, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    [code] = re.findall(r"```python\n(.*?)```", out.with_suffix(".md").read_text(), re.DOTALL)
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    [guess] = load_predictor(place, "cpu").predict([tmp_path / "photo.jpg"], top=1)
    name, value = answer.stdout.rsplit(" tensor(", 1)
    assert name == guess["top"][0]["class"]
    assert float(value.strip(")\n")) == pytest.approx(guess["top"][0]["probability"], abs=2e-4)


def test_escaping_leaves_no_character_that_markdown_reads():
    assert escape_markdown("a|b\nc`<x>") == "a\\|b c\\`&lt;x&gt;"


def test_the_card_shows_the_grids_baseline_where_there_is_one(run, tmp_path, capsys):
    place = tmp_path / "grid" / "dml-networks" / "seed0"
    shutil.copytree(run, place)
    row = {"peers": "independent networks", "n": "3", "top-1 %": "61.2 ± 0.4", "vs equal cost": "-"}
    (tmp_path / "grid" / "table.json").write_text(json.dumps({"title": "a grid", "rows": [row]}))
    export(place, "safetensors", tmp_path / "s.safetensors", capsys)
    card = (tmp_path / "s.md").read_text()
    assert "independent networks" in card
    assert "61.2 ± 0.4" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch-export", "onnx"])
def test_an_ensemble_of_branches_is_one_program(kind, tmp_path, capsys):
    small = ["--model", "resnet8", "--train-per-class", "4", "--batch-size", "16", "--epochs", "1", "--peers", "2"]
    words = ["train", "pcl", "--topology", "branches", "--deploy", "ensemble", *small, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    suffix = {"torch-export": ".pt2", "onnx": ".onnx"}[kind]
    export(tmp_path / "run", kind, tmp_path / f"s{suffix}", capsys)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "s.safetensors")]) == 2
    assert "deploys its ensemble; use --format torch-export or onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "load"),
    [
        ("timm:resnet10t", lambda n, c: __import__("timm").create_model("resnet10t", num_classes=n, in_chans=c)),
        (
            "torchvision:mobilenet_v2,width_mult=0.5",
            lambda n, c: __import__("torchvision").models.mobilenet_v2(num_classes=n, width_mult=0.5),
        ),
    ],
)
def test_weights_load_into_their_own_library(model, load, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file

    words = ["--train-per-class", "4", "--batch-size", "20", "--epochs", "1", "--peers", "2"]
    assert main(["train", "dml", "--model", model, *words, "--out", str(tmp_path / "run")]) == 0
    out = export(tmp_path / "run", "safetensors", tmp_path / "s.safetensors", capsys)
    with safe_open(out, "pt") as archive:
        about = json.loads(archive.metadata()["codistill"])
    assert about["channels"] == (3 if model.startswith("torchvision") else 1)  # gray digits, repeated for torchvision
    network = load(len(about["classes"]), about["channels"])
    network.load_state_dict(load_file(out))
    t = load_run(tmp_path / "run", device="cpu")
    x = torch.randn(3, about["channels"], 8, 8)
    with torch.no_grad():
        assert torch.allclose(network.eval()(x), t.peers.eval()(x).logits_PBC[0], atol=1e-5)


def test_a_file_that_exists_or_ends_wrongly_is_refused(run, tmp_path, capsys):
    assert main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "s.pt2")]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    (tmp_path / "s.onnx").write_text("mine")
    assert main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "s.onnx")]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert (tmp_path / "s.onnx").read_text() == "mine"


def test_an_export_replaces_no_file_of_anybody(run, tmp_path, capsys):
    (tmp_path / "student.py").write_text("my own")
    (tmp_path / "a.md").write_text("my notes")
    export(run, "safetensors", tmp_path / "a.safetensors", capsys)
    export(run, "safetensors", tmp_path / "b.safetensors", capsys)
    names = {"student.py", "a.md", "a.safetensors", "a.safetensors.md", "a.py", "b.safetensors", "b.md", "b.py"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "student.py").read_text() == "my own"
    assert (tmp_path / "a.md").read_text() == "my notes"
    assert "'a.safetensors'" in (tmp_path / "a.py").read_text()
    (tmp_path / "c.py").write_text("my own")
    assert "c.py exists" in one_sentence(capsys, ["export", str(run), "--out", str(tmp_path / "c.safetensors")])
    assert {path.name for path in tmp_path.iterdir()} == names | {"c.py"}


def test_the_fitted_temperature_is_in_the_file_and_the_card(run, tmp_path, capsys):
    place = Path(shutil.copytree(run, tmp_path / "run"))
    info = json.loads((place / "data.json").read_text())
    (place / "data.json").write_text(json.dumps(info | {"temperature": 1.75}))
    for kind, name in (("safetensors", "s.safetensors"), ("torch-export", "t.pt2")):
        export(place, kind, tmp_path / name, capsys)
        card = (tmp_path / name).with_suffix(".md").read_text()
        assert "divided by the temperature 1.7500" in card
    with safe_open(tmp_path / "s.safetensors", "pt") as archive:
        assert read_export_metadata(archive.metadata())["temperature"] == 1.75
    extra = {"codistill.json": ""}
    torch.export.load(tmp_path / "t.pt2", extra_files=extra)
    assert json.loads(extra["codistill.json"])["temperature"] == 1.75


@pytest.mark.slow
def test_a_wrapped_network_is_exported_in_every_format(tmp_path, capsys):
    words = ["--model", "tiny_network:wrapped", "--train-per-class", "4", "--batch-size", "20", "--epochs", "1"]
    assert main(["train", "independent", "--peers", "1", *words, "--out", str(tmp_path / "run")]) == 0
    for kind, suffix in SUFFIXES.items():
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        file = tmp_path / f"s{suffix}"
        assert main(["export", str(tmp_path / "run"), "--allow-import", "--format", kind, "--out", str(file)]) == 0
        assert float(capsys.readouterr().out.rsplit(":", 1)[1]) < 1e-4
    Image.new("L", (8, 8)).save(tmp_path / "photo.jpg")
    helpers = str(Path(__file__).parent.parent / "helpers")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "s.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": helpers})
    with safe_open(tmp_path / "s.safetensors", "pt") as archive:
        assert not any("module." in name for name in archive.keys())  # noqa: SIM118 - it is no dictionary


@pytest.mark.slow
def test_an_onnx_file_can_be_quantized(run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export(run, "onnx", tmp_path / "s.onnx", capsys)
    quantize_dynamic(tmp_path / "s.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    outputs = [
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"images": x})[0] for name in ("s.onnx", "q.onnx")
    ]
    assert np.abs(outputs[0] - outputs[1]).max() < 0.2 * np.abs(outputs[0]).max()


def test_the_reason_of_a_failed_export_is_the_first_one():
    error = RuntimeError("Failed to export")
    error.__cause__ = ValueError("the real reason\nand more")
    with pytest.raises(InputError, match=r"in that format \(the real reason\)"), _export_errors_as_sentence("onnx"):
        raise error


def test_safetensors_has_the_usual_format_and_the_same_bytes_every_time(run, tmp_path, capsys):
    files = [export(run, "safetensors", tmp_path / name / "s.safetensors", capsys) for name in "ab"]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    with safe_open(files[0], "pt") as archive:
        texts = archive.metadata()
    assert sorted(texts) == ["codistill", "format"]  # safetensors reads them into a map without order
    assert texts["format"] == "pt"
    early = {key: json.dumps(value) for key, value in json.loads(texts["codistill"]).items()}
    assert read_export_metadata(early) == read_export_metadata(texts)
    assert read_export_metadata({"format": "pt"}) == {}
