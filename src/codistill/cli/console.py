"""What a person sees in the terminal while runs go on: progress and tables."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from codistill.training.reporter import Reporter
from codistill.utils.errors import on_one_line

WIDE = 160  # where nobody looks at a terminal, tables go to a file, which has no edge
# Names are other people's words: nothing in them is markup.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else WIDE)


def progress_bar(console: Console) -> Progress:
    """Return the bar that all commands use; silent where nobody looks."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal)


class RichReporter(Reporter):
    """One bar over the epochs, with what the peers reach."""

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Print the notes and start the bar."""
        for note in notes:
            err.print(note, style="dim")
        self.bar = progress_bar(err)
        self.task = self.bar.add_task("epochs", total=epochs, completed=start, note="")
        self.bar.start()

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Show the loss."""
        self.bar.update(self.task, note=f"loss {loss:.3f}")

    def epoch(self, line: dict[str, Any]) -> None:
        """Advance, and show accuracies (a plain line every tenth where there is no terminal)."""
        figures = line.get("val") or line.get("test") or line["train"]
        part = "val" if "val" in line else "test" if "test" in line else "train"
        note = f"loss {line['train']['loss']:.3f}  {part} " + " ".join(f"{a:.1f}" for a in figures["top1"])
        if "ensemble_top1" in figures and len(figures["top1"]) > 1:
            note += f"  ensemble {figures['ensemble_top1']:.1f}"
        self.bar.update(self.task, completed=line["epoch"] + 1, note=note)
        if not err.is_terminal and (line["epoch"] + 1) % 10 == 0:
            err.print(f"epoch {line['epoch'] + 1}: {note}")

    def end(self, result: dict[str, Any]) -> None:
        """Stop the bar."""
        self.bar.stop()


def members_table(figures: dict[str, Any], deployed: str, title: str, ema: dict[str, Any] | None = None) -> Table:
    """Return a table with a row a member, a mean teacher, and the ensemble; `deployed` names one of them."""
    top5 = "top5" in figures
    table = Table(title=title, title_justify="left")
    for name in ("member", "top-1 %", *(["top-5 %"] if top5 else []), "NLL", "calibration error"):
        table.add_column(name, justify="left" if name == "member" else "right")
    for kind, part in (("member", figures), *([("mean teacher", ema)] if ema else [])):
        for index, accuracy in enumerate(part["top1"]):
            name = f"{kind} {index}"
            five = [f"{part['top5'][index]:.2f}"] if top5 else []
            row = f"{accuracy:.2f}", *five, f"{part['nll'][index]:.4f}", f"{part['ece'][index]:.4f}"
            table.add_row(name + (" (deployed)" if name == deployed else ""), *row)
    if len(figures["top1"]) > 1:
        five = [f"{figures['ensemble_top5']:.2f}"] if top5 else []
        row = (
            f"{figures['ensemble_top1']:.2f}",
            *five,
            f"{figures['ensemble_nll']:.4f}",
            f"{figures['ensemble_ece']:.4f}",
        )
        table.add_row("ensemble" + (" (deployed)" if deployed == "ensemble" else ""), *row)
    return table


def print_rows(rows: list[dict[str, str]], title: str) -> None:
    """Print dictionaries of equal keys as a table; columns that do not fit beside each other go below."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) + 3 for name in names}
    blocks, room = [[]], 0
    for name in names[1:]:
        room += widths[name]
        if blocks[-1] and widths[names[0]] + room + 1 > out.width:
            blocks.append([])
            room = widths[name]
        blocks[-1].append(name)
    for block in blocks:
        table = Table(title=title if block is blocks[0] else None, title_justify="left")
        table.add_column(names[0])
        for name in block:
            numbers = rows[0][name][:1] in "0123456789+-"
            table.add_column(name, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(on_one_line(row[name]) for name in (names[0], *block)))
        out.print(table)
