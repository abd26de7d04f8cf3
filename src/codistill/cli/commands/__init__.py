"""One module per command, each with `run(parsed)`, which returns the exit code."""

from __future__ import annotations

import importlib

from codistill.cli.options import Parsed


def run_command(name: str, parsed: Parsed) -> int:
    """Import a command's module and run it; only then is torch imported."""
    if name == "compare":
        from codistill.cli.compare import compare
        from codistill.cli.recipe import options_with_recipe

        return compare(parsed.positionals, options_with_recipe(parsed))
    if name == "reproduce":
        from codistill.cli.reproduce import reproduce

        return reproduce(parsed.positionals[0], parsed.options)
    code: int = importlib.import_module(f"codistill.cli.commands.{name}").run(parsed)
    return code
