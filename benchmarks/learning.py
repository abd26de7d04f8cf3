"""Accuracy of every method on the digits, against independent peers of equal cost.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --out runs/learning            # about 15 minutes on 2 cores

100 labeled images (10 per class), resnet8, 4 members, 100 epochs, batch 25, lr 0.05, 3 seeds, last epoch, test set.
kd's teacher is a resnet20 trained alone on the same images, seed 0.
"""

import argparse
import sys
from pathlib import Path

from codistill.cli.compare import LEGEND
from codistill.config.config import CompareConfig, Config
from codistill.config.methods import KDConfig, method_config
from codistill.reproduce.comparison import plan_comparison
from codistill.reproduce.grid import Cell, list_failures, run_grid
from codistill.reproduce.statistics import comparison_rows
from codistill.utils.tables import markdown

SHARED = {"model": "resnet8", "data": "digits", "train_per_class": 10, "epochs": 100, "batch_size": 25, "lr": 0.05}
METHODS = ["dml", "cl_ilr", "one", "okddip", "pcl", "kdcl"]
TARGETS = ("naive", "linear", "general")  # plan_comparison() has kdcl's default, minlogit


def cells(folder: Path) -> tuple[Cell, list[Cell]]:
    """Return the teacher, and the rows of the table."""
    teacher = Cell("teacher resnet20", Config("independent", peers=1, **(SHARED | {"model": "resnet20"})))
    rows = plan_comparison(METHODS, CompareConfig("independent", peers=4, topology="both", **SHARED))
    for target in TARGETS:
        method = method_config("kdcl")
        method.target = target  # type: ignore[attr-defined]
        run = Config(method, topology="networks", peers=4, **SHARED)
        rows.append(Cell(f"kdcl {target} networks", run, "independent networks"))
    path = teacher.run_config(folder, 0).out
    rows.append(Cell("kd (teacher resnet20)", Config(KDConfig(teacher=path), peers=1, **SHARED), "one plain network"))
    return teacher, rows


def main() -> int:
    """Train the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/learning", type=Path)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--workers", default=2, type=int)
    options = parser.parse_args()
    teacher, rows = cells(options.out)
    run_grid([teacher], [0], options.out)
    run_grid(rows, range(options.seeds), options.out, options.workers)
    print(f"teacher: {teacher.results[0]['student']['top1']:.2f} %\n\n{markdown(comparison_rows(rows))}\n{LEGEND}")
    failures = list_failures(rows)
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
