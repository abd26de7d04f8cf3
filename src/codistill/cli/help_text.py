"""The help of `train` and `compare`: options in sections, the most used ones with --help, all with --help-all."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap

from codistill.config import CompareConfig, Config

SECTIONS = {
    "network": "NetworkOptions",
    "data": "DataOptions",
    "peers": "PeerOptions",
    "optimization": "OptimOptions",
    "processes": "MeshOptions",
    "run": "RunOptions",
}
MAIN = frozenset(
    {
        *(
            "model",
            "pretrained",
            "data",
            "data_dir",
            "image_size",
            "topology",
            "peers",
            "deploy",
            "epochs",
            "batch_size",
        ),
        *("lr", "optimizer", "schedule", "seed", "dtype", "device", "out", "resume", "seeds", "workers"),
    }
)
"""The options that --help shows, beside the method's own."""
_RECIPE = (
    "auto: choose epochs, batch size, lr, schedule and weight decay by the number of images, but not what is given; "
    "paper: 300 epochs at 0.1. Default auto for folder: and npz:, unless --epochs or --lr is given."
)
_TRAIN_ONLY = {
    "--config": "A config file (TOML or JSON) or a run folder to take options from; those given here replace its own.",
    "--seeds": "Train seeds 0 to N - 1, in OUT/seed0, OUT/seed1, ...",
    "--dry-run": "Say what would run, with the time and memory of two measured steps, and write nothing.",
}


def format_help(config: Config, usage: str, *, complete: bool) -> str:
    """Return the help text.

    Args:
        config: The options with their defaults, and the method's.
        usage: The command with its positional arguments.
        complete: Show all options instead of the most used.
    """
    comparison = isinstance(config, CompareConfig)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    lines = [f"usage: {usage} [OPTIONS]", ""]
    summary = (CompareConfig if comparison else type(config.method)).__doc__ or ""
    lines += [*textwrap.wrap(" ".join(summary.split()), 100), ""]
    module = importlib.import_module("codistill.config.options")
    docs = {title: read_docstrings(getattr(module, name)) for title, name in SECTIONS.items()}
    if comparison:
        docs["run"] |= read_docstrings(CompareConfig)
        docs["peers"]["topology"] = docs["run"].pop("topology")
    for title, section in docs.items():
        shown = [name for name in section if name in fields and (complete or name in MAIN)]
        rows = [(_flag(name), fields[name], section[name]) for name in shown]
        if title == "optimization":
            rows = [("--recipe", None, _RECIPE), *rows]
        if title == "run" and not comparison:
            rows += [(flag, None, text) for flag, text in _TRAIN_ONLY.items()]
        lines += _format_section(title, rows) if rows else []
    if not comparison:
        own = {
            name: text for base in reversed(type(config.method).__mro__) for name, text in read_docstrings(base).items()
        }
        options = [field.name for field in dataclasses.fields(config.method)]
        rows = [(_flag(f"method.{n}"), getattr(config.method, n), own.get(n, "")) for n in options]
        lines += _format_section(f"method {config.method.name}", rows) if rows else []
    if not complete:
        lines.append("These are the most used options; --help-all lists all of them.")
    return "\n".join(lines)


def read_docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields that a class itself defines, empty where its source is not at hand."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):
        return {}
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, after in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _format_section(title: str, rows: list[tuple[str, object, str]]) -> list[str]:
    """Return a section's lines: flag, text, default."""
    lines = [f"{title}:"]
    for flag, default, text in rows:
        values = default if isinstance(default, tuple) else (default,)
        shown = " ".join(map(str, values)) if default is not None else ""
        if isinstance(default, bool):
            shown = f"on; {flag.replace('--', '--no-', 1)} turns it off" if default else ""
        wrapped = textwrap.wrap(text + (f" [{shown}]" if shown else ""), 74) or [""]
        lines.append(f"  {flag:30} {wrapped[0]}" if len(flag) <= 30 else f"  {flag}\n{'':33}{wrapped[0]}")
        lines += [f"{'':33}{line}" for line in wrapped[1:]]
    return [*lines, ""]
