"""The sentences below a comparison: its differences and costs in plain words."""

import pytest

from codistill.config.config import Config
from codistill.reproduce.grid import Cell
from codistill.reproduce.statistics import comparison_sentences


def cell(label, method, accuracies, baseline=None, flops=10, topology="networks"):
    config = Config(method, "resnet8", "digits", topology=topology)
    cost = {"training_flops_a_sample": flops, "samples_seen": 7, "flops_an_image": 5}
    results = {seed: {"student": {"top1": value}, "cost": cost} for seed, value in enumerate(accuracies)}
    return Cell(label, config, baseline, results=results)


PLAIN = cell("one plain network", "independent", [90.0, 91.0, 92.0])
IND = cell("independent networks", "independent", [90.0, 91.0, 92.0], flops=40)


@pytest.mark.parametrize(
    ("accuracies", "sentence"),
    [
        (
            [91.0, 92.0, 93.1],  # t(0.975, 2) = 4.303; differences 1, 1, 1.1: 1.033 +- 4.303 * 0.0577 / sqrt 3
            "Over 3 seeds the okddip student is 1.0 ± 0.1 points better than the same network alone, at 4.1 x the "
            "training and 1 x the deployment cost of one plain network.",
        ),
        (
            [89.0, 90.0, 90.9],
            "Over 3 seeds the okddip student is 1.0 ± 0.1 points worse than the same network alone, at 4.1 x the "
            "training and 1 x the deployment cost of one plain network.",
        ),
        (
            [90.0, 92.0, 91.0],  # differences 0, 1, -1: 0 +- 4.303 / sqrt 3
            "Over 3 seeds the okddip student shows no significant difference to the same network alone (+0.0 ± 2.5 "
            "points), at 4.1 x the training and 1 x the deployment cost of one plain network.",
        ),
    ],
)
def test_a_method_is_compared_in_words(accuracies, sentence):
    ours = cell("okddip networks", "okddip", accuracies, "independent networks", flops=41)
    first, last = comparison_sentences([PLAIN, IND, ours])
    assert first == sentence
    assert last.startswith("What else the same cost buys: a longer training of one network")


def test_branches_are_compared_with_branches_and_costs_may_be_unknown():
    ind = cell("independent branches", "independent", [1.0, 2.0], topology="branches")
    ours = cell("one branches", "one", [3.0, 4.1], "independent branches", topology="branches")
    for result in ours.results.values():
        del result["cost"]
    assert comparison_sentences([PLAIN, ind, ours])[0] == (
        "Over 2 seeds the one student is 2.0 ± 0.6 points better than the same branch without exchange."
    )


def test_one_seed_says_nothing():
    assert comparison_sentences([PLAIN, IND, cell("a", "okddip", [99.0], "independent networks")]) == []
