"""The judgment of `benchmarks/surroundings.py` on commands that end well and badly."""

from pathlib import Path

import pytest

from real_commands import Case, judge, run_case
from terminals import HIDE, what_stays


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "accuracy 0.5", ""),
        (1, "codistill: no rank 0 answers", "exit code 1: codistill: no rank 0 answers"),
        (-9, "", "exit code -9: nothing was printed"),
        (0, "Traceback (most recent call last):\nKeyError: 'x'", "traceback: KeyError: 'x'"),
        (2, "unexpected error, a bug in codistill (x)", "unexpected error, a bug in codistill (x)"),
    ],
)
def test_a_bad_end_is_told(code: int, said: str, wrong: str, tmp_path: Path) -> None:
    case = Case("kind", "name", ["train"], (0, 2))
    assert judge(case, code, said, tmp_path) == wrong


def test_a_command_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    case = Case("kind", "name", ["list", "methods"], (0,), seconds=0.01)
    assert run_case(case, tmp_path) == "still running after 0 s"


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("done\r\n", ""),
        (f"epoch 1{HIDE}\r\n", "the cursor stays hidden"),
        ("x" * 81 + "\r\n", "a line of 81 characters"),
        ("codistill: " + "x" * 81 + "\r\n", ""),
        ("epoch 1", "the prompt would stick to the last line"),
    ],
)
def test_what_stays_on_a_terminal_is_told(said: str, wrong: str) -> None:
    assert what_stays(said) == wrong
