"""Starts of a job that go wrong: every rank ends in time, and one says why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import HashStore

from codistill.cli.main import main
from codistill.distributed.heartbeat import Heartbeat
from helpers.folders import write_images
from helpers.processes import free_port

WORDS = ["train", "independent", "--peers", "2", "--model", "tiny_network:Tiny", "--data", "digits", "--device", "cpu"]
WORDS += ["--train-per-class", "6", "--batch-size", "16", "--epochs", "1", "--collective-timeout", "20"]
TESTS = str(Path(__file__).parents[1] / "helpers")


def start(
    ranks: list[dict[str, str]], more: list[list[str]], out: Path, folders: tuple[Path | None, ...] = (None, None)
) -> list[subprocess.Popen]:
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "codistill", *WORDS, "--out", str(out), *words],
            env=os.environ | common | {"PYTHONPATH": path} | rank,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank, words, folder in zip(ranks, more, folders)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["--mesh", "data=2"], ["--mesh", "data=2", "--lr", "0.2"], "--lr is 0.1 on rank 0 and 0.2 on rank 1"),
        (["--mesh", "data=2"], ["--mesh", "peer=2"], "--mesh is data=2 on rank 0 and peer=2 on rank 1"),
    ],
)
def test_ranks_with_other_options_are_refused_before_the_first_step(first, second, said, tmp_path):
    jobs = start([{"RANK": "0"}, {"RANK": "1"}], [first, second], tmp_path / "run")
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2]
    assert errors == [f"codistill: {said}; give all the same\n", ""]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_whose_files_have_the_same_names_and_another_content_is_refused(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name / "images", per_class=8)
    Image.new("RGB", (30, 30)).save(tmp_path / "b" / "images" / "val" / "cat" / "3.png")
    words = ["--mesh", "data=2", "--data", "folder:images", "--image-size", "16"]
    words[:0] = ["--train-per-class", "4", "--batch-size", "8"]
    jobs = start([{"RANK": "0"}, {"RANK": "1"}], [words] * 2, tmp_path / "run", (tmp_path / "a", tmp_path / "b"))
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [2, 2], errors
    assert "--data folder:images: rank 1 has other images than rank 0; give all ranks the same files" in errors[0]


@pytest.mark.slow
def test_a_rank_that_never_comes(tmp_path):
    (job,) = start([{"RANK": "1"}], [["--mesh", "data=2", "--collective-timeout", "3"]], tmp_path / "run")
    error = job.communicate(timeout=120)[1]
    assert job.returncode == 1
    assert "codistill: rank 1: the ranks did not meet within 3 seconds" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "2")]
)
def test_numbers_of_the_environment_are_checked(name, value, monkeypatch, tmp_path, capsys):
    for key, text in ({"RANK": "0", "WORLD_SIZE": "2"} | {name: value}).items():
        monkeypatch.setenv(key, text)
    assert main([*WORDS, "--out", str(tmp_path / "run"), "--mesh", "data=2"]) == 2
    assert not (tmp_path / "run").exists()
    assert f"the environment variable {name} is" in capsys.readouterr().err


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_rank_that_was_started_by_hand_says_what_is_wrong_with_its_own_command(by_torchrun, monkeypatch, capsys):
    """torchrun gives all ranks one command, and the first rank speaks for all."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["train", "independent", "--epcohs", "3"]) == 2
    assert capsys.readouterr().err.startswith("codistill: rank 1: unknown option") is not by_torchrun


def test_a_port_that_another_program_holds_ends_in_time(monkeypatch, capsys, tmp_path):
    """It takes the connection and never answers."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place.getsockname()[1])}
        for name, text in (address | {"RANK": "1", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, text)
        began = time.monotonic()
        words = [*WORDS, "--out", str(tmp_path / "run"), "--mesh", "data=2", "--collective-timeout", "1"]
        assert main(words) == 1
    assert time.monotonic() - began < 10
    assert "rank 1: the ranks did not meet within 1 seconds (" in capsys.readouterr().err


def test_a_store_that_does_not_answer_is_asked_once():
    """Its rank was stopped: each question would take as long again."""
    heartbeat = Heartbeat(HashStore(), 0, 2, timeout=1.0)
    try:
        assert heartbeat._answer_seconds == 4.0  # as long as a diagnosis takes
        heartbeat._answer_seconds = 0.1
        began = time.monotonic()
        assert heartbeat._ask_store(lambda: time.sleep(30)) is None
        assert "does not answer" in str(heartbeat.diagnose("timed out"))
        heartbeat.report_failure("timed out")
        assert time.monotonic() - began < 3.0
    finally:
        heartbeat.stop()


def test_a_local_world_of_none_is_refused(monkeypatch):
    from codistill.utils.environ import environment_number
    from codistill.utils.errors import InputError

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE is '0' and must be a whole number from 1 on"):
        environment_number("LOCAL_WORLD_SIZE", 1, 1)
