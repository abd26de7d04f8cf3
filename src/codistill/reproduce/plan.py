"""From a published table to the runs that make it anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.config.config import ReproduceConfig as Options
from codistill.reproduce.grid import Cell
from codistill.reproduce.published_tables import published_table
from codistill.reproduce.recipes import TABLES
from codistill.reproduce.recipes.table_recipe import IMAGENET, SCALES, CellRef, TableRecipe, scaled
from codistill.utils.errors import InputError


@dataclass
class TableCell(Cell):
    """A run of a published table."""

    network: str = ""
    method: str = ""
    places: tuple[CellRef, ...] = ()


@dataclass
class Plan:
    """A table to be made: its published numbers, its recipe and its runs."""

    name: str
    published: dict[str, Any]
    recipe: TableRecipe
    cells: list[TableCell]
    options: Options

    @property
    def folder(self) -> Path:
        """Where the runs lie."""
        return Path(self.options.out or f"runs/{self.name}-{self.options.scale}-{self.options.protocol}")

    def title(self) -> str:
        """Say which table this is and how it was made."""
        o = self.options
        place = f"{self.name}: {self.published['paper'].split(':')[0]}, {self.published['place']}"
        return f"{place}, {self.published['data']}; {SCALES[o.scale]}; protocol {o.protocol}; seeds 0 to {o.seeds - 1}"


def make_plan(table: str, options: Options) -> Plan:
    """Return the runs that the options ask for, with the baselines of equal cost and the teachers they need.

    Raises:
        InputError: the table, a network or a method does not exist, or the images' folder is not named.
    """
    published = published_table(table)
    recipe = TABLES[table]
    if options.seeds < 1:
        raise InputError(f"--seeds is {options.seeds}; give 1 or more")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers is {options.workers}; give 1 or more")
    networks = options.network
    if not networks and options.scale == "smoke":
        networks = recipe.networks[:1]  # all of them would be the same small network
    pairs = recipe.pick(networks, options.method, table)
    wanted: dict[tuple[str, str], None] = {}
    for network, method in pairs:
        needed = [recipe.teachers.get(method), recipe.equal_cost.get(method) if options.baselines else None]
        for name in (*needed, method):
            if name is not None:
                wanted[network, name] = None
    order = [*recipe.methods, *recipe.equal_cost.values(), *recipe.teachers.values()]
    several = len(recipe.networks) > 1
    cells = [
        _cell(recipe, network, method, options, several)
        for network, method in sorted(wanted, key=lambda p: (recipe.networks.index(p[0]), order.index(p[1])))
    ]
    return Plan(table, published, recipe, cells, options)


def _cell(recipe: TableRecipe, network: str, method: str, options: Options, several: bool) -> TableCell:
    label = (lambda name: f"{network}: {name}") if several else (lambda name: name)
    config = scaled(recipe.config(network, method), options.scale)
    config = dataclasses.replace(
        config, protocol=options.protocol, data_dir=options.data_dir, device=options.device, dtype=options.dtype
    )
    if config.data == IMAGENET:
        if options.data_dir is None:
            raise InputError("--data-dir is needed: name the folder of ImageNet, which holds train and val")
        config = dataclasses.replace(config, data=f"folder:{options.data_dir}", data_dir=None)
    baseline, teacher = recipe.equal_cost.get(method), recipe.teachers.get(method)
    return TableCell(
        label(method),
        config,
        label(baseline) if baseline else None,
        label(teacher) if teacher else None,
        network=network,
        method=method,
        places=recipe.places(network, method),
    )
