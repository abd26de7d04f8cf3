"""The rows of a comparison, and their folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from codistill.config.config import CompareConfig, Config
from codistill.config.methods import METHODS, TeacherConfig, method_config
from codistill.reproduce.grid import Cell
from codistill.utils.errors import InputError


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
    for name in names:
        if issubclass(METHODS[name], TeacherConfig):
            raise InputError(
                f"compare trains peers without a teacher; train {name} by itself: train {name} --method.teacher RUN"
            )
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


def _check_folder(cells: list[Cell], seeds: int, folder: Path) -> None:
    """Refuse a folder that holds other runs under these names, before its table is lost."""
    from codistill.runs.run_folder import RunFolder

    for cell in cells:
        for seed in range(seeds):
            if (cell.place(folder, seed) / "config.json").exists():
                try:
                    RunFolder(cell.run_config(folder, seed, cells))
                except InputError as error:
                    why = str(error).partition("; ")[0].removeprefix("--resume: ")
                    raise InputError(f"--out {folder} is another comparison's ({why}); name another folder") from None
