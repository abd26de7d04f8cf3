"""What repeats bit for bit: a run of one seed on one number of threads; with another number, all but roundings."""

import json
import subprocess
import sys

import pytest

CODE = """
import sys, torch, hashlib, json
torch.set_num_threads(int(sys.argv[1]))
from codistill.config import Config
from codistill.train import train
config = Config("okddip", "resnet8", "digits", peers=3, train_per_class=6, batch_size=16, epochs=1, device="cpu")
config.out, config.deterministic = sys.argv[2], True
result = train(config)
digest = hashlib.sha256()
for name, value in result.peers.state_dict().items():
    digest.update(name.encode() + value.numpy().tobytes())
line = json.loads(open(sys.argv[2] + "/metrics.jsonl").readline())
print(json.dumps([digest.hexdigest(), line["train"]["loss"], result.figures["split"], torch.get_num_threads()]))
"""


def run(threads: int, out) -> list:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(threads), str(out)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_run_repeats_bit_for_bit_on_as_many_threads(tmp_path):
    one, *two = (run(threads, tmp_path / str(n)) for n, threads in enumerate((1, 2, 2)))
    assert [one[3], two[0][3]] == [1, 2]
    assert two[0] == two[1]
    assert one[2] == two[0][2]  # splits, order and augmentation are the same
    assert one[1] == pytest.approx(two[0][1], rel=1e-4)  # sums are added up in another order


def test_an_operation_without_a_deterministic_kernel_is_a_sentence(monkeypatch, capsys, tmp_path):
    from codistill.cli import main

    def refuse(*_):
        raise RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but ...")

    monkeypatch.setattr("codistill.train.train_step", refuse)
    words = ["--model", "resnet8", "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", "okddip", "--deterministic", *words]) == 2
    assert "--deterministic: adaptive_avg_pool2d_backward_cuda has no such kernel" in capsys.readouterr().err
