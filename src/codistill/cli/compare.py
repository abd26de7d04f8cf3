"""`codistill compare` and `make demo`: methods side by side with baselines of equal cost."""

from __future__ import annotations

import time
from pathlib import Path

from codistill.cli.console import err, out, print_rows, progress_bar
from codistill.config.config import CompareConfig
from codistill.reproduce.comparison import _check_folder, plan
from codistill.reproduce.grid import Cell, run_grid
from codistill.reproduce.statistics import table_rows
from codistill.utils.errors import InputError, MachineError
from codistill.utils.files import write_atomically, write_json
from codistill.utils.tables import markdown

LEGEND = (
    "top-1: the member deployed, mean ± deviation; vs equal cost: paired over seeds, ± 95 % t-interval, n.s. = no "
    "significant difference; ECE: expected calibration error, 15 bins; diversity: mean L2 distance of softmaxes."
)


def compare(methods: list[str], config: CompareConfig) -> int:
    """Train every row and seed, print the table, and keep it as Markdown and JSON in the grid's folder."""
    if config.seeds < 1 or config.workers < 1:
        raise InputError(f"--{'seeds' if config.seeds < 1 else 'workers'} must be at least 1")
    if config.mesh is not None:
        raise InputError("--mesh: compare trains every run in one process, --workers of them at a time; drop --mesh")
    if config.seed or config.resume:
        flag = "--seed" if config.seed else "--resume"
        raise InputError(f"{flag}: compare trains seeds 0 .. --seeds - 1 and goes on by itself; drop it")
    folder = Path(config.out or f"runs/compare-{config.data.replace(':', '-').replace('/', '_')}")
    cells = plan(methods, config)
    _check_folder(cells, config.seeds, folder)
    began = time.perf_counter()
    describe(cells, config, folder)
    with progress_bar(err) as bar:
        task = bar.add_task(f"{len(cells)} rows x {config.seeds} seeds, epochs", total=None, note="")
        run_grid(
            cells,
            config.seeds,
            folder,
            config.workers,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    rows = table_rows(cells)
    title = f"{config.data}, {config.epochs} epochs, test set, last epoch, {config.seeds} seeds"
    print_rows(rows, title)
    out.print(LEGEND)
    out.print(f"{time.perf_counter() - began:.0f} s in all; runs and table in {folder}")
    labels = [{"label": cell.label, "baseline": cell.baseline} for cell in cells]
    write_json(folder / "grid.json", {"kind": "compare", "title": title, "seeds": config.seeds, "cells": labels})
    failures = [f"{cell.label}, seed {seed}: {reason}" for cell in cells for seed, reason in cell.failures.items()]
    write_json(folder / "table.json", {"title": title, "rows": rows, "failures": failures})
    text = f"{title}\n\n{markdown(rows)}"
    write_atomically(folder / "table.md", lambda stream: stream.write(text.encode()))
    if failures:
        raise MachineError("some runs failed: " + "; ".join(failures))
    return 0


def describe(cells: list[Cell], config: CompareConfig, folder: Path) -> None:
    """Say what is going to be trained on what, and fail here where the data or a model cannot be had."""
    from codistill.training.loaders import load_images

    resolved = [cell.run_config(folder, 0) for cell in cells]
    data, splits = load_images(resolved[0], None, None)
    note = (
        f"{config.data}: {splits.describe(data)}, {len(data.classes)} classes; "
        f"augmentation: {data.describe_augmentation(augment=config.augment, cutout=config.cutout)}; "
        f"{' + '.join(config.model)}, {config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}"
    )
    for line in (note, *data.provenance.messages, data.imbalance(splits.train)):
        if line:
            err.print(line, style="dim")
