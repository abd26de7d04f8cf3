"""Compute the figures that `codistill check` compares with, and write those that are missing.

    OMP_NUM_THREADS=1 python benchmarks/check_figures.py             # add the figures of new methods
    OMP_NUM_THREADS=1 python benchmarks/check_figures.py --replace   # compute all of them again

The figures are float64 on a CPU. Only a deliberate change of a method's loss is a reason to replace them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from codistill.config import METHODS
from codistill.training.self_check import FIGURES, compute_figures, read_figures

PATH = Path(__file__).resolve().parents[1] / "src" / "codistill" / "training" / FIGURES


def main() -> int:
    """Write the figures, and print what is new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replace", action="store_true", help="compute the figures again that are there already")
    replace = parser.parse_args().replace
    stored = read_figures() if PATH.exists() else {}
    written = {}
    for name, config in METHODS.items():
        for topology in config.topologies:
            key = f"{name}, {topology}"
            if replace or key not in stored:
                stored[key] = compute_figures(name, topology, torch.device("cpu"))
                print(f"computed: {key}")
            written[key] = stored[key]
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(figures)}" for key, figures in written.items())
    PATH.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
