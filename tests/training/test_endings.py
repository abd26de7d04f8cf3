"""How runs end when something goes wrong: one sentence, the exit code, the state kept, and the way on."""

import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_network import Tiny

from codistill.cli.main import main
from codistill.data import DeviceLoader
from codistill.runs import read_epoch_lines
from codistill.runs.checkpoint import list_checkpoints, load_checkpoint
from codistill.runs.run_folder import RunFolder
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.reporter import Reporter
from codistill.training.run import zero_sums
from codistill.training.step import train_step
from codistill.utils.errors import InputError, explain_failure
from helpers.common import read_json
from helpers.runs import small

WORDS = [
    *(
        "train",
        "independent",
        "--peers",
        "2",
        "--model",
        "tiny_network:Tiny",
        "--data",
        "digits",
        "--train-per-class",
    ),
    *("6", "--batch-size", "16", "--epochs", "3", "--device", "cpu", "--log-every-steps", "1"),
]


def ended(capsys, code: int, words: list[str]) -> str:
    """Run a command that must end with this code, and return its one sentence."""
    assert main(words) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("codistill: ")]
    sentences = [line for line in said if not line.startswith("codistill: warning")]
    assert len(sentences) == 1
    return sentences[0]


def same_end(out: Path, whole: Path) -> None:
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert read_json(out / "result.json")["test"] == read_json(whole / "result.json")["test"]
    ours, theirs = load_checkpoint(out / "last.pt"), load_checkpoint(whole / "last.pt")
    assert all(torch.equal(value, ours["peers"][name]) for name, value in theirs["peers"].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*WORDS, "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    """Leave out the forwards of the trial: tests here count those of training."""
    monkeypatch.setattr("codistill.training.build.try_networks", lambda config, *_: (config, []))


def in_child(what) -> int:
    """Run something in a forked process and return the process's number."""
    child = os.fork()
    if not child:
        try:
            what()
        finally:
            os._exit(1)
    return child


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path, capsys, whole):
    out = tmp_path / "run"

    def hold():
        with RunFolder(small(out)).lock():
            time.sleep(60)

    child = in_child(hold)
    while not (out / "run.lock").exists() or not (out / "run.lock").read_text().endswith("\n"):
        time.sleep(0.01)
    said = ended(capsys, 2, [*WORDS, "--out", str(out)])
    assert f"--out {out} is in use by process {child} on {os.uname().nodename}; wait for that run's end" in said
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert main([*WORDS, "--out", str(out)]) == 0
    same_end(out, whole)


def test_what_a_run_forks_does_not_hold_its_folder(tmp_path):
    """As processes that decode live on for seconds where their trainer is killed."""
    folder = RunFolder(small(tmp_path / "run"))
    ready, begun = os.pipe()

    def outlive():
        os.write(begun, b"x")
        time.sleep(60)

    with folder.lock():
        child = in_child(outlive)
        os.read(ready, 1)
        with pytest.raises(InputError, match="is in use"), folder.lock():  # the child's copy is closed, no lock undone
            pass
    try:
        with folder.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(begun)


def test_a_folder_that_cannot_be_written_to_is_refused(capfd):
    out = Path(tempfile.mkdtemp())
    out.chmod(0o555)

    def nobody():
        if os.getuid() == 0:
            os.setuid(65534)
        os._exit(main([*WORDS, "--out", str(out / "run")]))

    _, status = os.waitpid(in_child(nobody), 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert (
        f"--out {out / 'run'} cannot be written to (Permission denied); name another folder" in capfd.readouterr().err
    )
    assert not list(out.iterdir())
    out.rmdir()


def with_little_room(words: list[str], size: int) -> str:
    """Run a command that must end with 1, where no file may grow beyond a size; return what it says.

    What is written up to there stays, as on a full disk. A process of its own, for pytest writes files too.
    """
    receive, send = os.pipe()

    def command():
        os.dup2(send, 2)
        os.dup2(send, 1)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        os._exit(main(words))

    child = in_child(command)
    os.close(send)
    with os.fdopen(receive) as stream:
        said = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("size", [5_000, 15_000])
def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, whole, size):
    out = tmp_path / "run"
    said = with_little_room([*WORDS, "--out", str(out)], size)
    assert "best.pt: File too large; no existing file was changed" in said
    assert not list(out.glob(".*"))
    assert not list_checkpoints(out)
    assert main([*WORDS, "--out", str(out), "--resume", "auto"]) == 0
    same_end(out, whole)


