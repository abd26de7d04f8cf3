"""Terminal output: progress bars and tables."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from codistill.runs import EpochLine, Figures, RunResult
from codistill.training import Reporter
from codistill.utils import Rows, looks_numeric, on_one_line, set_progress_display

FILE_WIDTH = 160  # columns where the output is no terminal


class PlainConsole(Console):
    """Prints text whose names users have chosen: nothing in it is read as markup, color or a terminal's command."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else FILE_WIDTH
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, as `Console.print` does, every text on one line and without control characters."""
        super().print(*(on_one_line(part) if isinstance(part, str) else part for part in objects), **options)


out, err = PlainConsole(), PlainConsole(stderr=True)


def new_table(title: str | None) -> Table:
    """Return an empty table with a title on the left."""
    return Table(title=None if title is None else on_one_line(title), title_justify="left")


def progress_bar(console: Console, time_left: ProgressColumn | None = None) -> Progress:
    """Return the progress bar of all commands; it is shown only in a terminal.

    Args:
        console: Where it is shown.
        time_left: The column of the time left; default rich's own estimate.
    """
    bar_width = max(4, min(20, console.width - 44))
    whole = lambda: Column(no_wrap=True, min_width=7)  # noqa: E731 - never narrowed; what is too long is the note
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width, table_column=Column(no_wrap=True, min_width=bar_width)),
        MofNCompleteColumn(table_column=whole()),
        TimeRemainingColumn(table_column=whole()) if time_left is None else time_left,
        _NoteColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=False)),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


class _NoteColumn(TextColumn):
    """The last column, which is cut where the terminal is too narrow for it."""

    def render(self, task: Task) -> Text:
        """Return the note on one line."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def show_progress(items: Sequence[Any], description: str) -> Generator[Any, None, None]:
    """Yield the items under a progress bar, which disappears at the end; on the first rank of a job alone."""
    with progress_bar(err) as bar:
        bar.live.transient = True
        bar.disable |= os.environ.get("RANK", "0") != "0"
        task = bar.add_task(description, total=len(items), note="")
        for item in items:
            yield item
            bar.advance(task)


