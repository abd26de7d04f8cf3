"""A bug of codistill ends in one sentence that names a file with the traceback."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from codistill.cli import commands
from codistill.cli.main import main
from codistill.reproduce.workers import train_job


@pytest.fixture(autouse=True)
def no_own_code(monkeypatch):
    """Forget what other tests have named; the package of this one may be among it."""
    monkeypatch.setattr("codistill.utils.errors._own_packages", set())


@pytest.fixture
def bug(monkeypatch, tmp_path):
    def fail(*_):
        raise KeyError("no such\nthing")

    monkeypatch.setattr(commands, "run_command", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CODISTILL_TRACEBACK", raising=False)


def test_a_bug_is_one_sentence_and_a_file(bug, tmp_path, capsys):
    assert main(["list", "methods"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "unexpected error, a bug in codistill (KeyError: " in said
    (file,) = tmp_path.iterdir()
    assert str(file) in said
    text = file.read_text()
    assert text.startswith("codistill list methods\n")
    assert "Traceback (most recent call last)" in text
    assert "in fail" in text


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_is_shown_on_request(how, bug, capsys, monkeypatch):
    if how == "variable":
        monkeypatch.setenv("CODISTILL_TRACEBACK", "1")
    assert main(["list", "methods"] + ["--traceback"] * (how == "flag")) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said(bug, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert main(["list", "methods"]) == 1
    assert "its traceback cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_failed_rank_ends_with_its_code_whatever_would_abort_it_later():
    script = """
import atexit, os, sys
from torch import distributed

class Aborts:  # as threads of a process group may, which the interpreter's end finds alive
    def __del__(self):
        os.abort()

kept = Aborts()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
atexit.register(print, "exit functions were called")
sys.argv = ["codistill", "train", "nothing"]
from codistill.cli.main import run
run()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "exit functions were called\n"
    assert 'unknown method "nothing"' in done.stderr


def test_a_bug_in_one_run_of_a_grid_names_its_file(monkeypatch, tmp_path):
    from codistill.config import Config

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("codistill.training.train", lambda *_: {}["x"])
    result, why = train_job(Config("dml", out=str(tmp_path / "run")))
    assert result is None
    assert Path(re.search(r"traceback is in (\S+),", why)[1]).read_text().count("KeyError") == 1


def test_compare_with_an_unknown_network_starts_no_worker(monkeypatch, tmp_path, capsys):
    def start(*_):
        raise AssertionError("a worker was started")

    monkeypatch.setattr("codistill.reproduce.workers.Processes", start)
    out = tmp_path / "grid"
    for model in ("resnet9", "torchvision:resnet0", "nothing.at.all:net"):
        assert main(["compare", "dml", "--data", "digits", "--model", model, "--out", str(out)]) == 2
        assert "codistill: " in capsys.readouterr().err
        assert not out.exists()