def test_a_full_disk_while_metrics_are_written(tmp_path, capsys, whole, monkeypatch):
    out = tmp_path / "run"

    def begin(self, *_):  # /dev/full takes nothing, as a full disk does
        (out / "metrics.jsonl").unlink()
        (out / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr("codistill.cli.console.RichReporter.begin", begin)
    monkeypatch.setattr("codistill.cli.console.RichReporter.step", lambda *_: None)
    assert "metrics.jsonl: No space left on device" in ended(capsys, 1, [*WORDS, "--out", str(out)])
    monkeypatch.undo()
    (out / "metrics.jsonl").unlink()
    assert main([*WORDS, "--out", str(out), "--resume", "auto"]) == 0
    same_end(out, whole)


@pytest.mark.slow
def test_a_full_disk_in_a_grids_bookkeeping(tmp_path):
    from codistill.reproduce.workers import train_job

    grid = ["compare", "independent", "--model", "resnet8", *WORDS[6:], "--seeds", "1", "--workers", "1", "--out"]
    grid = [*grid, str(tmp_path / "grid"), "--peers", "2"]
    assert main(grid) == 0
    held = {p: p.read_bytes() for p in (tmp_path / "grid").glob("*.*")}
    assert "grid.json: File too large; no existing file was changed" in with_little_room(grid, 100)
    assert held == {p: p.read_bytes() for p in (tmp_path / "grid").glob("*.*")}
    assert main(grid) == 0
    # A run whose place cannot be made fails with a sentence and takes no other run with it.
    figures, why = train_job(small(tmp_path / "grid" / "table.json" / "seed0").resolved())
    assert figures is None
    assert why is not None
    assert why.startswith("File exists: ") or why.startswith("Not a directory: ")


def test_a_data_file_that_vanished(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (60, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(60) % 3 for part in ("train", "test")}
    data = tmp_path / "mine.npz"
    np.savez(data, **arrays)
    words = [w if w != "digits" else f"npz:{data}" for w in WORDS]

    class Stop(Reporter):
        def step(self, epoch, step, loss):
            if (epoch, step) == (1, 1):
                data.rename(tmp_path / "elsewhere.npz")
                os.kill(os.getpid(), signal.SIGTERM)

    config = small(tmp_path / "run", data=f"npz:{data}", log_every_steps=1)
    with pytest.raises(Exception, match="SIGTERM"):
        train(config, Stop())
    kept = (tmp_path / "run" / "last.pt").read_bytes()
    said = ended(capsys, 2, [*words, "--out", str(tmp_path / "run"), "--resume", "auto"])
    assert said == f"codistill: --data npz:{data}: {data} does not exist; name an .npz file"
    assert (tmp_path / "run" / "last.pt").read_bytes() == kept
    (tmp_path / "elsewhere.npz").rename(data)
    assert main([*words, "--out", str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    same_end(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the batches of these (epoch, step) NaN."""
    places: set[tuple[int, int]] = set()
    epoch = DeviceLoader.epoch

    def with_poison(self, number=0, start=0):
        for step, (views, targets) in enumerate(epoch(self, number, start), start):
            bad = (number, step) in places and self.options.augmentation is not None
            yield (torch.full_like(views, float("nan")) if bad else views), targets

    monkeypatch.setattr(DeviceLoader, "epoch", with_poison)
    return places


@pytest.mark.parametrize("every", ["1", "50"])
def test_a_nan_batch_ends_the_run_with_its_weights_kept(tmp_path, capsys, whole, poisoned, every):
    poisoned.add((1, 2))
    out = tmp_path / "run"
    words = [*WORDS, "--log-every-steps", every, "--out", str(out)]
    said = ended(capsys, 1, words)
    assert "the loss stopped being finite at epoch 1, step 2 (loss nan, gradient norm nan" in said
    assert f"the weights before it are kept in {out / 'last.pt'}; lower --lr" in said
    state = load_checkpoint(out / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in state["peers"].values())
    poisoned.clear()
    assert main([*words, "--resume", "auto"]) == 0
    if every == "1":  # else BatchNorm's statistics are those of the last look
        same_end(out, whole)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the device is out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "the device is out of memory"),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the device is out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB"), "the device is out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the machine is out of memory"),
        (MemoryError(), "the machine is out of memory"),
    ],
)
def test_every_allocators_failure_is_a_sentence(error, sentence):
    said, code = explain_failure(error)
    assert said is not None
    assert said.startswith(sentence)
    assert code == 1
    assert explain_failure(torch.AcceleratorError("CUDA error: an illegal memory access")) == (None, 1)


def test_running_statistics_survive_a_bad_first_step_of_a_resume(tmp_path, capsys, whole, poisoned):
    out = tmp_path / "run"
    words = [*WORDS, "--checkpoint-every-steps", "1", "--out", str(out)]
    for _ in range(2):  # the second time it is the first step of the process
        poisoned.add((1, 2))
        assert "at epoch 1, step 2" in ended(capsys, 1, [*words, "--resume", "auto"])
    poisoned.clear()
    assert main([*words, "--resume", "auto"]) == 0
    same_end(out, whole)


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(tmp_path, capsys, poisoned):
    out = tmp_path / "run"
    poisoned |= {(0, 1), (1, 2)}
    words = [*WORDS, "--out", str(out)]
    assert "at epoch 1, step 2" in ended(capsys, 1, [*words, "--skip-nonfinite", "1"])
    assert load_checkpoint(out / "last.pt")["skipped"] == 1
    assert "at epoch 1, step 2" in ended(capsys, 1, [*words, "--skip-nonfinite", "1", "--resume", "auto"])
    assert main([*words, "--skip-nonfinite", "2", "--resume", "auto"]) == 0
    assert "warning: 2 of at most 2 steps skipped: their loss was not finite" in capsys.readouterr().err
    lines = read_epoch_lines(out / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2]
    assert all(np.isfinite(line["train"]["loss"]) and line["train"]["top1"][0] > 0 for line in lines)
    assert main([*words[:-1], str(tmp_path / "whole"), "--skip-nonfinite", "2"]) == 0
    same_end(out, tmp_path / "whole")


def test_an_unused_limit_changes_nothing(tmp_path, whole):
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--skip-nonfinite", "3"]) == 0
    ours, theirs = load_checkpoint(tmp_path / "run" / "last.pt"), load_checkpoint(whole / "last.pt")
    assert all(torch.equal(value, ours["peers"][name]) for name, value in theirs["peers"].items())


def test_an_exploding_loss_ends_the_run(tmp_path, capsys):
    words = [*WORDS, "--out", str(tmp_path / "run"), "--lr", "1e25", "--model", "resnet8"]
    assert "lower --lr (now 1e+25) or add --warmup-epochs" in ended(capsys, 1, words)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in state["peers"].values())


@pytest.mark.parametrize("place", ["the machine", "the device"])
def test_memory_that_runs_out(tmp_path, capsys, monkeypatch, whole, place):
    forward, calls = Tiny.forward, []

    def greedy(self, x_BCHW):
        calls.append(self.training)
        if sum(calls) == 13:  # in the second epoch
            if place == "the device":
                raise torch.OutOfMemoryError("CUDA out of memory")
            torch.empty(1 << 60)
        return forward(self, x_BCHW)

    out = tmp_path / "run"
    monkeypatch.setattr(Tiny, "forward", greedy)
    said = ended(capsys, 1, [*WORDS, "--out", str(out)])
    assert f"{place} is out of memory at epoch 1, step 1; the checkpoints in {out} are kept: continue with" in said
    assert "--checkpoint-activations" in said
    monkeypatch.undo()
    assert main([*WORDS, "--out", str(out), "--resume", "auto", "--checkpoint-activations"]) == 0
    assert read_json(out / "result.json")["test"] == read_json(whole / "result.json")["test"]


def test_a_second_start_while_the_first_one_trains(tmp_path):
    """Whoever comes second is refused before it has read or written anything of the run."""
    out = tmp_path / "run"

    class Second(Reporter):
        said = ""

        def step(self, epoch, step, loss):
            try:
                train(small(out, epochs=1, resume="auto"))
            except InputError as error:
                self.said = str(error)

    reporter = Second()
    train(small(out, epochs=1), reporter)
    assert "is in use by process" in reporter.said


def test_mean_teachers_stand_still_from_the_first_bad_step_on():
    config = small(Path("unused"), model="resnet8")
    config.method, config.peers = "pcl", 2
    config.__post_init__()
    t = build_run(config.resolved())
    t.progress.sums = zero_sums(t)
    batches = [batch for _, batch in zip(range(3), t.loader.epoch(0))]
    train_step(t, *batches[0], 1.0)
    t.progress.step += 1
    train_step(t, *batches[1], 1.0)
    t.progress.step += 1
    kept = {k: v.detach().clone() for k, v in t.ema.named_parameters()}
    for _ in range(3):
        train_step(t, torch.full_like(batches[2][0], float("nan")), batches[2][1], 1.0)
        t.progress.step += 1
    assert all(torch.equal(v, kept[k]) for k, v in t.ema.named_parameters())
