"""PeerMetrics against plain Python loops over samples, members and pairs."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from codistill.evaluation.metrics import PeerMetrics

BINS = 15


def slow_probabilities(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def slow_row(probs, targets):
    """Return (top1, top5, nll, ece, guesses) of one predictor: probs[n][c]."""
    hits = hits5 = 0
    nll = 0.0
    bins = [[] for _ in range(BINS)]
    guesses = []
    for row, target in zip(probs, targets):
        by_score = sorted(range(len(row)), key=lambda c: -row[c])
        guess = by_score[0]
        guesses.append(guess)
        hits += guess == target
        hits5 += target in by_score[:5]
        nll -= math.log(row[target])
        for k in range(BINS):
            if k / BINS <= row[guess] and (row[guess] < (k + 1) / BINS or k == BINS - 1):
                bins[k].append((row[guess], guess == target))
                break
    count = len(targets)
    ece = 0.0
    for members in bins:
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            accuracy = sum(h for _, h in members) / len(members)
            ece += len(members) / count * abs(confidence - accuracy)
    return 100 * hits / count, 100 * hits5 / count, nll / count, ece, guesses


def slow_figures(logits_PNC, targets, group):
    probs = [[slow_probabilities(row) for row in member] for member in logits_PNC.tolist()]
    targets, count = targets.tolist(), len(targets)
    ensemble = [
        [sum(probs[p][n][c] for p in group) / len(group) for c in range(len(probs[0][n]))] for n in range(count)
    ]
    rows = [slow_row(member, targets) for member in probs]
    whole = slow_row(ensemble, targets)
    pairs = list(combinations(group, 2))
    distance = disagreement = both_wrong = 0.0
    for n in range(count):
        for p, q in pairs:
            squares = sum((a - b) ** 2 for a, b in zip(probs[p][n], probs[q][n]))
            distance += math.sqrt(squares) / len(pairs) / count
            disagreement += (rows[p][4][n] != rows[q][4][n]) / len(pairs) / count
            both_wrong += (rows[p][4][n] != targets[n] and rows[q][4][n] != targets[n]) / len(pairs) / count
    figures = {"samples": count, "diversity": distance, "disagreement": disagreement, "both_wrong": both_wrong}
    wrong = [[float(guess != target) for guess, target in zip(row[4], targets)] for row in rows]
    spread = [p for p in group if 0 < sum(wrong[p]) < count]
    correlated = [np.corrcoef(wrong[p], wrong[q])[0, 1] for p, q in pairs if p in spread and q in spread]
    if correlated:
        figures["error_correlation"] = float(np.mean(correlated))
    for place, name in enumerate(("top1", "top5", "nll", "ece")):
        figures[name] = [row[place] for row in rows]
        figures[f"ensemble_{name}"] = whole[place]
    return figures


def measure(logits_PNC, targets, group, batch_size):
    metrics = PeerMetrics(logits_PNC.shape[0], logits_PNC.shape[2], group, "cpu")
    for logits_PBC, targets_B in zip(logits_PNC.split(batch_size, 1), targets.split(batch_size)):
        metrics.update(logits_PBC, targets_B)
    return metrics.compute()


def some_logits(num_peers, num_classes, count=61, dtype=torch.float64):
    """Return logits that are often right and agree in part, so that no figure is 0 or 100."""
    rng = torch.Generator().manual_seed(num_peers * 100 + num_classes)
    targets = torch.randint(num_classes, (count,), generator=rng)
    common = torch.randn(count, num_classes, generator=rng, dtype=dtype)
    own = torch.randn(num_peers, count, num_classes, generator=rng, dtype=dtype)
    truth = torch.nn.functional.one_hot(targets, num_classes).to(dtype)
    return common + own + 2.0 * truth, targets


GROUPS = [(1, (0,)), (2, (0, 1)), (2, (1,)), (4, (0, 1, 2, 3)), (4, (1, 2, 3)), (4, (3, 0)), (4, (2,))]


@pytest.mark.parametrize(("num_peers", "group"), GROUPS)
@pytest.mark.parametrize("num_classes", [3, 17])
def test_metrics_equal_loops_over_samples_members_and_pairs(num_peers, group, num_classes):
    logits, targets = some_logits(num_peers, num_classes)
    expected = slow_figures(logits, targets, group)
    figures = measure(logits, targets, group, batch_size=13)
    if num_classes <= 10:
        assert "top5" not in figures
        assert "ensemble_top5" not in figures
        del expected["top5"], expected["ensemble_top5"]
    assert set(figures) == set(expected)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_the_examples_are_hard_enough_to_tell_figures_apart():
    logits, targets = some_logits(4, 17)
    figures = measure(logits, targets, (1, 2, 3), batch_size=61)
    assert 20 < figures["ensemble_top1"] < 95
    assert all(top1 < top5 < 100 for top1, top5 in zip(figures["top1"], figures["top5"]))
    assert 0.05 < figures["disagreement"] < 0.95
    assert 0.01 < figures["both_wrong"] < 0.9
    assert len(set(figures["nll"])) == 4


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_the_batch_size_changes_nothing(batch_size):
    logits, targets = some_logits(4, 17)
    at_once = measure(logits, targets, (1, 2, 3), batch_size=61)
    in_parts = measure(logits, targets, (1, 2, 3), batch_size)
    for name in ("samples", "top1", "top5", "ensemble_top1", "ensemble_top5"):
        assert in_parts[name] == at_once[name], name
    for name, value in at_once.items():
        assert in_parts[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_float32_logits_are_summed_in_double_precision():
    # Probabilities are exactly one-hot, so that every distance is the same float32 number, sqrt(2).
    count = 1001
    logits = torch.zeros(2, count, 3)
    logits[0, :, 0] = logits[1, :, 1] = 500.0
    targets = torch.zeros(count, dtype=torch.int64)
    distance = float(torch.tensor(2.0).sqrt())
    for batch_size in (1, 10, count):
        figures = measure(logits, targets, (0, 1), batch_size)
        assert figures["diversity"] == pytest.approx(distance, rel=1e-14)


def test_an_ensemble_of_one_equals_its_member():
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 50, 30, generator=rng) * 120  # float32: most probabilities underflow
    targets = torch.randint(30, (50,), generator=rng)
    figures = measure(logits, targets, (1,), batch_size=50)
    assert figures["nll"][1] > 100
    for name in ("top1", "top5", "nll", "ece"):
        assert figures[f"ensemble_{name}"] == pytest.approx(figures[name][1], rel=1e-6), name


def test_a_sure_and_wrong_ensemble_pays_its_full_nll():
    logits = torch.tensor([[[200.0, 0.0, -50.0]], [[180.0, 0.0, -60.0]]])
    figures = measure(logits, torch.tensor([1]), (0, 1), batch_size=1)
    expected = slow_figures(logits.double(), torch.tensor([1]), (0, 1))
    assert figures["ensemble_nll"] == pytest.approx(expected["ensemble_nll"], rel=1e-6)


def test_the_ensemble_means_probabilities_and_not_logits():
    # One member is sure of class 0; two lean towards class 1. The mean of logits would say 0.
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.0]]], dtype=torch.float64)
    figures = measure(logits, torch.tensor([1]), (0, 1, 2), batch_size=1)
    assert figures["top1"] == [0.0, 100.0, 100.0]
    assert figures["ensemble_top1"] == 100.0


def test_an_ensemble_that_is_given_takes_the_place_of_the_mean():
    logits, targets = some_logits(4, 17)
    given = torch.randn(61, 17, dtype=torch.float64) + logits[1]
    metrics = PeerMetrics(4, 17, (1, 2, 3), "cpu")
    for start in range(0, 61, 20):
        part = slice(start, start + 20)
        metrics.update(logits[:, part], targets[part], given[part].log_softmax(-1))
    figures = metrics.compute()
    expected = slow_figures(logits, targets, (1, 2, 3))
    alone = slow_figures(given.unsqueeze(0), targets, (0,))
    for name in ("top1", "top5", "nll", "ece"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
        assert figures[f"ensemble_{name}"] == pytest.approx(alone[name][0], rel=1e-12, abs=1e-12), name
    assert figures["diversity"] == pytest.approx(expected["diversity"], rel=1e-12)


def test_only_group_members_change_ensemble_and_diversity():
    logits, targets = some_logits(4, 17)
    other = logits.clone()
    other[0] = -logits[0]
    first, second = (measure(x, targets, (1, 2, 3), 61) for x in (logits, other))
    for name in ("ensemble_top1", "ensemble_nll", "ensemble_ece", "diversity", "disagreement", "both_wrong"):
        assert first[name] == second[name], name
    assert first["top1"][0] != second["top1"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_summed_as_float32(dtype):
    logits, targets = some_logits(3, 17, dtype=torch.float32)
    rounded = logits.to(dtype)
    figures = measure(rounded, targets, (0, 1, 2), 20)
    expected = slow_figures(rounded.double(), targets, (0, 1, 2))
    for name in ("top1", "nll", "ece", "ensemble_nll", "diversity"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_confident_and_always_right_member_has_zero_ece():
    logits = torch.full((1, 20, 4), -400.0)
    logits[:, :, 2] = 400.0
    figures = measure(logits, torch.full((20,), 2), (0,), 6)
    assert figures["top1"] == [100.0]
    assert figures["nll"] == [0.0]
    assert figures["ece"] == [0.0]


def test_nan_outputs_are_never_among_the_top_five():
    figures = measure(torch.full((1, 6, 17), float("nan")), torch.arange(6), (0,), 3)
    assert figures["top5"] == [0.0]


def test_figures_are_plain_numbers_and_no_samples_give_zeros():
    figures = PeerMetrics(2, 17, (0, 1), "cpu").compute()
    assert figures["samples"] == 0
    assert figures["top1"] == [0.0, 0.0]
    assert figures["diversity"] == 0.0
    for value in figures.values():
        assert isinstance(value, int | float | list)
