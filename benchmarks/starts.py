"""Start the processes of one training by hand, wrongly; all have to end in time. A part of `surroundings.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from real_commands import CODISTILL, SMALL, Case, judge, wait_for

Rank = tuple[int, list[str], int | None]
"""A rank's number, its further words, and the signal it gets."""
TIMEOUT = 12
LIMIT = 60.0
"""Seconds after the last signal in which every rank has to end: its timeout, and imports on a busy machine."""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_rank(rank: int, more: Sequence[str], port: int, place: Path) -> subprocess.Popen[str]:
    """Start one of two processes by hand, with further words."""
    words = ["train", "dml", "--peers", "2", *SMALL, "--epochs", "60", "--mesh", "peer=2", "--out", "r"]
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*CODISTILL, *words, "--collective-timeout", str(TIMEOUT), *more]
    out, err = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=os.environ | env, stdout=out, stderr=err, text=True)


def send(process: subprocess.Popen[str], number: int, place: Path) -> None:
    """Send SIGTERM while a rank imports, any other signal when it has trained an epoch."""
    if number == signal.SIGTERM:
        time.sleep(0.7)
    else:
        wait_for(lambda: (place / "r" / "last.pt").exists(), 60)
    process.send_signal(number)


def run_ranks(ranks: Sequence[Rank], codes: Sequence[int], place: Path, taken: bool) -> str:
    """Start the ranks; all but one that is stopped for ever have to end by themselves, with a code that is allowed."""
    port, wrong = free_port(), []
    with socket.socket() as other:  # another program, which never answers
        if taken:
            other.bind(("127.0.0.1", port))
            other.listen()
        processes = [start_rank(rank, more, port, place) for rank, more, _ in ranks]
        for process, (_, _, sent) in zip(processes, ranks):
            if sent is not None:
                send(process, sent, place)
        end = time.monotonic() + LIMIT
        for process, (rank, _, sent) in zip(processes, ranks):
            if sent == signal.SIGSTOP:
                continue
            try:
                _, said = process.communicate(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                wrong.append(f"rank {rank} still runs after {LIMIT:.0f} s")
                continue
            allowed = (*codes, -sent) if sent == signal.SIGKILL else codes
            wrong += [found] if (found := judge(Case("", "", (), allowed), process.returncode, said, place)) else []
        for process in processes:
            process.kill()
            process.wait()
    return "; ".join(wrong)


STARTS: list[tuple[str, list[Rank], Sequence[int], bool]] = [
    ("a rank is missing", [(0, [], None)], (1, 2), False),
    ("rank 0 is missing", [(1, [], None)], (1, 2), False),
    ("two ranks of one number", [(0, [], None), (0, [], None)], (1, 2), False),
    ("the port is in use", [(0, [], None), (1, [], None)], (1, 2), True),
    ("other options", [(0, [], None), (1, ["--lr", "0.3"], None)], (1, 2), False),
    ("other meshes", [(0, [], None), (1, ["--mesh", "data=2"], None)], (1, 2), False),
    ("a rank is stopped for ever", [(0, [], None), (1, [], signal.SIGSTOP)], (1,), False),
    ("rank 0 is stopped for ever", [(0, [], signal.SIGSTOP), (1, [], None)], (1,), False),
    ("rank 0 is killed", [(0, [], signal.SIGKILL), (1, [], None)], (1,), False),
    ("SIGTERM while importing", [(0, [], None), (1, [], signal.SIGTERM)], (1, 2, 75), False),
]
