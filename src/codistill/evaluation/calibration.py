"""What the deployed student gets right, class by class, and how far its confidence can be trusted.

Shapes: N samples, C classes, K bins of confidence.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codistill.evaluation.metrics import NUM_BINS
from codistill.utils.files import write_atomically


def confusion_matrix(guesses_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Return counts `C x C`: rows are the true classes, columns what was said.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels_N * num_classes + guesses_N, minlength=num_classes**2).view(num_classes, num_classes)


def class_rows(confusion_CC: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return every class with its images, its recall and precision in percent, and what it is taken for most often."""
    rows = []
    for c, name in enumerate(classes):
        own, said, right = int(confusion_CC[c].sum()), int(confusion_CC[:, c].sum()), int(confusion_CC[c, c])
        wrong_C = confusion_CC[c].clone()
        wrong_C[c] = 0
        worst = int(wrong_C.argmax())
        rows.append(
            {
                "class": name,
                "images": own,
                "recall": 100 * right / own if own else None,
                "precision": 100 * right / said if said else None,
                "most often taken for": classes[worst] if wrong_C[worst] else None,
                "times": int(wrong_C[worst]),
            }
        )
    return rows


def nll(scores_NC: Tensor, labels_N: Tensor, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood of softmax(scores / T)."""
    log_probs_NC = (scores_NC / temperature).log_softmax(-1)
    return float(-log_probs_NC.gather(-1, labels_N.unsqueeze(-1)).mean())


def fit_temperature(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Return the T in [0.05, 20] that minimises the negative log-likelihood (Guo et al., ICML 2017)."""
    from scipy.optimize import minimize_scalar

    bounds = (math.log(0.05), math.log(20.0))
    found = minimize_scalar(lambda log_t: nll(scores_NC, labels_N, math.exp(log_t)), bounds=bounds, method="bounded")
    return math.exp(float(found.x))


def calibration(scores_NC: Tensor, labels_N: Tensor, temperature: float = 1.0) -> dict[str, Any]:
    """Return the expected calibration error, the likelihood, and the bins of a reliability diagram."""
    confidence_N, guess_N = (scores_NC / temperature).softmax(-1).max(-1)
    hits_N = (guess_N == labels_N).double()
    bin_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    bins = []
    for k in range(NUM_BINS):
        inside = bin_N == k
        count = int(inside.sum())
        if count:
            confidence, accuracy = float(confidence_N[inside].mean()), float(hits_N[inside].mean())
            bins.append({"from": k / NUM_BINS, "images": count, "confidence": confidence, "accuracy": accuracy})
    error = sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(labels_N)
    return {"temperature": temperature, "ece": error, "nll": nll(scores_NC, labels_N, temperature), "bins": bins}


def write_confusion(path: Path, confusion_CC: Tensor, classes: Sequence[str]) -> None:
    """Write the counts as CSV: a row a true class, a column a guess."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["true \\ said", *classes])
    writer.writerows([name, *row.tolist()] for name, row in zip(classes, confusion_CC))
    write_atomically(path, lambda file: file.write(stream.getvalue().encode()))
