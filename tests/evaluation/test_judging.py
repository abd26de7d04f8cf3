"""evaluate's looks at single classes and at calibration, against loops and closed forms."""

import csv
import json
import math

import pytest
import torch

from codistill.cli.main import main
from codistill.evaluation.calibration import calibration_figures, class_rows, confusion_matrix, fit_temperature
from codistill.evaluation.evaluate import evaluate_peers, score_network
from codistill.methods import Independent
from codistill.peers import NetworkPeers
from codistill.utils import InputError
from helpers.common import read_json


def test_the_confusion_matrix_counts_as_a_loop_does():
    rng = torch.Generator().manual_seed(0)
    guesses, labels = torch.randint(4, (50,), generator=rng), torch.randint(4, (50,), generator=rng)
    counts = [[0] * 4 for _ in range(4)]
    for guess, label in zip(guesses.tolist(), labels.tolist()):
        counts[label][guess] += 1
    ours = confusion_matrix(torch.eye(4)[guesses], labels)
    assert ours == counts
    rows = class_rows(ours, ["a", "b", "c", "d"])
    assert rows[0]["recall"] == pytest.approx(100 * counts[0][0] / sum(counts[0]))
    assert rows[1]["precision"] == pytest.approx(100 * counts[1][1] / sum(row[1] for row in counts))
    others = dict(zip("bcd", counts[0][1:]))
    assert others[rows[0]["most often taken for"]] == rows[0]["times"] == max(others.values())


def test_a_class_without_images_or_guesses_has_no_rate():
    rows = class_rows(confusion_matrix(torch.tensor([[1.0, 0.0]]), torch.tensor([0])), ["a", "b"])
    assert rows[1]["recall"] is None
    assert rows[1]["precision"] is None
    assert rows[0]["most often taken for"] is None


def test_the_temperature_undoes_a_known_overconfidence():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=rng, dtype=torch.float64) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=rng).squeeze(1)  # labels as probable as it says
    temperature = fit_temperature(logits * 3, labels)
    assert temperature == pytest.approx(3.0, rel=0.05)
    raw, fitted = calibration_figures(logits * 3, labels), calibration_figures(logits * 3, labels, temperature)
    assert fitted["ece"] < 0.02 < raw["ece"]
    assert fitted["nll"] < raw["nll"]
    nll = lambda t: calibration_figures(logits * 3, labels, t)["nll"]  # noqa: E731
    assert nll(temperature) <= min(nll(temperature * math.exp(s)) for s in (-1e-3, 1e-3))


@pytest.mark.parametrize("temperature", [1.0, 2.3])
def test_calibration_is_that_of_the_definitions(temperature):
    """Guo et al., ICML 2017: NLL, and ECE over 15 bins of equal width, sample by sample in float64."""
    rng = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(9000, 6, generator=rng).double() * 3, torch.randint(6, (9000,), generator=rng)
    nll, bins = 0.0, [[] for _ in range(15)]
    for scores, label in zip((logits / temperature).tolist(), labels.tolist()):
        total = math.fsum(math.exp(score) for score in scores)
        nll += math.log(total) - scores[label]
        best = max(range(6), key=scores.__getitem__)
        confidence = math.exp(scores[best]) / total
        bins[min(int(confidence * 15), 14)].append((confidence, best == label))
    gaps = [abs(math.fsum(c - hit for c, hit in one)) for one in bins]
    found = calibration_figures(logits, labels, temperature)
    assert found["nll"] == pytest.approx(nll / 9000, rel=1e-12)
    assert found["ece"] == pytest.approx(sum(gaps) / 9000, abs=1e-12)
    assert [b["images"] for b in found["bins"]] == [len(one) for one in bins if one]
    assert [b["from"] for b in found["bins"]] == [k / 15 for k, one in enumerate(bins) if one]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.tensor([0.0, 1.0]), "torch.float32 of shape 2; outputs are judged by class numbers"),
        (torch.eye(2), "of shape 2 x 2"),
        (torch.tensor([[0], [1]]), "of shape 2 x 1"),
        (torch.tensor([0, 1], dtype=torch.uint8), "the labels are torch.uint8"),
        (torch.tensor([0]), "of shape 1"),
        (torch.tensor([0, -100]), "a label is -100, which is none of the 2 classes"),
        (torch.tensor([0, 2]), "a label is 2, which is none of the 2 classes"),
    ],
)
def test_labels_that_are_no_class_numbers_judge_nothing(labels, sentence):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    peers = NetworkPeers([network], example=torch.eye(2))
    with pytest.raises(InputError, match=sentence):
        evaluate_peers(peers, Independent(1), [(torch.eye(2), labels)])
    with pytest.raises(InputError, match=sentence):
        score_network(network, [(torch.eye(2), labels)])


@pytest.mark.slow
def test_evaluate_shows_it_and_predict_uses_the_temperature(tmp_path, capsys):
    words = ["--model", "resnet8", "--train-per-class", "6", "--batch-size", "16", "--epochs", "2", "--peers", "1"]
    run = tmp_path / "run"
    assert main(["train", "independent", *words, "--out", str(run)]) == 0
    capsys.readouterr()
    table = tmp_path / "confusion.csv"
    assert main(["evaluate", str(run), "--per-class", "--calibrate", "--confusion", str(table), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = list(csv.reader(table.open()))
    right = sum(int(row[i + 1]) for i, row in enumerate(rows[1:]))
    assert 100 * right / 797 == pytest.approx(said["members"]["top1"][0])
    assert said["calibration"][0]["ece"] == pytest.approx(said["members"]["ece"][0], abs=1e-6)
    assert said["calibration"][0]["nll"] == pytest.approx(said["members"]["nll"][0], abs=1e-5)
    assert read_json(run / "data.json")["temperature"] == said["calibration"][1]["temperature"]
    from codistill.deploy.predict import load_predictor

    assert load_predictor(run).temperature == said["calibration"][1]["temperature"]
    assert main(["evaluate", str(run), "--calibrate", "--checkpoint", "best", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["calibration"][1]["temperature"]
    assert load_predictor(run, checkpoint="best").temperature == best
    assert load_predictor(run).temperature == said["calibration"][1]["temperature"]  # each has its own
    assert main(["evaluate", str(run), "--per-class", "--calibrate"]) == 0
    assert "class by class" in capsys.readouterr().out
