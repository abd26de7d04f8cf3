"""ImageNet's recipes run end to end on a small folder in its layout; only sizes and the length are made smaller."""

import dataclasses
import shlex

import numpy as np
import pytest
from PIL import Image

from codistill.cli.main import main
from codistill.config.config import ReproduceConfig
from codistill.reproduce.plan import make_plan
from codistill.reproduce.recipes.table_recipe import IMAGENET
from codistill.training.loop import train
from helpers.common import read_json

SMALL = {"image_size": 32, "batch_size": 6, "epochs": 1, "milestones": (), "lr": 0.01, "warmup_epochs": 0.0}
CELLS = [
    ("okddip_table3", "resnet34", "OKDDip-branch"),
    ("kdcl_table2", None, "CLNN"),
    ("kdcl_table2", None, "KDCL-Linear"),
    ("pcl_imagenet", "resnet18", "PCL"),
]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Two classes with names as ImageNet has them, JPEG files of unequal sizes."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(("n01440764", "n01443537")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (40 + number, 50, 3)) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{part}_{number}.JPEG")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("table", "network", "method"), CELLS)
def test_cells_train_on_a_folder_in_imagenets_layout(table, network, method, imagenet, tmp_path):
    options = ReproduceConfig(seeds=1, data_dir=str(imagenet), out=str(tmp_path))
    options.network, options.method = (network,) if network else (), (method,)
    plan = make_plan(table, options)
    cell = next(c for c in plan.cells if c.method == method)
    assert cell.config.data == f"folder:{imagenet}" != IMAGENET
    assert cell.config.image_size == 224
    # Files, whatever their number: the real set is read so, and not from memory.
    config = dataclasses.replace(cell.config, **SMALL, data_pipeline="files", data_workers=0, out=str(tmp_path / "run"))
    figures = train(config).figures
    assert figures["test"]["samples"] == 6
    assert read_json(tmp_path / "run" / "data.json")["classes"] == ["n01440764", "n01443537"]


@pytest.mark.slow
def test_options_appended_to_a_printed_command_override_it(imagenet, tmp_path, capsys):
    words = ["reproduce", "okddip_table3", "--method", "Baseline", "--seeds", "1", "--data-dir", str(imagenet)]
    assert main([*words, "--out", str(tmp_path / "grid"), "--print-commands"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[0])
    smaller = ["--image-size", "32", "--batch-size", "6", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main([*command[1:], *smaller, "--milestones", "1"]) == 0
    assert read_json(tmp_path / "run" / "result.json")["epochs"] == 1
