"""The runs of `codistill compare`, and the folder they are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codistill.config import CompareConfig, Config, MethodConfig, TeacherConfig, method_config, slug
from codistill.reproduce.grid import MAX_SEEDS, Cell, list_failures, read_results
from codistill.runs import GridInfo, find_tracker, read_record, write_record
from codistill.utils import InputError, Rows, markdown_page, pick_device, write_text


def check_options(config: CompareConfig) -> None:
    """Refuse options that a comparison cannot use.

    Raises:
        InputError: see above.
    """
    if config.seeds < 1 or config.workers < 1:
        raise InputError(f"--{'seeds' if config.seeds < 1 else 'workers'} must be at least 1")
    if config.seeds > MAX_SEEDS:
        raise InputError(f"--seeds is {config.seeds}; give {MAX_SEEDS} or fewer")
    if config.mesh is not None:
        raise InputError("--mesh: compare trains every run in one process, --workers of them at a time; drop --mesh")
    if config.seed or config.resume:
        flag = "--seed" if config.seed else "--resume"
        raise InputError(f"{flag}: compare trains --seeds seeds from --first-seed on and always resumes; drop {flag}")


def comparison_folder(config: CompareConfig) -> Path:
    """Return the folder of the comparison's runs."""
    return Path(config.out or f"runs/compare-{slug(config.data)}")


def comparison_title(config: CompareConfig) -> str:
    """Return the heading of the comparison's table."""
    return f"{config.data}, {config.epochs} epochs, test set, last epoch, {config.seeds} seeds"


SAM_RHO = 0.05
"""The value of SAM's paper for CIFAR-10 and ImageNet."""
ERASING = 0.25
"""Probability of random erasing: that of DeiT's recipe; the paper has 0.5."""


def plan_comparison(methods: list[str], config: CompareConfig) -> list[Cell]:
    """Return the rows: one plain network and its `baselines`, then for each topology independent peers and the methods.

    The baseline of whatever trains one network is the plain one.

    Raises:
        InputError: a method is unknown or supports none of the topologies, or every row is as a baseline already.
    """
    shared = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.name not in ("method", "topology")
    }
    peers, asked = config.peers or 4, config.topology
    chosen = [method_config(name) for name in dict.fromkeys(methods) if name != "independent"]
    _check_methods(chosen, asked)
    plain = _row_config(shared, method_config("independent"), "networks", peers=1)
    cells = [Cell("one plain network", plain), *plan_baselines(config, plain, peers)]
    for topology in ("networks", "branches", "twins"):
        if asked is None:  # every method on the topology of its paper
            wanted = [method for method in chosen if method.topologies[0] == topology]
        else:
            wanted = [m for m in chosen if asked in (topology, "both") and topology in m.topologies]
        alone = [method for method in wanted if topology == "twins" or method.max_peers == 1]
        wanted = [method for method in wanted if method not in alone]
        for method in alone:
            row = _row_config(shared, method, topology, 2 if topology == "twins" else 1)
            cells.append(Cell(f"{method.name} {topology}", row, cells[0].label))
        if topology == "twins":
            continue
        if wanted or asked in (topology, "both") or (not chosen and topology == "networks" and asked is None):
            baseline = f"independent {topology}"
            cells.append(Cell(baseline, _row_config(shared, method_config("independent"), topology, peers)))
            cells += [Cell(f"{m.name} {topology}", _row_config(shared, m, topology, peers), baseline) for m in wanted]
    return cells


def plan_baselines(config: CompareConfig, plain: Config, peers: int) -> list[Cell]:
    """Return the rows of `--baselines`: one network each, compared with the plain one.

    Args:
        config: Names them.
        plain: The config of the plain network.
        peers: How many times the epochs `longer` trains.

    Raises:
        InputError: every row is as a baseline already.
    """
    later = None if config.milestones is None else tuple(epoch * peers for epoch in config.milestones)
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "ema": ("EMA", {"deploy": "ema"}),
        "swa": ("SWA", {"deploy": "swa"}),
        "sam": ("SAM", {"sam_rho": SAM_RHO}),
        "longer": (f"{peers} x epochs", {"epochs": config.epochs * peers, "milestones": later}),
        "randaugment": ("RandAugment", {"auto_augment": "randaugment"}),
        "trivialaugment": ("TrivialAugment", {"auto_augment": "trivialaugment"}),
        "erasing": ("random erasing", {"random_erasing": ERASING}),
    }
    cells = []
    for name in dict.fromkeys(config.baselines):
        label, options = changes[name]
        for option in options:
            given, default = getattr(config, option), getattr(Config, option)
            if name != "longer" and given != default:
                flag = f"--{option.replace('_', '-')} {given}"
                raise InputError(f"--baselines {name}: {flag} holds for every row; drop one of them")
        cells.append(Cell(f"one network, {label}", dataclasses.replace(plain, **options), "one plain network"))
    return cells


