"""Accuracy per class and confidence calibration of one network.

Shapes: N samples, C classes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from codistill.evaluation.metrics import NUM_BINS, PeerMetrics
from codistill.utils import escape_csv, write_text


def confusion_matrix(scores_NC: Tensor, labels_N: Tensor) -> list[list[int]]:
    """Return counts `C x C`: a row per true class, a column per prediction.

    >>> import torch
    >>> confusion_matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    [[1, 1], [0, 1]]
    """
    return _accumulate(scores_NC, labels_N, detail=True).details(0)["confusion"]


def _accumulate(scores_NC: Tensor, labels_N: Tensor, detail: bool = False) -> PeerMetrics:
    metrics = PeerMetrics(1, scores_NC.shape[1], [0], scores_NC.device, detail)
    for scores_BC, labels_B in zip(scores_NC.split(4096), labels_N.split(4096)):  # bounds the memory
        metrics.update(scores_BC.unsqueeze(0), labels_B)
    return metrics


def class_rows(confusion: list[list[int]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return for every class its images, its recall and precision in percent, and its most frequent wrong prediction.

    Args:
        confusion: Counts as `confusion_matrix` returns them.
        classes: The names of the classes.
    """
    rows = []
    for c, name in enumerate(classes):
        images, predicted, correct = sum(confusion[c]), sum(row[c] for row in confusion), confusion[c][c]
        wrong = [0 if k == c else count for k, count in enumerate(confusion[c])]
        times = max(wrong)
        rows.append(
            {
                "class": name,
                "images": images,
                "recall": 100 * correct / images if images else None,
                "precision": 100 * correct / predicted if predicted else None,
                "most often taken for": classes[wrong.index(times)] if times else None,
                "times": times,
            }
        )
    return rows


def fit_temperature(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Return the T in [0.05, 20] that minimizes the negative log-likelihood (Guo et al., ICML 2017)."""
    from scipy.optimize import minimize_scalar

    def nll(log_temperature: float) -> float:
        return calibration_figures(scores_NC, labels_N, math.exp(log_temperature))["nll"]

    found = minimize_scalar(nll, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
    return math.exp(float(found.x))


def calibration_figures(scores_NC: Tensor, labels_N: Tensor, temperature: float = 1.0) -> dict[str, Any]:
    """Return the expected calibration error, the NLL, and the bins of a reliability diagram of softmax(scores / T)."""
    metrics = _accumulate(scores_NC / temperature, labels_N)
    figures = metrics.compute()
    bins = [
        {"from": k / NUM_BINS, "images": images, "confidence": confidence, "accuracy": accuracy}
        for k, images, confidence, accuracy in metrics.filled_bins(0)
    ]
    return {"temperature": temperature, "ece": figures["ece"][0], "nll": figures["nll"][0], "bins": bins}


def write_confusion(path: Path, confusion: list[list[int]], classes: Sequence[str]) -> None:
    """Write the counts as CSV: a row per true class, a column per prediction."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(escape_csv, ["true \\ predicted", *classes]))
    writer.writerows(map(escape_csv, [name, *row]) for name, row in zip(classes, confusion))
    write_text(path, stream.getvalue())
