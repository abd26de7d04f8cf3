"""`codistill check`: whether this machine computes what it should."""

from __future__ import annotations

import time

from codistill.cli.console import out, print_rows
from codistill.cli.option_types import CheckOptions
from codistill.cli.options import Parsed
from codistill.training import check_machine


def run(parsed: Parsed) -> int:
    """Print a row per check; return 1 if one of them failed."""
    options: CheckOptions = parsed.options
    start = time.perf_counter()
    rows = [*check_machine(options.device)]
    table = [{"check": row.what, "result": "ok" if row.passed else "FAILED", "found": row.outcome} for row in rows]
    print_rows(table, "losses and gradients against stored figures, and a run of two steps")
    failed = [row.what for row in rows if not row.passed]
    seconds = time.perf_counter() - start
    out.print(
        f"{len(failed)} of {len(rows)} checks failed: {'; '.join(failed)}"
        if failed
        else f"all {len(rows)} checks passed in {seconds:.0f} s"
    )
    return 1 if failed else 0
