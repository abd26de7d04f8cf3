"""A job of several processes through the real command: what one process does, and what happens when ranks fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from codistill.cli.main import main
from helpers.common import read_json
from helpers.processes import free_port, torchrun

pytestmark = pytest.mark.slow

TRAIN = [
    *("-m", "codistill", "train", "okddip", "--model", "resnet8", "--data", "digits", "--train-per-class", "6"),
    *("--batch-size", "16", "--peers", "4", "--epochs", "8", "--device", "cpu", "--checkpoint-every-steps", "1"),
    *("--execution", "loop"),  # as on a mesh: the results are compared bit by bit
    *("--log-every-steps", "1", "--mesh", "data=1,peer=2"),
]


def start(out: Path, *more: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    command = torchrun(2, *TRAIN, "--out", str(out), *more, options=options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def worker(job: subprocess.Popen, rank: int) -> int:
    """Return the process number of a rank, once the run has done an epoch."""
    for place in Path("/proc").iterdir():
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1]) if place.name.isdigit() else 0
            if parent == job.pid and f"RANK={rank}".encode() in (place / "environ").read_bytes().split(b"\0"):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is not there")


def wait_for_epochs(job: subprocess.Popen, out: Path, epochs: int) -> None:
    lines = out / "metrics.jsonl"
    for _ in range(1800):
        if lines.exists() and len(lines.read_text().splitlines()) >= epochs:
            return
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.05)
    raise AssertionError("the job does not get on")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    words = TRAIN[2 : TRAIN.index("--mesh")]
    assert main([*words, "--out", str(out)]) == 0
    return out


def two_machines(out: Path) -> list[subprocess.Popen]:
    """Start a job of two agents with a process each, which meet on the loopback address."""
    port = f"--master-port={free_port()}"
    jobs = []
    for node in range(2):
        place = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1", port]
        command = [sys.executable, "-m", "torch.distributed.run", *place, *TRAIN, "--out", str(out)]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}  # torchrun sees to it where it starts several processes
        jobs.append(subprocess.Popen(command, env=threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return jobs


def same_result(one: Path, other: Path) -> None:
    ours, theirs = read_json(one / "result.json"), read_json(other / "result.json")
    for name in ("seconds", "cost"):  # what a process costs is its own; on a mesh it is not measured
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_a_killed_rank_is_named_and_the_job_restarts(tmp_path, alone):
    out = tmp_path / "run"
    job = start(out, options=("--max-restarts=1",))
    wait_for_epochs(job, out, 2)
    os.kill(worker(job, 1), signal.SIGKILL)
    _, said = job.communicate(timeout=120)
    print(said)
    assert job.returncode == 0, said
    assert "rank 1 (" in said
    assert "no longer answers: it was killed, ran out of memory or was stopped" in said
    assert "resumed at epoch" in said
    same_result(out, alone)  # bit for bit what one process gives


def test_a_hanging_rank_ends_the_job_and_the_run_resumes(tmp_path, alone):
    out = tmp_path / "run"
    job = start(out, "--collective-timeout", "10")
    wait_for_epochs(job, out, 2)
    stopped, began = worker(job, 1), time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    assert job.stderr is not None
    said = ""
    while "no longer answers" not in said:
        said += job.stderr.readline()
    os.kill(stopped, signal.SIGKILL)  # torchrun would do so itself, after 30 seconds
    said += job.communicate(timeout=120)[1]
    print(said)
    assert job.returncode == 1
    assert 10 <= time.monotonic() - began < 60
    assert said.count("no longer answers") == 1
    assert f"rank 1 ({os.uname().nodename}, process {stopped}) no longer answers" in said
    assert "Traceback" not in said.split("torch/distributed")[0]
    words = TRAIN[2 : TRAIN.index("--mesh")]
    assert main([*words, "--out", str(out), "--resume", "auto"]) == 0
    same_result(out, alone)


def test_a_signal_on_one_machine_ends_both_with_a_checkpoint(tmp_path, alone):
    out = tmp_path / "run"
    jobs = two_machines(out)
    wait_for_epochs(jobs[0], out, 2)
    os.kill(worker(jobs[1], 1), signal.SIGUSR1)
    said = [job.communicate(timeout=120)[1] for job in jobs]
    print(*said, sep="\n--\n")
    assert [job.returncode for job in jobs] == [1, 1]  # torchrun's own, whatever its processes end with
    assert "exitcode  : 75" in said[0]
    assert "stopped by SIGUSR1" in said[0]
    assert not (out / "result.json").exists()
    words = TRAIN[2 : TRAIN.index("--mesh")]
    assert main([*words, "--out", str(out), "--resume", "auto"]) == 0
    same_result(out, alone)


def test_a_non_finite_loss_ends_all_ranks_with_good_weights(tmp_path):
    out = tmp_path / "run"
    job = start(out, "--lr", "1e18")
    _, said = job.communicate(timeout=120)
    print(said)
    assert job.returncode == 1
    assert said.count("the loss stopped being finite at epoch 0") == 1
    state = torch.load(out / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["peers"].values() if value.is_floating_point())


OUT_OF_MEMORY = """
import os, sys, torch
import codistill.training.loop as loop
real, steps = loop.train_step, []
def step(*args):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 9:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(*args)
loop.train_step = step
from codistill.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_out_of_memory_is_named_with_the_reason(tmp_path):
    script, out = tmp_path / "short.py", tmp_path / "run"
    script.write_text(OUT_OF_MEMORY)
    command = torchrun(2, str(script), *TRAIN[2:], "--out", str(out))
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(done.stderr)
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    assert "codistill: rank 1: the device is out of memory at epoch 2, step 0; the checkpoints in" in done.stderr
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 2
