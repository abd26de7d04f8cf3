"""Run commands on a terminal of 80 columns and look at what they leave there; a part of `surroundings.py`."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from real_commands import CODISTILL, LONG, SMALL, TRAIN, Case, judge

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"
PHOTOS = ["train", "independent", "--peers", "1", "--model", "resnet8", "--data", "folder:photos", "--image-size", "32"]
PHOTOS += ["--batch-size", "4", "--epochs", "1", "--device", "cpu"]
TERMINALS: list[tuple[str, list[str], int | None, Sequence[int]]] = [
    ("ends well", [*TRAIN, "--epochs", "3", "--out", "r"], None, (0,)),
    ("Ctrl-C", [*LONG, "--out", "r"], signal.SIGINT, (75, 130)),
    ("SIGTERM", [*LONG, "--out", "r"], signal.SIGTERM, (75,)),
    ("SIGHUP", [*LONG, "--out", "r"], signal.SIGHUP, (75,)),
    ("a loss that is not finite", [*TRAIN, "--epochs", "9", "--lr", "1e30", "--out", "r"], None, (1,)),
    ("a wrong option", [*TRAIN, "--epochs", "-1"], None, (2,)),
    ("predict", ["predict", "run", "photos/train/kühe/0.png"], None, (0,)),
    (
        "Ctrl-C, compare",
        ["compare", "dml", *SMALL, "--epochs", "500", "--seeds", "1", "--out", "r"],
        signal.SIGINT,
        (75, 130),
    ),
    ("an image that cannot be read", [*PHOTOS, "--out", "r"], None, (2,)),
    ("compare", ["compare", "dml", *SMALL, "--epochs", "2", "--seeds", "2", "--out", "g"], None, (0,)),
]


def run_in_terminal(words: Sequence[str], sent: int | None, codes: Sequence[int], place: Path) -> str:
    """Run a command on a terminal of 80 columns; return what is wrong, or an empty text."""
    if words[:1] == ["train"] and "folder:photos" in words:
        (place / "photos" / "train" / "kühe" / "broken.png").write_bytes(b"\x89PNG broken")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.environ |= {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
        os.execv(CODISTILL[0], [*CODISTILL, *words])
    said, end, asked = b"", time.monotonic() + 120, False
    while time.monotonic() < end:
        if sent is not None and not asked and any((place / "r").rglob("last.pt")):
            os.kill(pid, sent)
            asked = True
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            said += os.read(terminal, 65_536)
        except OSError:  # the other side is closed
            break
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    text = said.decode(errors="replace")
    if wrong := judge(Case("", "", (), codes), os.waitstatus_to_exitcode(status), text, place):
        return wrong
    return what_stays(text)


def what_stays(text: str) -> str:
    """Return what is wrong with all that was printed on a terminal, or an empty text."""
    if text.rfind(HIDE) > text.rfind(SHOW):
        return "the cursor stays hidden"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    widest = max((len(line) for line in re.split(r"[\r\n]+", plain)), default=0)
    if widest > 80 and "codistill: " not in plain:  # an error is one line, however long
        return f"a line of {widest} characters"
    return "" if not plain or plain.endswith(("\n", "\r")) else "the prompt would stick to the last line"
