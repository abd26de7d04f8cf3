"""A run folder that codistill wrote at commit 844e2fa is still loaded, evaluated, exported and continued.

It holds okddip with 3 branches of resnet8 (forked at `fc`, so that it stays small), 2 epochs on 40 digits a class, and
the checkpoints of both epochs; best.pt (of the second epoch) and run.lock are left out. It was written by

    codistill train okddip --data digits --model resnet8 --peers 3 --topology branches --branch-at fc --epochs 2 \
        --train-per-class 40 --batch-size 20 --lr 0.05 --device cpu --out run_844e2fa
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from codistill import Config, load_run
from codistill.cli import main
from codistill.cli.options import parse
from codistill.models import resolve
from codistill.utils.allow_import import check_imports
from helpers.common import read_json

STORED = Path(__file__).parent.parent / "golden" / "run_844e2fa"
RECORDED = read_json(STORED / "result.json")


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(figures: dict, recorded: dict) -> None:
    """Compare figures of a set of images; another machine adds up in another order, and may turn single images."""
    assert figures.keys() == recorded.keys()
    assert figures["nll"] == pytest.approx(recorded["nll"], rel=1e-3)
    assert figures["ece"] == pytest.approx(recorded["ece"], abs=1e-2)
    assert figures["top1"] == pytest.approx(recorded["top1"], abs=0.6)


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_it_is_evaluated(run, capsys):
    assert main(["evaluate", str(run), "--json", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["deployed"] == RECORDED["deployed"] == "member 2"
    assert figures["members"]["samples"] == RECORDED["test"]["samples"] == 797
    assert_close(figures["student"], RECORDED["student"])
    for name in ("nll", "ensemble_nll", "diversity"):
        assert figures["members"][name] == pytest.approx(RECORDED["test"][name], rel=1e-3)
    assert main(["evaluate", str(run), "--split", "val", "--json", "--device", "cpu"]) == 0
    assert_close(json.loads(capsys.readouterr().out)["student"], lines_of(STORED)[1]["val_student"])


def test_every_weight_is_loaded(run):
    state = torch.load(run / "last.pt", weights_only=True)
    loaded = load_run(run)
    for module, name in ((loaded.peers, "peers"), (loaded.method, "method")):
        weights = module.state_dict()
        assert weights.keys() == state[name].keys()
        assert all(torch.equal(weights[key], value) for key, value in state[name].items())


def test_it_is_exported(run, tmp_path):
    file = tmp_path / "student.safetensors"
    assert main(["export", str(run), "--out", str(file)]) == 0
    student, held = load_file(file), torch.load(run / "last.pt", weights_only=True)["peers"]
    counted = sum(value.numel() for name, value in student.items() if "running" not in name and "num_" not in name)
    assert counted == RECORDED["parameters_deployed"]
    assert torch.equal(student["fc.weight"], held["members.2.head.weight"])
    assert torch.equal(student["conv1.weight"], held["members.0.body.conv1.inner.weight"])


def test_it_is_continued(run):
    """From the checkpoint of its first epoch; a run's number of epochs is fixed."""
    for name in ("result.json", "details.json", "last.pt"):
        (run / name).unlink()
    (run / "last-1.pt").rename(run / "last.pt")
    assert main(["train", "--config", str(run / "config.json"), "--out", str(run), "--resume", "auto"]) == 0
    before, now = lines_of(STORED), lines_of(run)
    assert now[0] == before[0]
    assert [line["epoch"] for line in now] == [0, 1]
    assert now[1]["train"]["loss"] == pytest.approx(before[1]["train"]["loss"], rel=1e-3)
    assert now[1]["val_student"]["nll"] == pytest.approx(before[1]["val_student"]["nll"], rel=1e-3)
    assert_close(read_json(run / "result.json")["student"], RECORDED["student"])


def test_a_complete_run_is_not_trained_again(run, capsys):
    files = {path.name: path.read_bytes() for path in run.glob("*.pt")}
    assert main(["train", "--config", str(run / "config.json"), "--out", str(run), "--resume", "auto"]) == 0
    assert f"{RECORDED['student']['top1']:.2f}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in run.glob("*.pt")} == files


OLD_MODULES = ["codistill.recipes.networks", "codistill.reproduce.recipes.networks"]


@pytest.mark.parametrize("module", OLD_MODULES)
@pytest.mark.parametrize(("name", "width"), [("mobilenet_v2_x0_5", 0.5), ("mobilenet_v2_x1_2", 1.2)])
def test_old_network_names_load_torchvision_networks(module, name, width):
    config = Config("independent", f"{module}:{name}")
    assert config.model == (f"torchvision:mobilenet_v2,width_mult={width}",)
    check_imports([f"{module}:{name}"], "a file")
    network = resolve(f"{module}:{name}")(num_classes=10, in_channels=3)
    theirs = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_a_run_that_names_the_recipes_own_networks_still_works(tmp_path):
    """Such a run loads and continues without --allow-import; both names are the same run."""
    folder, old = tmp_path / "run", f"{OLD_MODULES[0]}:mobilenet_v2_x0_5"
    words = ["train", "independent", "--model", old, "--topology", "networks", "--peers", "1", "--channels", "3"]
    words += ["--train-per-class", "2", "--batch-size", "20", "--epochs", "1", "--device", "cpu", "--out", str(folder)]
    assert main(words) == 0
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"model": [old]}))
    assert load_run(folder).config.model == ("torchvision:mobilenet_v2,width_mult=0.5",)
    assert main(["train", "--config", str(folder), "--out", str(folder), "--resume", "auto"]) == 0
    assert main(["evaluate", str(folder)]) == 0


def test_old_names_of_options_still_work(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"method": "dml", "head_lr": 3.0, "normalise": "imagenet"}))
    config = Config.from_file(path)
    assert (config.head_lr_scale, config.normalize) == (3.0, "imagenet") == (config.head_lr, config.normalise)
    assert config == Config("dml", head_lr=3.0, normalise="imagenet")
    assert parse("train", ["dml", "--head-lr", "3", "--normalise=imagenet"]).options == config
    assert dataclasses.replace(config, head_lr=1.0).head_lr_scale == 1.0
    assert {"head_lr_scale", "normalize"} < config.to_dict().keys()
