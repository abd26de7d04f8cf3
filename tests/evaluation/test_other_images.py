"""`evaluate --data`: other images are read as the run's own are, and those that were trained on are noticed."""

import json

import numpy as np
from PIL import Image

from codistill.cli.main import main
from helpers.folders import train_on


def test_sixteen_bit_files_are_judged_with_the_bits_of_the_run(tmp_path, capsys):
    """Two classes that differ in their lower bits only: without --bits all of their pixels are 4."""
    for name, level in (("bright", 1200), ("dim", 1100)):
        (tmp_path / "a" / name).mkdir(parents=True)
        for n in range(20):
            pixels = level + np.random.default_rng(n).integers(-8, 8, (16, 16))
            Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "a" / name / f"{n}.png")
    run = tmp_path / "run"
    words = ["--bits", "11", "--data-pipeline", "resident", "--peers", "2", "--epochs", "3"]
    assert train_on(tmp_path / "a", run, *words) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", f"folder:{tmp_path / 'a'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"]["top1"] == 100.0
