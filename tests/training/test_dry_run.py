"""`train --dry-run`: it says what would run, and writes nothing."""

import re

from codistill.cli.main import main
from helpers.command_line import one_sentence

WORDS = ["train", "okddip", "--model", "resnet8", "--data", "digits", "--peers", "3", "--train-per-class", "6"]
WORDS += ["--batch-size", "30", "--epochs", "7", "--dry-run"]


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(WORDS) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "okddip: 3 networks of resnet8, 234,286 parameters trained" in said
    assert "60 train / 101 validation / 797 test" in said
    steps = re.search(r"([\d,]+) steps of ([\d.]+) ms: about (\d+) s of training", said)
    assert steps is not None
    assert steps[1] == "14"  # 7 epochs of 60 / 30
    assert float(steps[2]) > 0
    assert "would be runs/digits-okddip-networks-resnet8-seed0" in said
    assert list(tmp_path.iterdir()) == []


def test_one_step_an_epoch_is_measured_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, "--batch-size", "60"]) == 0
    assert "7 steps of" in capsys.readouterr().out


def test_a_dry_run_refuses_a_mesh(capsys):
    assert one_sentence(capsys, [*WORDS, "--mesh", "data=2"]).endswith("--dry-run measures one process; drop --mesh")
