"""Code that files name: run where the command line repeats it or --allow-import stands there, and nowhere else."""

import json
import os
import shutil
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from codistill.cli.main import main
from codistill.config.config import Config
from codistill.config.methods import KDConfig
from codistill.reproduce.workers import Processes, Submitit
from codistill.training.loop import train
from codistill.utils.allow_import import check_imports, command_line, is_user_code
from codistill.utils.files import write_json
from helpers.command_line import one_sentence
from helpers.common import read_json
from helpers.runs import small


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("imports") / "run"
    train(Config("okddip", "resnet8", "digits", peers=3, train_per_class=6, batch_size=16, epochs=1, out=str(out)))
    return out


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A module that notes that it was imported, in a working folder as an archive of strangers would bring it."""
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    source = f"open({str(mark)!r}, 'w').close()\nfrom codistill.models.resnet import resnet8 as network\n"
    (tmp_path / "evil_module.py").write_text(source)
    yield mark
    sys.modules.pop("evil_module", None)


def forged(run, place):
    """A run folder that says its network is code."""
    shutil.copytree(run, place)
    write_json(place / "config.json", read_json(place / "config.json") | {"model": ["evil_module:network"]})
    return str(place)


@pytest.mark.parametrize(
    "words",
    [
        "evaluate {run}",
        "export {run}",
        "predict {run} image.png",
        "train --config {run} --out anew",
        "train --config {run}/config.json --out anew --epochs 2",
        "train kd --method.teacher {run} --model resnet8 --epochs 1 --peers 1 --out anew --batch-size 16",
        "train kd --method.teacher export.safetensors --model resnet8 --epochs 1 --peers 1 --out anew --batch-size 16",
    ],
)
def test_code_that_a_file_names_is_not_run_unasked(words, run, spy, tmp_path, capsys):
    from safetensors.torch import save_file

    words = words.format(run=forged(run, tmp_path / "forged")).split()
    Image.new("L", (8, 8)).save("image.png")
    save_file({"x": torch.zeros(1)}, "export.safetensors", {"model": json.dumps("evil_module:network")})
    said = one_sentence(capsys, words)
    assert "names code to import and run, evil_module:network; if you trust it, add --allow-import" in said
    assert not spy.exists()
    assert not os.path.exists("anew/config.json")
    main([*words, "--allow-import"])
    assert spy.exists()


def test_code_that_the_command_line_repeats_is_run(run, spy, tmp_path):
    place = forged(run, tmp_path / "forged")
    repeated = ["--model", "evil_module:network", "--out", "anew", "--resume", "auto"]
    assert main(["train", "--config", place, *repeated]) == 0
    assert spy.exists()
    assert main(["train", "--config", place, "--model=resnet8", "--out", "other"]) == 0  # the file's is not used
    words = ["--peers", "3", "--batch-size", "16", "--train-per-class", "6", "--epochs", "1"]
    assert main(["train", "okddip", *words, *repeated]) == 0


def test_what_is_passed_in_python_is_run(spy, tmp_path):
    train(small(tmp_path / "run", model="evil_module:network", epochs=1))
    assert spy.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "submitit"])
def test_workers_use_the_import_policy_of_their_command(kind, run, spy, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(spy.parent))  # a job is a program of its own
    if kind == "submitit":
        pytest.importorskip("submitit", reason="the extra slurm is not installed")
    teacher = forged(run, tmp_path / "forged")
    config = small(tmp_path / "grid" / "run", model="resnet8", epochs=1)
    config = replace(config, method=KDConfig(teacher=teacher), peers=1)
    pool = Processes(1, 1) if kind == "processes" else Submitit(tmp_path / "jobs", "local", ("timeout_min=5",))

    def answer_of(argv):
        with command_line(argv):
            handle = pool.start(config)
        while (answer := pool.poll(handle)) is None:
            time.sleep(0.05)
        return answer

    try:
        figures, why = answer_of([])
        assert figures is None
        assert "names code to import and run, evil_module:network" in why
        assert not spy.exists()
        figures, why = answer_of(["--allow-import"])
        assert why is None
        assert spy.exists()
    finally:
        pool.close()


@pytest.mark.slow
def test_a_file_called_like_a_module_of_python_is_not_imported_by_workers(tmp_path, monkeypatch):
    """A new Python looks into the working folder first, which may be a downloaded one."""
    for name in ("multiprocessing", "signal", "pickle", "torch"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    pool = Processes(1, 1)
    try:
        handle = pool.start(small(tmp_path / "grid" / "run", model="resnet8", epochs=1))
        while (answer := pool.poll(handle)) is None:
            time.sleep(0.05)
    finally:
        pool.close()
    assert answer[1] is None
    assert "PYTHONSAFEPATH" not in os.environ
    assert not (tmp_path / "ran").exists()


def test_which_names_are_code():
    assert [n for n in ("resnet8", "timm:a", "torchvision:a,x=1", "hf:a", "os:system") if is_user_code(n)] == [
        "os:system"
    ]
    assert is_user_code("hf:a,trust_remote_code=True")
    assert is_user_code("timm:resnet18,checkpoint_path=x.pth")
    assert is_user_code("timm:resnet18,pretrained_cfg={'file': 'x.pth'}")
    check_imports(["a.b:c"], "x", known=["a.b:c"])
