"""What repeats bit for bit: a run of one seed on one number of threads; with another number, all but roundings."""

import json
import subprocess
import sys

import pytest

from codistill.cli.main import main

CODE = """
import torch, hashlib, json
from codistill.config.config import Config
from codistill.training.build import build_run
from codistill.training.step import train_step
from codistill.training.run import zero_sums

for threads in (1, 2, 2):
    torch.set_num_threads(threads)
    config = Config("okddip", "resnet8", "digits", peers=3, train_per_class=6, batch_size=16, deterministic=True)
    config.device = "cpu"
    t = build_run(config.resolved())
    t.progress.sums = zero_sums(t)
    order = hashlib.sha256()
    for views, targets in t.loader.epoch(0):
        order.update(views.numpy().tobytes())
        train_step(t, views, targets, 1.0)
    weights = hashlib.sha256()
    for value in t.peers.state_dict().values():
        weights.update(value.numpy().tobytes())
    print(json.dumps([weights.hexdigest(), t.progress.sums["loss"].item(), order.hexdigest(), torch.get_num_threads()]))
"""


@pytest.mark.slow
def test_a_run_repeats_bit_for_bit_on_as_many_threads():
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout)
    one, two, again = map(json.loads, done.stdout.splitlines())
    assert [one[3], two[3]] == [1, 2]
    assert two == again
    assert one[2] == two[2]  # the batches, augmented, are the same
    assert one[1] == pytest.approx(two[1], rel=1e-4)  # sums are added up in another order


def test_a_nondeterministic_operation_is_a_clear_error(monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but ...")

    monkeypatch.setattr(sys.modules["codistill.training.loop"], "train_step", refuse)
    words = ["--model", "resnet8", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", "okddip", "--deterministic", *words]) == 2
    assert "--deterministic: adaptive_avg_pool2d_backward_cuda has no deterministic kernel" in capsys.readouterr().err