def _check_methods(methods: list[MethodConfig], topology: str | None) -> None:
    for method in methods:
        name = method.name
        if isinstance(method, TeacherConfig):
            raise InputError(
                f"compare trains peers without a teacher; train {name} by itself: train {name} --method.teacher RUN"
            )
        if topology in ("networks", "branches") and topology not in method.topologies:
            raise InputError(f"{name} works on {method.topologies[0]} only; drop --topology {topology}")


def _row_config(shared: dict, method: MethodConfig, topology: str, peers: int) -> Config:
    """Return one row's config; a single network is the first model, without branch points."""
    values = shared | {"peers": peers}
    if topology != "branches":
        values |= {"branch_at": (), "fan_out": ()}
    if peers == 1 or topology == "twins":
        values["model"] = shared["model"][:1]
        values["execution"] = "auto" if shared["execution"] == "stacked" else shared["execution"]
    return Config(method=dataclasses.replace(method), topology=topology, **values)  # type: ignore[arg-type]


def check_comparison_folder(cells: list[Cell], seeds: Sequence[int], folder: Path) -> None:
    """Refuse a folder that contains runs of another comparison under the same names.

    Raises:
        InputError: see above.
    """
    from codistill.runs import RunFolder

    for cell in cells:
        for seed in seeds:
            if (cell.run_path(folder, seed) / "config.json").exists():
                try:
                    run = RunFolder(cell.run_config(folder, seed, cells))
                    if run.begun_with is not None:
                        raise InputError(f"--epochs was {run.begun_with}")
                except InputError as error:
                    why = str(error).partition("; ")[0].removeprefix("--resume: ")
                    raise InputError(f"--out {folder} is another comparison's ({why}); name another folder") from None


def add_earlier_rows(cells: list[Cell], config: CompareConfig, folder: Path) -> list[Cell]:
    """Return the rows with those of earlier comparisons in the same folder, and with their results.

    The seeds of `config` become those from the first to the last of all comparisons.

    Raises:
        InputError: the folder holds a published table, or its grid.json is damaged.
    """
    grid_info = read_record(folder / "grid.json", GridInfo)
    if grid_info is None:
        return cells
    if grid_info["kind"] != "compare":
        raise InputError(f"--out {folder} holds {grid_info.get('table')}; name another folder")
    labels = {cell.label for cell in cells}
    earlier = [
        Cell(row["label"], Config(), row["baseline"])
        for row in grid_info.get("cells", [])
        if row["label"] not in labels
    ]
    first = grid_info.get("first_seed", 0)
    end = max(config.first_seed + config.seeds, first + grid_info.get("seeds", 1))
    config.first_seed = min(config.first_seed, first)
    config.seeds = end - config.first_seed
    read_results([*cells, *earlier], config.seed_range(), folder)
    return [*cells, *earlier]


def describe_comparison(cells: list[Cell], config: CompareConfig, folder: Path) -> list[str]:
    """Return lines about the data and the options of the runs.

    Raises:
        InputError: a config cannot be used, the data cannot be read, or a tracker, the device or weights are missing.
    """
    from codistill.models import build, resolve
    from codistill.training import load_images

    find_tracker(config.tracker)  # here and not in every worker, as all that follows
    pick_device(config.device)
    resolved = [cell.run_config(folder, 0) for cell in cells]
    data, splits = load_images(resolved[0], None, None)
    for name in dict.fromkeys(config.model):  # once here, so that no run starts with a network that cannot be built
        network = resolve(name, pretrained=config.pretrained, weights=config.weights)
        build(network, num_classes=len(data.classes), in_channels=data.channels, image_size=data.image_size)
    line = (
        f"{config.data}: {splits.describe(data)}, {len(data.classes)} classes; "
        f"augmentation: {data.describe_augmentation(**config.augmentation_options())}; "
        f"{' + '.join(config.model)}, {config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}"
    )
    return [text for text in (line, *data.provenance.messages, data.imbalance(splits.train)) if text]


def write_comparison(
    cells: list[Cell], config: CompareConfig, folder: Path, rows: Rows, summary: Sequence[str] = ()
) -> None:
    """Write the table as Markdown and JSON, and grid.json, from which a report reads the rows of the comparison."""
    title = comparison_title(config)
    labels = [{"label": cell.label, "baseline": cell.baseline} for cell in cells]
    write_record(
        folder / "grid.json",
        {"kind": "compare", "title": title, "seeds": config.seeds, "cells": labels}
        | ({"first_seed": config.first_seed, "summary": [*summary]}),
    )
    write_record(folder / "table.json", {"title": title, "rows": rows, "failures": list_failures(cells)})
    write_text(folder / "table.md", markdown_page((title, *summary), rows))
