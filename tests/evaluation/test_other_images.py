"""`evaluate --data`: other images are read as the run's own are, and those that were trained on are noticed."""

import json

import numpy as np
import pytest
from PIL import Image

from codistill.cli.main import main
from helpers.folders import train_on, write_images
from helpers.images import random_images


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


def judge(run, data, capsys):
    """Return what `evaluate --data` says on stderr, and on stdout as JSON."""
    capsys.readouterr()
    assert main(["evaluate", str(run), "--data", data, "--json"]) == 0
    said = capsys.readouterr()
    return said.err, json.loads(said.out)


@pytest.mark.parametrize("pipeline", ["resident", "files"])
def test_files_that_were_trained_on_are_recognized_under_other_names(pipeline, tmp_path, capsys):
    folder, run = write_images(tmp_path / "a", parts=("train", "test"), seed=3), tmp_path / "run"
    assert train_on(folder, run, "--data-pipeline", pipeline, "--val-fraction", "0") == 0
    said, figures = judge(run, f"folder:{folder}", capsys)
    assert "were trained on" not in said  # its test part
    folder = folder.rename(tmp_path / "moved")
    for place in (folder / "train").iterdir():
        (place / "0.png").rename(place / "renamed.png")
    (folder / "train" / "ant" / "1.png").write_bytes(b"no image")
    said, figures = judge(run, f"folder:{folder / 'train'}", capsys)
    assert "23 of the 24 images" in said
    assert figures["members"]["samples"] == 23
    main(["evaluate", str(run), "--data", f"folder:{folder / 'train'}"])
    assert "train, 23 images" in capsys.readouterr().out  # as many as the figures are of


def test_arrays_that_were_trained_on_are_recognized(tmp_path, capsys):
    images, labels = random_images(40, 8), np.arange(40) % 2
    other, run = random_images(10, 8, seed=1), tmp_path / "run"
    common = np.concatenate([other[:6], images[:4]])
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=common, y_test=labels[:10])
    np.savez(tmp_path / "b.npz", x_train=other, y_train=labels[:10], x_test=images, y_test=labels)
    words = ["--data", f"npz:{tmp_path / 'a.npz'}", "--model", "resnet8", "--peers", "1", "--epochs", "1"]
    assert main(["train", "independent", *words, "--batch-size", "8", "--val-fraction", "0.1", "--out", str(run)]) == 0
    assert "4 of the 10 test images are training images too" in capsys.readouterr().err
    assert "36 of the 40 images" in judge(run, f"npz:{tmp_path / 'b.npz'}", capsys)[0]  # 4 were kept for validation


def test_a_folder_whose_parts_share_files_is_told(tmp_path, capsys):
    folder = write_images(tmp_path / "a", parts=("train", "test"), seed=4)
    (folder / "test" / "ant" / "0.png").write_bytes((folder / "train" / "bee" / "5.png").read_bytes())
    assert train_on(folder, tmp_path / "run") == 0
    assert "1 of the 24 test images are training images too" in capsys.readouterr().err
