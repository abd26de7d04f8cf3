"""Output that cannot be written, and the terminal after a run."""

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from codistill.cli.console import RichReporter, TimeLeft, out, print_rows, progress_bar, show_progress
from codistill.cli.main import main
from codistill.cli.output import SafeStream
from codistill.utils.progress import set_progress_display, track

HELP = [sys.executable, "-m", "codistill", "list", "data"]


def test_characters_that_the_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="cp1252"))
    stream.write("café 猫 \udcff\n")
    stream.flush()
    assert raw.getvalue().decode("cp1252") == "café \\u732b \\udcff\n"


def test_a_stream_that_cannot_be_written_ends_nothing():
    stream = SafeStream(open("/dev/full", "w"))  # noqa: SIM115
    stream.write("x" * 100_000)
    stream.flush()
    stream.write("more")
    assert "No space left" in str(stream.failure)
    missing = SafeStream(None)
    assert missing.write("x") == 1
    assert not missing.isatty()
    assert missing.failure is None


def test_signals_after_the_last_sentence_do_not_change_the_code(monkeypatch):
    """An impatient user presses Ctrl-C again while the interpreter ends."""
    module = sys.modules["codistill.cli.main"]
    monkeypatch.setattr(module, "main", lambda: 75)
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")}
    try:
        with pytest.raises(SystemExit) as ended:
            module.run()
        for name in before:
            os.kill(os.getpid(), getattr(signal, name))
        assert ended.value.code == 75
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_a_reader_that_goes_away_and_a_full_disk():
    process = subprocess.Popen(HELP, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 0
    with open("/dev/full", "w") as full:
        ended = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "the output cannot be written" in ended.stderr


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False, emoji=False)


def test_bar_count_and_time_are_seen_at_80_columns(terminal):
    with progress_bar(terminal) as bar:
        bar.add_task("epochs", total=300, completed=7, note="loss 1.234  val 91.2  ensemble 92.3 :x: " + "y" * 80)
    last = next(line for line in reversed(terminal.file.getvalue().splitlines()) if "epochs" in line)
    assert "7/300" in last
    assert "-:--:--" in last
    assert "loss 1.234" in last
    assert "❌" not in last


LINE = {"epoch": 0, "train": {"loss": 1.5, "top1": [80.0, 81.0]}}


@pytest.mark.parametrize("width", [40, 50, 60])
def test_in_a_narrower_terminal_the_bar_shrinks_and_not_the_time(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, emoji=False)
    with progress_bar(console) as bar:
        bar.add_task("epochs", total=300, completed=300, note="loss 1.234  val 50.0  ensemble 51.2")
    last = next(line for line in reversed(console.file.getvalue().splitlines()) if "epochs" in line)
    assert "300/300" in last
    assert "0:00:00" in last or "-:--:--" in last


def test_the_time_left_is_seen_at_80_columns_in_the_first_epoch(terminal, monkeypatch):
    now = iter([0.0, 90.0])
    monkeypatch.setattr("codistill.cli.console.err", terminal)
    monkeypatch.setattr(TimeLeft.__init__, "__defaults__", (lambda: next(now),))
    reporter = RichReporter()
    reporter.begin([], 300, 150, 0)
    reporter.step(0, 50, 1.3)
    reporter.step(0, 125, 1.234)
    reporter.stop()
    last = next(line for line in reversed(terminal.file.getvalue().splitlines()) if "epochs" in line)
    assert "0/300" in last
    assert "14:57:30" in last  # half an epoch in 90 s, and 299 1/6 epochs are left
    assert "loss 1.234" in last


def test_without_a_terminal_a_line_ends_in_the_time_left(monkeypatch):
    plain = Console(file=io.StringIO(), width=160)
    now = iter([0.0, 60.0, 100.0])
    monkeypatch.setattr("codistill.cli.console.err", plain)
    monkeypatch.setattr(TimeLeft.__init__, "__defaults__", (lambda: next(now),))
    reporter = RichReporter()
    reporter.begin([], 13, 5, 10)
    reporter.step(10, 5, 1.5)
    for epoch in (10, 11, 12):
        reporter.epoch(LINE | {"epoch": epoch})
    reporter.stop()
    ends = ["", "  0:01:00 left", ""]  # nothing is known at the first report, and nothing is left at the last
    lines = [f"epoch {n}: loss 1.500  train 80.0 81.0{end}" for n, end in zip((11, 12, 13), ends, strict=True)]
    assert plain.file.getvalue().splitlines() == lines


def test_the_cursor_is_shown_again_however_a_run_ends(terminal, monkeypatch):
    monkeypatch.setattr("codistill.cli.console.err", terminal)
    reporter = RichReporter()
    reporter.stop()  # a run that never began
    reporter.begin([], 3, 1, 0)
    reporter.step(0, 1, 1.0)
    reporter.stop()
    assert terminal.file.getvalue().rstrip("\n").endswith("\x1b[?25h")


@pytest.mark.parametrize("begun", [True, False])
def test_the_cursor_is_shown_again_where_a_command_ends_while_images_are_decoded(terminal, monkeypatch, begun):
    """An exception leaves the display open, or the bar half begun."""

    def decode(*_):
        for _ in track([1, 2, 3], "decoding images"):
            raise MemoryError

    def begin(*_):
        terminal.show_cursor(False)
        raise MemoryError

    monkeypatch.setattr("codistill.cli.console.err", terminal)
    monkeypatch.setattr(sys.modules["codistill.cli.main"], "parse_and_run", decode if begun else begin)
    set_progress_display(show_progress)
    try:
        assert main(["list", "data"]) == 1
    finally:
        set_progress_display(None)
    shown = terminal.file.getvalue()
    assert "\x1b[?25l" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_name_between_colons_is_no_emoji(capsys):
    print_rows([{"class": ":x:", "[bold]": ":smile:"}], "run folder: :heart:")
    out.print("run folder: :tada:")
    said = capsys.readouterr().out
    assert [word for word in (":x:", ":smile:", ":heart:", ":tada:", "[bold]") if word not in said] == []
