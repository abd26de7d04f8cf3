"""Signals outside the epochs: exit code 75, one sentence, and what is written stays."""

import os
import signal
import sys

import pytest
import torch

from codistill.cli.main import main
from codistill.utils.signals import catch_signals, raise_on_signals
from helpers.common import read_json

WORDS = [
    "train",
    "independent",
    "--peers",
    "1",
    "--model",
    "tiny_network:Tiny",
    "--data",
    "digits",
    "--train-per-class",
    "6",
]
WORDS += ["--train-per-class", "6", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--out"]


def send(name):
    def kill(*_args, **_kwargs):
        os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("the signal was not handled")

    return kill


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_in_set_up_ends_the_command_and_leaves_no_folder(name, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr("codistill.training.loop.build_run", send(name))
    assert main([*WORDS, str(tmp_path / "a" / "run")]) == 75
    assert capsys.readouterr().err == (
        f"codistill: stopped by {name} before there was anything to keep; give the same command again\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_signal_while_the_test_set_is_read_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("codistill.training.loop.evaluate_test_set", send("SIGTERM"))
        assert main([*WORDS, str(tmp_path / "run")]) == 75
    assert "stopped by SIGTERM; the checkpoint is written, continue with --resume auto" in capsys.readouterr().err
    assert main([*WORDS, str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert read_json(tmp_path / "run" / "result.json")["epochs"] == 1


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals(), catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def no_trackio(monkeypatch):
    """Let trackio be missing, wherever it is installed."""
    monkeypatch.setitem(sys.modules, "trackio", None)


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [("--tracker", "trackio", "pip install 'codistill[trackio]'"), ("--device", "mps", "this machine has none"),
     ("--weights", "nowhere.pt", "nowhere.pt does not exist")],
)  # fmt: skip
def test_a_comparison_that_lacks_something_starts_no_worker(flag, value, sentence, no_trackio, tmp_path, capsys):
    if value == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    words = ["compare", "dml", "--model", "resnet8", "--data", "digits", "--epochs", "1", flag, value]
    assert main([*words, "--out", str(tmp_path / "grid")]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_misses_its_tracker_too(no_trackio, tmp_path):
    assert main([*WORDS, str(tmp_path / "run"), "--tracker", "trackio", "--dry-run"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_leaves_no_folder_and_does_not_block_its_own(no_trackio, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert main([*WORDS, str(out), "--tracker", "trackio"]) == 2
    assert "pip install 'codistill[trackio]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    assert main([*WORDS, str(out), "--batch-size", "1000"]) == 2
    assert list(tmp_path.iterdir()) == [out.parent]
    assert main([*WORDS, str(out)]) == 0