class TimeLeft:
    """Estimates the time that a run still takes, from its mean speed since the first report.

    The first report is the base: what comes before it is set-up, and the rest of an epoch where a run is resumed.
    rich's own estimate counts whole epochs within the last 30 seconds, so that it never knows a run of long epochs.

    >>> clock = iter([0.0, 30.0])
    >>> time_left = TimeLeft(epochs=10, clock=lambda: next(clock))
    >>> time_left.words(4.5), time_left.words(5.5)
    ('-:--:--', '0:02:15')
    """

    UNKNOWN = "-:--:--"

    def __init__(self, epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._epochs, self._clock = epochs, clock
        self._base: tuple[float, float] | None = None

    def words(self, done: float) -> str:
        """Return hours, minutes and seconds left after `done` epochs, of which a part counts too."""
        if self._base is None:
            self._base = done, self._clock()
        start, began = self._base
        if done <= start:
            return self.UNKNOWN
        seconds = round((self._clock() - began) / (done - start) * (self._epochs - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class RichReporter(Reporter):
    """A progress bar over the epochs, with the time left, the loss, and the accuracy of the student and the ensemble.

    Where there is no terminal, every epoch is a line.
    """

    bar: Progress | None = None

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Print the notes and start the bar."""
        set_progress_display(None)  # until now for decoding; in training there is this bar alone
        for note in notes:
            err.print(note, style="dim")
        self.epochs, self.steps = epochs, steps
        self.time_left = TimeLeft(epochs)
        column = Column(no_wrap=True, min_width=7)
        self.bar = progress_bar(err, TextColumn("{task.fields[left]}", style="progress.remaining", table_column=column))
        self.task = self.bar.add_task("epochs", total=epochs, completed=start, note="", left=TimeLeft.UNKNOWN)
        self.bar.start()

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Show the loss."""
        if self.bar is not None:
            done = epoch + step / self.steps
            left = self.time_left.words(done)
            self.bar.update(self.task, completed=done, note=f"loss {loss:.3f}", left=left)

    def epoch(self, line: EpochLine) -> None:
        """Advance, and show accuracies."""
        note = f"loss {line['train']['loss']:.3f}  {_describe_accuracies(line)}"
        done = line["epoch"] + 1
        if self.bar is not None:
            left = self.time_left.words(done)
            self.bar.update(self.task, completed=done, note=note, left=left)
            note += f"  {left} left" if done < self.epochs and left != TimeLeft.UNKNOWN else ""
        if not err.is_terminal:
            err.print(f"epoch {done}: {note}")

    def end(self, result: RunResult) -> None:
        """Stop the bar."""
        self.stop()

    def stop(self) -> None:
        """Stop the bar and show the cursor again, however the run ended."""
        if self.bar is not None:
            self.bar.stop()


def _describe_accuracies(line: EpochLine) -> str:
    """Return the newest accuracies of an epoch: of the deployed student and of the ensemble, or those in training."""
    parts = (("val", line.get("val"), line.get("val_student")), ("test", line.get("test"), line.get("test_student")))
    for part, members, student in parts:
        if members is not None and student is not None:
            several = len(members["top1"]) > 1
            ensemble = f"  ensemble {members['ensemble_top1']:.1f}" if several else ""
            return f"{part} {student['top1']:.1f}{ensemble}"
    return "train " + " ".join(f"{a:.1f}" for a in line["train"]["top1"])


def members_table(figures: Figures, deployed: str, title: str, averages: Figures | None = None) -> Table:
    """Return a table with one row per member and per average of one, and one for the ensemble; `deployed` names one."""
    table = new_table(title)
    columns = ("top-1 %", *(["top-5 %"] if "top5" in figures else []), "NLL", "calibration error")
    table.add_column("member")
    for name in columns:
        table.add_column(name, justify="right")
    kind_of_average = deployed.rpartition(" ")[0] if deployed.startswith(("EMA", "SWA")) else "mean teacher"
    for kind, part in (("member", figures), *([(kind_of_average, averages)] if averages else [])):
        for index, top1 in enumerate(part["top1"]):
            name = f"{kind} {index}"
            top5 = part["top5"][index] if "top5" in part else None
            _add_figures(table, name, deployed, top1, top5, part["nll"][index], part["ece"][index])
    if len(figures["top1"]) > 1:
        top5 = figures.get("ensemble_top5")
        nll, ece = figures["ensemble_nll"], figures["ensemble_ece"]
        _add_figures(table, "ensemble", deployed, figures["ensemble_top1"], top5, nll, ece)
    return table


def _add_figures(
    table: Table, name: str, deployed: str, top1: float, top5: float | None, nll: float, ece: float
) -> None:
    percentages = [show_figure(value, 2) for value in (top1, top5) if value is not None]
    name = on_one_line(name) + (" (deployed)" if name == deployed else "")
    table.add_row(name, *percentages, show_figure(nll, 4), show_figure(ece, 4))


def show_figure(value: float, digits: int) -> str:
    """Return a figure for a table; that of a diverged run says so."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def print_rows(rows: Rows, title: str) -> None:
    """Print dictionaries with the same keys as a table; columns that do not fit its width follow in a second one."""
    if not rows:
        out.print(f"{title}: none")
        return
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) + 3 for name in names}
    blocks: list[list[str]] = [[]]
    width = 0
    for name in names[1:]:
        width += widths[name]
        if blocks[-1] and widths[names[0]] + width + 1 > out.width:
            blocks.append([])
            width = widths[name]
        blocks[-1].append(name)
    for block in blocks:
        table = new_table(title if block is blocks[0] else None)
        table.add_column(names[0])
        for name in block:
            table.add_column(name, justify="right" if looks_numeric(rows[0][name]) else "left")
        for row in rows:
            table.add_row(*(on_one_line(row[name]) for name in (names[0], *block)))
        out.print(table)
