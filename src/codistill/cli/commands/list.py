"""`codistill list SUBJECT`: the methods, models, data sets, published tables or branch points."""

from __future__ import annotations

from collections.abc import Callable

from codistill.cli.console import print_rows
from codistill.cli.option_types import ListOptions
from codistill.cli.options import Parsed
from codistill.config import METHODS
from codistill.utils import InputError, Rows, suggest


def run(parsed: Parsed) -> int:
    """Print the table of one subject."""
    options: ListOptions = parsed.options
    subject = parsed.positionals[0]
    if subject not in _SUBJECTS:
        raise InputError(f'list: unknown subject "{subject}"{suggest(subject, _SUBJECTS)}')
    title = f"where {options.model} can fork (--branch-at)" if subject == "branch-points" else subject
    print_rows(_SUBJECTS[subject](options), title)
    return 0


def _list_methods(_options: ListOptions) -> Rows:
    return [
        {
            "method": name,
            "what it is": " ".join((config.__doc__ or "").split()),
            "topologies": ", ".join(config.topologies),
            "peers": f"{config.default_peers} ({config.min_peers} at least)",
        }
        for name, config in METHODS.items()
    ]


def _list_models(_options: ListOptions) -> Rows:
    from codistill.models import EXTERNAL_MODELS, MODELS
    from codistill.training import count_parameters

    built_in = [(name, f"{count_parameters(make()):,}", (make.__doc__ or "").strip()) for name, make in MODELS.items()]
    external = [(spelling, "-", description) for spelling, description in EXTERNAL_MODELS.items()]
    columns = ("model", "parameters at 100 classes", "what it is")
    return [dict(zip(columns, row, strict=True)) for row in (*built_in, *external)]


def _list_data(_options: ListOptions) -> Rows:
    from codistill.data import SETS

    return [{"data": name, "what it is": description} for name, description in SETS.items()]


def _list_tables(_options: ListOptions) -> Rows:
    from codistill.reproduce import TABLES, load_published_tables

    return [
        {
            "table": name,
            "data": published["data"],
            "paper": f"{published['paper'].rpartition('. ')[2]}, {published['place']}",
            "networks": ", ".join(TABLES[name].networks),
            "methods": ", ".join(TABLES[name].methods),
        }
        for name, published in load_published_tables().items()
    ]


def _list_branch_points(options: ListOptions) -> Rows:
    """Return the modules at which a network can fork, in the order in which they run.

    Raises:
        InputError: there is none.
    """
    from codistill.peers import branch_point_rows

    rows = branch_point_rows(options.model, options.image_size)
    if not rows:
        raise InputError(
            f"--model {options.model} has no module at which branches can fork, with weights before and after it; "
            "train it with --topology networks"
        )
    return rows


_SUBJECTS: dict[str, Callable[[ListOptions], Rows]] = {
    "methods": _list_methods,
    "models": _list_models,
    "data": _list_data,
    "tables": _list_tables,
    "branch-points": _list_branch_points,
}
