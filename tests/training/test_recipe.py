"""`--recipe`: when it chooses, what it leaves alone, and that what was begun goes on as it was begun."""

import dataclasses

import numpy as np
import pytest

from codistill.cli.main import main
from codistill.config import RECIPE_OPTIONS, CompareConfig, Config, choose_recipe
from codistill.training.recipe import apply_recipe, count_training_images
from helpers.common import read_json

SMALL = ["--model", "resnet8", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An npz file of 60 training images in 2 classes."""
    path = tmp_path_factory.mktemp("recipe") / "images.npz"
    rng = np.random.default_rng(0)
    parts = {"train": 60, "test": 10}
    pixels = {f"x_{part}": rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8) for part, n in parts.items()}
    np.savez(path, **pixels, **{f"y_{part}": np.arange(n) % 2 for part, n in parts.items()})
    return f"npz:{path}"


def test_it_counts_the_images_that_are_trained_on(images):
    assert count_training_images(Config("independent", "resnet8", images, val_fraction=0.0)) == 60
    assert count_training_images(Config("independent", "resnet8", images, val_fraction=0.2)) == 48
    assert count_training_images(Config("independent", "resnet8", images, train_per_class=7)) == 14


def test_own_images_get_it_unless_epochs_or_lr_is_given(images):
    config = Config("independent", "resnet8", images, val_fraction=0.0)
    auto, sentence = apply_recipe(config, None, ())
    assert (auto, sentence) == choose_recipe(config, 60)
    assert (auto.epochs, auto.batch_size, auto.schedule) == (68, 8, "cosine")
    assert "68 epochs" in sentence
    assert "60 training images" in sentence
    assert apply_recipe(config, None, {"epochs"}) == (config, None)
    assert apply_recipe(config, None, {"lr", "seed"}) == (config, None)
    assert apply_recipe(config, "paper", ()) == (config, None)
    assert apply_recipe(dataclasses.replace(config, data="digits"), None, ()) == (
        dataclasses.replace(config, data="digits"),
        None,
    )
    kept, _ = apply_recipe(dataclasses.replace(config, epochs=7), "auto", {"epochs"})
    assert (kept.epochs, kept.lr) == (7, auto.lr)


def test_python_and_published_tables_keep_their_defaults():
    assert (Config().epochs, Config().lr, Config().schedule) == (300, 0.1, "step")
    assert (CompareConfig(method="independent").epochs, CompareConfig(method="independent").lr) == (300, 0.1)


def test_the_run_says_and_stores_what_was_chosen_and_goes_on_with_it(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("codistill.config.recipe.EPOCHS", ((2, 2), (1, 1)))
    out = tmp_path / "run"
    command = ["train", "independent", "--peers", "1", "--data", images, *SMALL, "--out", str(out)]
    assert main(command) == 0
    assert "--recipe auto: 2 epochs" in " ".join(capsys.readouterr().err.split())
    stored = read_json(out / "config.json")
    chosen, _ = apply_recipe(Config("independent", "resnet8", images), None, ())
    assert {name: stored[name] for name in RECIPE_OPTIONS} == {name: getattr(chosen, name) for name in RECIPE_OPTIONS}
    monkeypatch.setattr("codistill.config.recipe.EPOCHS", ((3, 3), (1, 1)))  # a later version chooses otherwise
    capsys.readouterr()
    assert main([*command, "--resume", "auto"]) == 0
    assert "goes on as it was begun: 2 epochs, batch 8," in " ".join(capsys.readouterr().err.split())
    assert read_json(out / "config.json") == stored
    assert main(["train", "--config", str(out), "--out", str(tmp_path / "again")]) == 0
    assert read_json(tmp_path / "again" / "config.json")["epochs"] == 2


def test_a_run_of_before_goes_on_as_it_began(images, tmp_path):
    out = tmp_path / "run"
    command = ["train", "independent", "--peers", "1", "--data", images, *SMALL, "--out", str(out)]
    assert main([*command, "--recipe", "paper", "--epochs", "1", "--batch-size", "20"]) == 0
    assert main([*command, "--resume", "auto"]) == 0
    assert read_json(out / "config.json")["batch_size"] == 20


def test_compare_uses_it_and_a_wrong_name_is_refused(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("codistill.config.recipe.EPOCHS", ((1, 1), (1, 1)))
    command = ["compare", "dml", "--topology", "networks", "--data", images, *SMALL, "--seeds", "1", "--workers", "1"]
    assert main([*command, "--peers", "2", "--out", str(tmp_path)]) == 0
    assert "--recipe auto: 1 epochs" in " ".join(capsys.readouterr().err.split())
    stored = [read_json(path) for path in tmp_path.rglob("config.json")]
    assert {config["epochs"] for config in stored} == {1}
    assert main(["train", "dml", "--recipe", "best"]) == 2
    assert "--recipe best must be auto or paper" in capsys.readouterr().err
