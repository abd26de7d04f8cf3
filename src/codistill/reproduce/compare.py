"""`codistill compare` and `make demo`: methods side by side with baselines of equal cost."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from codistill.config import METHODS, CompareConfig, Config, InputError, MachineError, method_config
from codistill.console import err, out, print_rows, progress_bar
from codistill.reproduce.formats import markdown
from codistill.reproduce.grid import Cell, run_grid
from codistill.reproduce.table import table_rows
from codistill.run import write_atomically, write_json

LEGEND = (
    "top-1: the member deployed, mean ± deviation; vs equal cost: paired over seeds, ± 95 % t-interval, n.s. = no "
    "significant difference; ECE: expected calibration error, 15 bins; diversity: mean L2 distance of softmaxes."
)


def plan(methods: list[str], config: CompareConfig) -> list[Cell]:
    """Return the rows: one plain network, then for each topology independent peers and the methods asked for.

    Raises:
        InputError: a method is unknown or fits none of the topologies.
    """
    shared = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.name not in ("method", "topology")
    }
    cells = [Cell("one plain network", _run(shared, "independent", "networks", peers=1))]
    names = [method_config(name).name for name in dict.fromkeys(methods) if name != "independent"]
    if "kd" in names:
        raise InputError("compare trains peers without a teacher; train kd by itself: train kd --method.teacher RUN")
    asked = config.topology
    for name in names:
        if asked in ("networks", "branches") and asked not in METHODS[name].topologies:
            raise InputError(f"{name} works on {METHODS[name].topologies[0]} only; drop --topology {asked}")
    for topology in ("networks", "branches"):
        if asked is None:  # every method where its paper has it
            wanted = [name for name in names if METHODS[name].topologies[0] == topology]
        else:
            wanted = [name for name in names if asked in (topology, "both") and topology in METHODS[name].topologies]
        if wanted or asked in (topology, "both") or (not names and topology == "networks" and asked is None):
            baseline = f"independent {topology}"
            cells.append(Cell(baseline, _run(shared, "independent", topology, config.peers or 4)))
            rows = [(name, _run(shared, name, topology, config.peers or 4)) for name in wanted]
            cells += [Cell(f"{name} {topology}", run, baseline) for name, run in rows]
    return cells


def _run(shared: dict, method: str, topology: str, peers: int) -> Config:
    """Return one row's config; a single network takes the first model and no fork."""
    values = shared | {"peers": peers}
    if topology == "networks":
        values |= {"branch_at": (), "fan_out": ()}
    if peers == 1:
        values["model"] = shared["model"][:1]
    return Config(method=method_config(method), topology=topology, **values)  # type: ignore[arg-type]


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


def _check_folder(cells: list[Cell], seeds: int, folder: Path) -> None:
    """Refuse a folder that holds other runs under these names, before its table is lost."""
    from codistill.run import RunFolder

    for cell in cells:
        for seed in range(seeds):
            if (cell.place(folder, seed) / "config.json").exists():
                try:
                    RunFolder(cell.run_config(folder, seed, cells))
                except InputError as error:
                    why = str(error).partition("; ")[0].removeprefix("--resume: ")
                    raise InputError(f"--out {folder} is another comparison's ({why}); name another folder") from None


def describe(cells: list[Cell], config: CompareConfig, folder: Path) -> None:
    """Say what is going to be trained on what, and fail here where the data or a model cannot be had."""
    from codistill.feeding import load_images

    resolved = [cell.run_config(folder, 0) for cell in cells]
    data, splits = load_images(resolved[0], None, None)
    note = (
        f"{config.data}: {splits.describe(data)}, {len(data.classes)} classes; "
        f"augmentation: {data.describe_augmentation(config.augment, config.cutout)}; "
        f"{' + '.join(config.model)}, {config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}"
    )
    for line in (note, *data.notes, data.imbalance(splits.train)):
        if line:
            err.print(line, style="dim")
