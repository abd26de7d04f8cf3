"""Run a command of codistill as a process of its own, and judge how it ends; used by `surroundings.py`."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CODISTILL = [sys.executable, "-m", "codistill"]
SMALL = ["--model", "resnet8", "--data", "digits", "--train-per-class", "3", "--batch-size", "15", "--device", "cpu"]
TRAIN = ["train", "independent", "--peers", "1", *SMALL]
LONG = [*TRAIN, "--epochs", "500", "--eval-every-epochs", "100", "--checkpoint-every-epochs", "1"]


@dataclass
class Case:
    """A command and how it may end."""

    kind: str
    name: str
    words: Sequence[str]
    codes: Sequence[int]
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    stdout: str | None = None
    mount: str = ""
    """A shell command that runs before, in a mount namespace of its own."""
    signal: int | None = None
    """Sent after some seconds."""
    seconds: float = 120.0
    check: Callable[[Path, str], str | None] | None = None
    """Given the folder and what was printed; returns what is wrong."""


def command_of(case: Case) -> list[str]:
    """Return the process of a case."""
    if not case.mount:
        return [*CODISTILL, *case.words]
    return ["unshare", "-m", "sh", "-c", f'{case.mount} && exec "$@"', "sh", *CODISTILL, *case.words]


def run_case(case: Case, place: Path) -> str:
    """Run a case in a folder; return what is wrong, or an empty text."""

    def limit() -> None:
        for what, value in case.limits.items():
            resource.setrlimit(what, (value, value))

    target = None if case.stdout is None else os.open(case.stdout, os.O_WRONLY)
    process = subprocess.Popen(
        command_of(case),
        cwd=place,
        env=os.environ | case.env,
        stdout=subprocess.PIPE if target is None else target,
        stderr=subprocess.PIPE,
        preexec_fn=limit,
        start_new_session=True,
    )
    try:
        if case.signal is not None:
            wait_for(lambda: (place / "r" / "last.pt").exists(), 60)
            os.killpg(process.pid, case.signal)
        out, err = process.communicate(timeout=case.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"still running after {case.seconds:.0f} s"
    said = ((out or b"") + err).decode(errors="replace")
    return judge(case, process.returncode, said, place)


def judge(case: Case, code: int, said: str, place: Path) -> str:
    """Return what is wrong with the end of a case, or an empty text."""
    if "Traceback (most recent" in said:
        return "traceback: " + said.strip().splitlines()[-1]
    if "a bug in codistill" in said:
        return said.strip().splitlines()[-1]
    if code not in case.codes:
        return f"exit code {code}: {(said.strip().splitlines() or ['nothing was printed'])[-1]}"
    return (case.check and case.check(place, said)) or ""


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so, or until the time is over."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
