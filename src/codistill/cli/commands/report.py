"""`codistill report RUN ...`: one self-contained page about runs, grids and tables."""

from __future__ import annotations

from pathlib import Path

from codistill.cli.console import out
from codistill.cli.option_types import ReportOptions
from codistill.cli.options import Parsed
from codistill.reproduce import write_report


def run(parsed: Parsed) -> int:
    """Write the page, and print what it shows."""
    options: ReportOptions = parsed.options
    summary = write_report(
        [Path(name) for name in parsed.positionals], Path(options.out), options.title, options.contact_sheets
    )
    out.print(f"wrote {options.out}: {summary}")
    return 0
