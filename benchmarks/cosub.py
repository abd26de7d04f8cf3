"""Accuracy of co-trained submodels on few labels, against the same network trained alone.

    OMP_NUM_THREADS=1 python benchmarks/cosub.py --data digits --out runs/cosub-digits

100 labeled images (10 per class), timm's test_resnet (drop path 0.1), 60 epochs, batch 25, SGD. The learning rate of a
row is the one of its `RATES` with the best validation accuracy over seeds 0 to 2; the table has seeds 200 to 209, last
epoch, test set. cosub costs two passes of the network per step, so a row trains the plain network for twice the epochs;
`without exchange` is cosub with weight 0: two draws that learn from labels alone.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from statistics import fmean

from codistill.cli.compare import LEGEND
from codistill.config.config import Config
from codistill.config.contrib import CosubConfig
from codistill.reproduce.grid import Cell, list_failures, run_grid
from codistill.reproduce.statistics import comparison_rows
from codistill.utils.tables import markdown

EPOCHS = 60
PLAIN = "one plain network"
CE_RATES, BCE_RATES = (0.02, 0.05, 0.1, 0.2), (0.2, 0.5, 1.0, 2.0)  # BCE is a mean over the 10 classes
RATES = {
    PLAIN: CE_RATES,
    "one network, 2 x epochs": CE_RATES,
    "cosub ce": CE_RATES,
    "cosub ce, without exchange": CE_RATES,
    "cosub": BCE_RATES,
    "cosub, without exchange": BCE_RATES,
}


def row(label: str, data: str, rate: float) -> Cell:
    """Return a row of the table at a learning rate."""
    epochs = 2 * EPOCHS if "2 x" in label else EPOCHS
    shared = {
        "model": "timm:test_resnet,drop_path_rate=0.1",
        "data": data,
        "train_per_class": 10,
        "batch_size": 25,
        "epochs": epochs,
        "eval_every_epochs": epochs,
        "lr": rate,
    }
    if not label.startswith("cosub"):
        return Cell(label, Config("independent", peers=1, **shared), None if label == PLAIN else PLAIN)
    method = CosubConfig(loss="ce" if "ce" in label.split(",")[0] else "bce", weight=0.0 if "without" in label else 1.0)
    return Cell(label, Config(method, topology="twins", peers=2, **shared), PLAIN)


def choose_rate(label: str, data: str, folder: Path, workers: int) -> float:
    """Return the learning rate with the best mean validation accuracy over three seeds."""
    scores = {}
    for rate in RATES[label]:
        cell = row(label, data, rate)
        run_grid([dataclasses.replace(cell, baseline=None)], range(3), folder / f"{rate:g}", workers)
        scores[rate] = fmean(result["best_validation"]["top1"] for result in cell.results.values())
    print(label, {rate: round(score, 2) for rate, score in scores.items()}, file=sys.stderr, flush=True)
    return max(scores, key=lambda rate: scores[rate])


def main() -> int:
    """Choose the rates, train the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--out", default="runs/cosub", type=Path)
    parser.add_argument("--workers", default=1, type=int)
    options = parser.parse_args()
    rates = {label: choose_rate(label, options.data, options.out / "rates", options.workers) for label in RATES}
    cells = [row(label, options.data, rate) for label, rate in rates.items()]
    run_grid(cells, range(200, 210), options.out / "table", options.workers)
    rows = [{"lr": f"{rate:g}", **found} for rate, found in zip(rates.values(), comparison_rows(cells))]
    print(f"{markdown(rows)}\n{LEGEND}")
    failures = list_failures(cells)
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
