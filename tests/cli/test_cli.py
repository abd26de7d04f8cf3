"""The command line as a user meets it: the main way through, and every mistake as one sentence with exit code 2."""

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from codistill.cli.console import print_rows
from codistill.cli.main import main
from codistill.config.config import Config
from helpers.common import read_json

SMALL = ["--model", "resnet8", "--train-per-class", "6", "--batch-size", "16", "--epochs", "2"]


def test_help_answers_at_once_and_without_torch():
    code = "import sys; from codistill.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0
    assert "train METHOD" in done.stdout
    assert min(seconds) < 1.0  # 0.1 s on a quiet machine; a loaded one gets some slack


@pytest.mark.parametrize(
    "command", ["train okddip", "train", "compare", "evaluate", "export", "list", "demo", "reproduce", "report"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "usage: codistill " + command.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train okddip", "compare"])
def test_help_is_short_and_help_all_is_complete(command, capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([*command.split(), flag])
        shown[flag] = capsys.readouterr().out
    every = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)} - {"--method"}
    missing = {option for option in every if f"  {option} " not in shown["--help-all"]}
    assert missing == set()
    assert len(shown["--help"].splitlines()) < 80
    for title in ("network:", "data:", "peers:", "optimization:", "run:"):
        assert f"\n{title}\n" in shown["--help"]
    assert "--help-all lists all" in shown["--help"]
    assert "--momentum" not in shown["--help"]
    assert ("--method.mask-self" in shown["--help"]) == command.startswith("train")


def test_the_way_of_a_newcomer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "okddip", *SMALL, "--out", "run", "--method.temperature", "2"]) == 0
    assert "3 (deployed)" in capsys.readouterr().out
    assert read_json("run/config.json")["method"]["temperature"] == 2.0
    assert main(["evaluate", "run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["members"]["top1"] == read_json("run/result.json")["test"]["top1"]
    assert figures["deployed"] == "member 3"
    assert main(["evaluate", "run", "--split", "val"]) == 0
    assert "101 images" in capsys.readouterr().out
    assert main(["export", "run", "--out", "out/student.safetensors"]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert main(["train", "--config", "run", "--out", "again"]) == 0
    assert read_json("again/result.json")["test"] == read_json("run/result.json")["test"]


@pytest.mark.slow
def test_the_exported_student_needs_torch_alone(tmp_path):
    assert main(["train", "okddip", *SMALL, "--out", str(tmp_path / "run"), "--topology", "branches"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out" / "s.safetensors")]) == 0
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("codistill", "safetensors", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, s as student
model, about = student.load("s.safetensors")
pixels = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
torch.save((model(student.normalize(pixels, about)), about["classes"]), "answer.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True)
    import torch

    from codistill.training.load import load_run

    answer, classes = torch.load(tmp_path / "out" / "answer.pt")
    t = load_run(tmp_path / "run")
    pixels = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
    x = (pixels.float() / 255 - t.data.mean[0]) / t.data.std[0]
    t.peers.eval()
    assert torch.allclose(t.peers(x).logits_PBC[3], answer, atol=1e-5)
    assert classes == [str(c) for c in range(10)]


@pytest.mark.slow
def test_compare_prints_baselines_and_trains_nothing_twice(tmp_path, capsys):
    words = [
        "compare",
        "okddip",
        *SMALL,
        "--seeds",
        "2",
        "--topology",
        "both",
        "--out",
        str(tmp_path / "grid"),
        "--workers",
        "2",
    ]
    assert main(words) == 0
    table = capsys.readouterr().out
    rows = read_json(tmp_path / "grid" / "table.json")["rows"]
    labels = ["one plain network", "independent networks", "okddip networks", "independent branches", "okddip branches"]
    assert [row["peers"] for row in rows] == labels
    for label in labels:
        assert label in table
    assert rows[2]["parameters trained"] == "312,040"
    assert rows[0]["vs equal cost"] == "-"
    assert "±" in rows[2]["vs equal cost"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("result.json")}
    assert len(stamps) == 10
    assert main(words) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("result.json")}
    plain = read_json(tmp_path / "grid/one-plain-network/seed1/result.json")["test"]["top1"][0]
    assert plain == read_json(tmp_path / "grid/independent-networks/seed1/result.json")["test"]["top1"][0]


def test_seeds_train_one_run_each(tmp_path):
    assert main(["train", "independent", *SMALL, "--peers", "1", "--seeds", "2", "--out", str(tmp_path / "runs")]) == 0
    first, second = (read_json(tmp_path / "runs" / f"seed{s}" / "config.json")["seed"] for s in (0, 1))
    assert (first, second) == (0, 1)


def test_model_may_be_repeated_for_peers_of_different_sizes(tmp_path):
    words = [
        "train",
        "independent",
        "--model",
        "resnet8",
        "--model",
        "wrn16_2",
        *SMALL[2:],
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert read_json(tmp_path / "run" / "config.json")["model"] == ["resnet8", "wrn16_2"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian okddip", 'unknown command "trian" (did you mean "train"?)'),
        ("train okdip", 'unknown method "okdip" (did you mean "okddip"?)'),
        ("train", "train needs a METHOD"),
        ("train okddip pcl", "train takes one METHOD"),
        ("compare", "compare takes at least one METHOD"),
        ("compare okdip", 'unknown method "okdip"'),
        ("compare okddip --seeds 0", "--seeds must be at least 1"),
        ("train okddip --model resnet9", 'unknown model "resnet9" (did you mean "resnet8"?)'),
        ("train okddip --data digit", 'unknown set "digit" (did you mean "digits"?)'),
        ("train okddip --topology branch", "invalid choice 'branch' for argument '--topology'"),
        ("compare okddip --config a.json", "--config is no option of this command, but of codistill train; drop it"),
        ("train okddip --epcohs 3", 'unknown option "--epcohs" (did you mean "--epochs"?)'),
        ("train okddip --method.temprature 3", '(did you mean "--method.temperature"?)'),
        ("train okddip --epochs x", "--epochs"),
        ("train okddip --peers 2", "okddip needs at least 3"),
        ("train okddip --peers -1", "--peers is -1; give at least 1"),
        ("train okddip --epochs 0", "--epochs is 0; give at least 1"),
        ("train okddip --lr nan", "--lr is nan"),
        ("train okddip --lr -1", "--lr is -1.0"),
        ("train okddip --val-fraction 1.5", "--val-fraction is 1.5"),
        ("train okddip --method.temperature 0", "--method.temperature is 0.0"),
        ("train okddip --seeds none", "--seeds none must be a number"),
        ("train okddip --batch-size 5000", "--batch-size 5000 is more than the 899 training images"),
        ("train okddip --train-per-class 5000", "--train-per-class 5000"),
        ("train okddip --data folder:nowhere", "there is no such folder"),
        ("train okddip --data npz:nothing.npz", "does not exist"),
        ("train okddip --data cifar100 --data-dir nowhere/at/all --image-size 32", "--image-size resizes"),
        ("train okddip --branch-at layer2", "add --topology branches"),
        ("train okddip --topology branches --peers 4 --fan-out 2 3", "--fan-out 2 3 makes 6 branches"),
        ("train okddip --topology branches --branch-at layer9 --model resnet8", '--branch-at "layer9" is no module'),
        ("train okddip --peers 4 --model resnet8 --model resnet20", "--model is given 2 times for --peers 4"),
        ("train okddip --config nothing.json", "--config: cannot read"),
        ("train okddip --resume nothing", "there is no run there"),
        ("compare okddip --dry-run", "--dry-run is no option of this command, but of codistill train; drop it"),
        ("train okddip --weights /dev/zero", "/dev/zero is no regular file; name a file"),
        ("evaluate", "evaluate takes one RUN"),
        ("evaluate nothing", "nothing is no run folder"),
        ("export nothing", "nothing is no run folder"),
        ("list thing", 'unknown subject "thing"'),
        ("demo --data mnist", 'no recipe for "mnist"'),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.err.startswith("codistill: ")
    assert said.err.strip().count("\n") == 0
    assert "Traceback" not in said.err
    assert not list(tmp_path.rglob("config.json"))


def test_a_config_file_with_a_wrong_key_or_type_is_refused(tmp_path, capsys):
    for values, sentence in (
        ({"epcohs": 3}, 'unknown option "epcohs" (did you mean "epochs"?)'),
        ({"epochs": "three"}, "epochs = 'three' does not fit"),
        ({"topology": "branch"}, "topology = 'branch' does not fit"),
        ({"method": {"name": "okddip", "temprature": 2}}, "method.temperature"),
        ({"method": {"name": "okdip"}}, 'unknown method "okdip"'),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert main(["train", "okddip", "--config", str(tmp_path / "config.json")]) == 2
        assert sentence.split(".")[-1] in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{not json")
    assert main(["train", "okddip", "--config", str(tmp_path / "config.json")]) == 2
    assert "is not valid json" in capsys.readouterr().err


def test_a_toml_file_is_a_config_too(tmp_path):
    (tmp_path / "run.toml").write_text(
        'method = {name = "okddip", temperature = 2.0}\n'
        'model = ["resnet8"]\nepochs = 1\nbatch_size = 16\ntrain_per_class = 6\n'
    )
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), "--peers", "3"]) == 0
    assert read_json(tmp_path / "run" / "config.json")["method"]["temperature"] == 2.0


def test_own_arrays_train(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (30, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(30) % 3,
        "names": np.array(["ignored"]),
    }
    np.savez(tmp_path / "mine.npz", **arrays)
    words = ["--model", "resnet8", "--batch-size", "16", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", "okddip", "--data", f"npz:{tmp_path / 'mine.npz'}", *words]) == 0


def test_a_full_disk_or_a_closed_folder_is_the_machines_failure(tmp_path, capsys, monkeypatch):
    import os

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    assert main(["train", "okddip", *SMALL, "--out", str(tmp_path / "run")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]  # no half-written file stays


def test_a_network_without_a_place_to_fork_is_named(capsys):
    assert main(["list", "branch-points", "--model", "tiny_network:OneLayer"]) == 2
    assert "has no module at which branches can fork" in capsys.readouterr().err


def test_a_table_without_rows_says_so(capsys):
    print_rows([], "mistakes")
    assert capsys.readouterr().out == "mistakes: none\n"


def test_a_tilde_is_the_home_directory_in_every_argument(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["--model", "resnet8", "--data", "digits", "--train-per-class", "4", "--batch-size", "20", "--epochs", "1"]
    assert main(["train", "independent", "--peers", "1", *words, "--out=~/run"]) == 0
    assert main(["export", "~/run", "--out=~/s.safetensors"]) == 0
    assert main(["train", "kd", *words, "--weights", "~/s.safetensors", "--method.teacher=~/run", "--out", "~/kd"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kd", "run", "s.md", "s.py", "s.safetensors"]
    capsys.readouterr()
    assert main(["predict", "~/run", "~/none.png"]) == 2
    assert f"{tmp_path / 'none.png'} does not exist" in capsys.readouterr().err
