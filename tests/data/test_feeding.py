"""What a run is fed with: balanced epochs, statistics, images from Python, and other sets to be judged on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from codistill.cli.main import main
from codistill.config.config import Config
from codistill.data import DeviceLoader, load_set
from codistill.data.class_balance import balanced_order
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.data.normalization import IMAGENET, with_normalization
from codistill.deploy.predict import load_predictor
from codistill.models.external import pretrained_statistics
from codistill.training import loaders as feeding
from codistill.training.build import build_run as build
from codistill.training.load import load_run
from codistill.utils.errors import InputError
from helpers.folders import train_on, write_images

# ----------------------------------------------------------------------------------------------------------------------
# Balanced sampling


@pytest.mark.parametrize("counts", [[50, 3, 10], [7, 7], [1, 40, 2, 2]])
def test_a_balanced_epoch_draws_classes_equally_often(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    order = balanced_order(labels, torch.Generator().manual_seed(1))
    assert len(order) == len(labels)
    shown = np.bincount(labels[order])
    assert shown.max() - shown.min() <= 1
    times = np.bincount(order, minlength=len(labels))
    for label in range(len(counts)):
        own = times[labels == label]
        assert own.max() - own.min() <= 1  # nobody comes again before all have come
    assert not torch.equal(order, balanced_order(labels, torch.Generator().manual_seed(2)))


def test_balanced_loaders_depend_on_seed_and_epoch():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.array([0] * 36 + [1] * 4)
    make = lambda: DeviceLoader(  # noqa: E731
        images, labels, (0.0,), (1.0,), LoaderOptions(10, Augmentation(pad=2), balanced=True, seed=5)
    )
    first, again = list(make().epoch(3)), list(make().epoch(3, start=2))
    assert torch.equal(first[2][0], again[0][0])
    assert torch.cat([y for _, y in first]).bincount().tolist() == [20, 20]
    rare = torch.cat([x[0] for x, _ in first])[torch.cat([y for _, y in first]) == 1]
    assert len(rare.flatten(1).unique(dim=0)) > 4  # four images, twenty draws


def test_unequal_classes_are_told_and_balanced_in_both_pipelines(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=12, classes=("a", "b"))
    for n in range(3, 12):
        (tmp_path / "images" / "train" / "b" / f"{n}.png").unlink()
    folder = tmp_path / "images"
    assert train_on(folder, tmp_path / "plain", "--val-fraction", "0") == 0
    assert "12 training images of a, 3 of b; --balanced-sampling draws" in " ".join(capsys.readouterr().err.split())
    for pipeline in ("resident", "files"):
        more = ["--val-fraction", "0", "--balanced-sampling", "--data-pipeline", pipeline]
        assert train_on(folder, tmp_path / pipeline, *more) == 0
        assert "every class is drawn equally often, though classes are unequal" in " ".join(
            capsys.readouterr().err.split()
        )
        t = build(Config.from_file(tmp_path / pipeline).resolved())
        counts = torch.cat([y for _, y in t.loader.epoch(0)]).bincount()
        assert sorted(counts.tolist()) == [7, 8]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_pretrained_statistics_are_read_only_when_used(monkeypatch):
    def away(_names):
        raise InputError("looked up")

    monkeypatch.setattr(feeding, "pretrained_statistics", away)
    config = Config("independent", "torchvision:resnet18", "digits", pretrained=True, train_per_class=6, batch_size=16)
    with pytest.raises(InputError, match="looked up"):
        feeding.load_images(config.resolved(), None, None)
    data, _ = feeding.load_images(replace(config, normalize="imagenet").resolved(), None, None)
    assert (data.mean, data.std) == IMAGENET
    held = data.metadata() | {"mean": [0.1] * 3}
    assert feeding.load_images(config.resolved(), None, held)[0].mean == (0.1,) * 3


def test_statistics_come_from_the_chosen_source():
    digits = load_set("digits")
    colour = digits.with_channels(3)
    assert with_normalization(digits, None, {}) is digits
    assert with_normalization(digits, "dataset", {"x": IMAGENET}).mean == digits.mean
    given = with_normalization(colour, "0.1,0.2,0.3,0.4,0.5,0.6", {})
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert with_normalization(colour, "0.1,0.4", {}).mean == (0.1, 0.1, 0.1)
    assert with_normalization(colour, "imagenet", {}).mean == IMAGENET[0]
    assert with_normalization(digits, "imagenet", {}).mean == (round(sum(IMAGENET[0]) / 3, 4),)
    known = pretrained_statistics(["timm:resnet10t", "torchvision:resnet18", "timm:vit_tiny_patch16_224"])
    assert known["timm:resnet10t"] == IMAGENET
    assert known["torchvision:resnet18"] == IMAGENET
    assert known["timm:vit_tiny_patch16_224"] == ((0.5,) * 3, (0.5,) * 3)
    assert with_normalization(colour, None, {"a": known["timm:vit_tiny_patch16_224"], "b": None}).std == (0.5,) * 3
    with pytest.raises(InputError, match=r"normalized in different ways.*--normalize"):
        with_normalization(colour, None, known)
    assert with_normalization(colour, None, known, data_info={"mean": [0.7] * 3, "std": [0.8] * 3}).mean == (0.7,) * 3


def test_a_runs_statistics_are_kept_and_used_by_all(tmp_path, capsys):
    folder = write_images(tmp_path / "images")
    run = tmp_path / "run"
    assert train_on(folder, run, "--normalize", "0.25,0.5,0.75,0.1,0.2,0.4") == 0
    about = json.loads((run / "data.json").read_text())
    assert (about["mean"], about["std"]) == ([0.25, 0.5, 0.75], [0.1, 0.2, 0.4])
    t = load_run(run, device="cpu")
    assert torch.allclose(t.loader.scale_C, 1 / (255 * torch.tensor([0.1, 0.2, 0.4])))
    assert load_predictor(run, "cpu").data_info["mean"] == [0.25, 0.5, 0.75]
    assert main(["export", str(run)]) == 0
    from safetensors import safe_open

    with safe_open(run / "student.safetensors", "pt") as archive:
        metadata = json.loads(archive.metadata()["codistill"])
    assert (metadata["mean"], metadata["fit"]) == ([0.25, 0.5, 0.75], "stretch")


# ----------------------------------------------------------------------------------------------------------------------
# Images from Python
