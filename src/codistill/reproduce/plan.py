"""The runs that reproduce a published table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.config import ReproduceConfig as Options
from codistill.reproduce.grid import MAX_SEEDS, Cell
from codistill.reproduce.published_tables import published_table
from codistill.reproduce.recipes import TABLES
from codistill.reproduce.recipes.table_recipe import IMAGENET, SCALES, CellRef, TableRecipe, scale_config
from codistill.utils import InputError


@dataclass
class TableCell(Cell):
    """A run of a published table."""

    network: str = ""
    method: str = ""
    cell_refs: tuple[CellRef, ...] = ()
    """The figures of the published table that this run yields."""


@dataclass
class Plan:
    """A published table to reproduce: its published numbers, its recipe and its runs."""

    name: str
    published: dict[str, Any]
    recipe: TableRecipe
    cells: list[TableCell]
    options: Options

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return Path(self.options.out or f"runs/{self.name}-{self.options.scale}-{self.options.protocol}")

    def title(self) -> str:
        """Return the table's heading: its source, and the scale, protocol and seeds of the runs."""
        o = self.options
        source = f"{self.name}: {self.published['paper'].split(':')[0]}, {self.published['place']}"
        return f"{source}, {self.published['data']}; {SCALES[o.scale]}; protocol {o.protocol}; seeds 0 to {o.seeds - 1}"

    def describe(self) -> list[str]:
        """Return lines about what is going to be trained."""
        lines, o = [self.title()], self.options
        extra = [cell.label for cell in self.cells if cell.method not in self.recipe.methods]
        if extra:
            lines.append(f"in addition to the paper's rows: {', '.join(extra)}")
        if o.scale == "smoke" and not o.network and len(self.recipe.networks) > 1:
            lines.append(f"one network only ({self.cells[0].network}): at smoke scale all are resnet8")
        return lines


def make_plan(table: str, options: Options) -> Plan:
    """Return the runs that the options select, with the baselines of equal cost and the teachers they need.

    Raises:
        InputError: the table, a network or a method does not exist, or --data-dir is missing.
    """
    published = published_table(table)
    recipe = TABLES[table]
    if not 1 <= options.seeds <= MAX_SEEDS:
        raise InputError(f"--seeds is {options.seeds}; give 1 or more, and at most {MAX_SEEDS}")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers is {options.workers}; give 1 or more")
    networks = options.network
    if not networks and options.scale == "smoke":
        networks = recipe.networks[:1]  # all of them would be the same small network
    pairs = recipe.select_cells(networks, options.method, table)
    wanted: dict[tuple[str, str], None] = {}
    for network, method in pairs:
        others = [recipe.teachers.get(method), recipe.equal_cost.get(method) if options.baselines else None]
        for name in (*others, method):
            if name is not None:
                wanted[network, name] = None
    order = [*recipe.methods, *recipe.equal_cost.values(), *recipe.teachers.values()]
    cells = [
        _make_cell(recipe, network, method, options)
        for network, method in sorted(wanted, key=lambda p: (recipe.networks.index(p[0]), order.index(p[1])))
    ]
    return Plan(table, published, recipe, cells, options)


def _make_cell(recipe: TableRecipe, network: str, method: str, options: Options) -> TableCell:
    """Return the cell of a network and a method, with the user's options in its config."""
    prefix = f"{network}: " if len(recipe.networks) > 1 else ""
    config = scale_config(recipe.config(network, method), options.scale)
    config = dataclasses.replace(
        config, protocol=options.protocol, data_dir=options.data_dir, device=options.device, dtype=options.dtype
    )
    if config.data == IMAGENET:
        if options.data_dir is None:
            raise InputError("--data-dir is needed: name the folder of ImageNet, which contains train and val")
        config = dataclasses.replace(config, data=f"folder:{options.data_dir}", data_dir=None)
    baseline, teacher = recipe.equal_cost.get(method), recipe.teachers.get(method)
    return TableCell(
        prefix + method,
        config,
        prefix + baseline if baseline else None,
        prefix + teacher if teacher else None,
        network=network,
        method=method,
        cell_refs=recipe.cell_refs(network, method),
    )
