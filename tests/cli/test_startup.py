"""Modules that take long to import are imported only by the commands that use them."""

import json
import subprocess
import sys

import numpy as np
from PIL import Image

from codistill.data import load_set
from codistill.training import train
from helpers.runs import tiny

HEAVY = {"torchvision", "scipy", "sklearn", "narwhals", "pandas", "matplotlib", "plotly", "onnx", "safetensors"}
HEAVY |= {"timm", "transformers", "joblib", "torch._inductor", "torch._dynamo", "sympy", "triton"}
COMPILER = {"torch._inductor", "torch._dynamo", "sympy", "triton"}  # torch's optimizers import it
ALLOWED = {"evaluate": set(), "export": {"safetensors"}, "predict": {"safetensors"}}
SCRIPT = """
import json, sys
from codistill.cli import main
heavy, commands = json.loads(sys.argv[1])
for words in commands:
    assert main(words) == 0
    print("imported", *sorted(set(heavy) & set(sys.modules)))
"""


def imported_by(commands):
    """Run commands in one new process; return the heavy modules that it has imported after each."""
    words = [sys.executable, "-c", SCRIPT, json.dumps([sorted(HEAVY), commands])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("imported")]


def test_commands_import_no_heavy_module_that_they_do_not_use(tmp_path):
    run = str(tmp_path / "run")
    train(tiny(out=run, epochs=1, peers=3))
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "image.png")
    commands = [["evaluate", run], ["export", run], ["predict", run, str(tmp_path / "image.png")]]
    for words, imported in zip(commands, imported_by(commands), strict=True):
        assert imported <= ALLOWED[words[0]], words[0]
    options = "--peers 1 --data digits --model resnet8 --epochs 1 --train-per-class 2 --batch-size 20 --device cpu"
    (imported,) = imported_by([["train", "independent", *options.split(), "--out", str(tmp_path / "new")]])
    assert imported <= COMPILER


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = load_set("digits")
    order = np.random.default_rng(1797).permutation(1797)
    expected = np.minimum(pixels * 16, 255).astype(np.uint8).reshape(-1, 8, 8, 1)[order]
    assert (np.concatenate((data.x_train, data.x_test)) == expected).all()
    assert (np.concatenate((data.y_train, data.y_test)) == labels[order]).all()
    assert data.checksum() == "1e9dd258"
