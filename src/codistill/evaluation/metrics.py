"""Metrics of peers, accumulated on the device: accuracy, NLL, calibration, ensemble, diversity.

Only `compute` and `details` read from the device. Sums are per sample, so that the batch size does not matter.
Shapes: M rows (every member, then the ensemble), P peers, B batch, C classes, K confidence bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from codistill.losses import peer_distance
from codistill.utils.device import accumulation_dtype

NUM_BINS = 15


class PeerMetrics:
    """Sums over a data set for every member and for the ensemble of `group`.

    Args:
        num_peers: Members P.
        num_classes: Classes C.
        group: The members that form the ensemble and between which diversity is measured.
        device: The device of the sums.
        detail: Also accumulate a confusion matrix (C x C) per row; for `details`.

    >>> metrics = PeerMetrics(num_peers=1, num_classes=2, group=[0], device="cpu")
    >>> metrics.update(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([0, 0]))
    >>> metrics.compute()["top1"]
    [50.0]
    """

    def __init__(
        self,
        num_peers: int,
        num_classes: int,
        group: Sequence[int],
        device: torch.device | str,
        detail: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self._group_is_all = list(group) == list(range(num_peers))
        self.group_G = torch.tensor(list(group)).to(device)  # a list would be copied there per batch
        rows = num_peers + 1
        self.count = 0
        self.dtype = accumulation_dtype(device)
        self.correct_M = torch.zeros(rows, dtype=self.dtype, device=device)
        self.correct5_M = torch.zeros_like(self.correct_M)
        self.nll_M = torch.zeros_like(self.correct_M)
        # Per confidence bin: samples, sum of confidences, sum of hits.
        self.bins_3MK = torch.zeros(3, rows * NUM_BINS, dtype=self.dtype, device=device)
        self.pairs = torch.zeros(2, dtype=self.dtype, device=device)  # L2 distance, disagreement
        self.both_wrong_GG = torch.zeros(len(group), len(group), dtype=self.dtype, device=device)
        self.confusion = torch.zeros(rows * num_classes**2 if detail else 0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logits_PBC: Tensor, targets_B: Tensor, ensemble_log_probs_BC: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits_PBC: The logits of all members.
            targets_B: The labels.
            ensemble_log_probs_BC: Log-probabilities of the ensemble; default the log of the group's mean probabilities.
        """
        log_probs_PBC = logits_PBC.to(torch.promote_types(logits_PBC.dtype, torch.float32)).log_softmax(-1)
        if ensemble_log_probs_BC is None:
            # In log space, which stays exact where probabilities underflow.
            log_group_GBC = log_probs_PBC if self._group_is_all else log_probs_PBC[self.group_G]
            ensemble_log_probs_BC = log_group_GBC.logsumexp(0) - math.log(len(self.group_G))
        log_MBC = torch.cat((log_probs_PBC, ensemble_log_probs_BC.to(log_probs_PBC.dtype).unsqueeze(0)))
        probs_MBC = log_MBC.exp()
        group_GBC = probs_MBC[:-1] if self._group_is_all else probs_MBC[:-1][self.group_G]
        index_MB1 = targets_B.expand(probs_MBC.shape[:2]).unsqueeze(-1)
        confidence_MB, guess_MB = probs_MBC.max(-1)
        hit_MB = guess_MB == targets_B
        # Rank of the label without sorting: the number of classes with a higher score (all classes if scores are NaN).
        rank_MB = (~(log_MBC <= log_MBC.gather(-1, index_MB1))).sum(-1)
        self.count += targets_B.shape[0]
        self.correct_M += hit_MB.sum(-1)
        self.correct5_M += (rank_MB < 5).sum(-1)
        self.nll_M -= log_MBC.gather(-1, index_MB1).squeeze(-1).sum(-1, dtype=self.dtype)
        self._update_bins(confidence_MB, hit_MB)
        if len(self.confusion):
            rows_M1 = torch.arange(len(guess_MB), device=guess_MB.device).unsqueeze(1)
            index = ((rows_M1 * self.num_classes + targets_B) * self.num_classes + guess_MB).flatten()
            self.confusion.index_add_(0, index, torch.ones_like(index))
        self._update_pairs(group_GBC, hit_MB[:-1][self.group_G], guess_MB[:-1][self.group_G])

    def _update_bins(self, confidence_MB: Tensor, hit_MB: Tensor) -> None:
        rows = confidence_MB.shape[0]
        bin_MB = (confidence_MB * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        index = (bin_MB + torch.arange(rows, device=bin_MB.device).unsqueeze(1) * NUM_BINS).flatten()
        values = torch.stack((torch.ones_like(confidence_MB), confidence_MB, hit_MB.to(confidence_MB.dtype)))
        self.bins_3MK.index_add_(1, index, values.flatten(1).to(self.dtype))

    def _update_pairs(self, probs_GBC: Tensor, hit_GB: Tensor, guess_GB: Tensor) -> None:
        if len(probs_GBC) < 2:
            return
        first, second = torch.triu_indices(len(probs_GBC), len(probs_GBC), 1, device=probs_GBC.device)
        disagree = (guess_GB[first] != guess_GB[second]).to(self.dtype).mean(0).sum()
        self.pairs += torch.stack((peer_distance(probs_GBC).sum(dtype=self.dtype), disagree))
        wrong_GB = (~hit_GB).to(self.dtype)
        self.both_wrong_GG += wrong_GB @ wrong_GB.t()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of the other processes; `total` sums a tensor over all processes."""
        count = torch.tensor(self.count, dtype=self.dtype, device=self.correct_M.device)
        names = ("correct_M", "correct5_M", "nll_M", "bins_3MK", "pairs", "both_wrong_GG")
        sums = [count, *(getattr(self, name) for name in names)]
        totals = total(torch.cat([value.flatten() for value in sums])).split([value.numel() for value in sums])
        self.count = int(totals[0].item())
        for name, value in zip(names, totals[1:]):
            setattr(self, name, value.view(getattr(self, name).shape))
        if len(self.confusion):  # separately: these are integers
            self.confusion = total(self.confusion)

    def compute(self) -> dict[str, Any]:
        """Return plain numbers (this reads from the device): percentages, nats, and lists with one entry per member."""
        count = max(self.count, 1)
        samples, confidence, hits = self.bins_3MK.view(3, -1, NUM_BINS)
        ece_M = ((confidence - hits).abs().sum(-1) / samples.sum(-1).clamp_min(1)).tolist()
        top1 = (self.correct_M * 100 / count).tolist()
        top5 = (self.correct5_M * 100 / count).tolist()
        nll = (self.nll_M / count).tolist()
        distance, disagreement = (self.pairs / count).tolist()
        both_wrong, correlation = _error_overlap((self.both_wrong_GG / count).tolist())
        figures: dict[str, Any] = {
            "samples": self.count,
            "top1": top1[:-1],
            "nll": nll[:-1],
            "ece": ece_M[:-1],
            "ensemble_top1": top1[-1],
            "ensemble_nll": nll[-1],
            "ensemble_ece": ece_M[-1],
            "diversity": distance,
            "disagreement": disagreement,
            "both_wrong": both_wrong,
        }
        if correlation is not None:
            figures["error_correlation"] = correlation
        if self.num_classes > 10:  # with ten classes or fewer, top-5 is not informative
            figures |= {"top5": top5[:-1], "ensemble_top5": top5[-1]}
        return figures

    def filled_bins(self, row: int) -> list[tuple[int, int, float, float]]:
        """Return (index, samples, mean confidence, accuracy) of each confidence bin of a row that has samples."""
        sums = zip(*self.bins_3MK.view(3, -1, NUM_BINS)[:, row].tolist())
        return [(k, int(n), confidence / n, hits / n) for k, (n, confidence, hits) in enumerate(sums) if n]

    def details(self, row: int) -> dict[str, Any]:
        """Return the reliability diagram and the confusion matrix of one row (the ensemble is row -1)."""
        bins = [{"samples": n, "confidence": c, "accuracy": a} for _, n, c, a in self.filled_bins(row)]
        if not len(self.confusion):
            return {"reliability": bins}
        classes = self.num_classes
        return {"reliability": bins, "confusion": self.confusion.view(-1, classes, classes)[row].tolist()}


def _error_overlap(both_wrong_GG: list[list[float]]) -> tuple[float, float | None]:
    """Return the mean over pairs of P(both wrong) and of the correlation of errors (None if no pair has errors).

    The diagonal of `both_wrong_GG` is every member's error rate.
    """
    rates = [row[i] for i, row in enumerate(both_wrong_GG)]
    pairs = [(i, j) for i in range(len(rates)) for j in range(i)]
    if not pairs:
        return 0.0, None
    both = {(i, j): both_wrong_GG[i][j] for i, j in pairs}
    spread = [math.sqrt(rate * (1 - rate)) if 0 < rate < 1 else 0.0 for rate in rates]
    correlations = [
        (both[i, j] - rates[i] * rates[j]) / (spread[i] * spread[j]) for i, j in pairs if spread[i] and spread[j]
    ]
    return sum(both.values()) / len(pairs), sum(correlations) / len(correlations) if correlations else None
