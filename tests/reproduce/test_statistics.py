"""Paired differences, Holm's correction, and the sentences of a comparison, against their definitions."""

import math
import statistics
from pathlib import Path

import pytest

from codistill.config import CompareConfig, Config, IndependentConfig
from codistill.reproduce.comparison import plan_comparison
from codistill.reproduce.grid import Cell
from codistill.reproduce.recipes.demo import METHODS, SETS, demo
from codistill.reproduce.statistics import (
    Difference,
    comparison_rows,
    correct_holm,
    differences_to_baselines,
    format_difference,
    paired_difference,
    seeds_needed,
    summarize_comparison,
)
from codistill.utils import InputError


def result(member_accuracies, deployed=0):
    test = {"top1": member_accuracies, "ensemble_top1": 95.0, "diversity": 0.1}
    student = {"top1": member_accuracies[deployed], "nll": 0.3, "ece": 0.02}
    costs = {"parameters_trained": 40, "parameters_deployed": 10, "seconds": 1.0}
    return {"test": test, "student": student, "deployed": f"member {deployed}", **costs}


def cells(gains):
    """Return independent peers, and okddip whose last member gains so many points over theirs."""
    config = Config(IndependentConfig(), "resnet8", "digits", peers=4)
    base = Cell("independent networks", config)
    ours = Cell("okddip networks", config, "independent networks")
    for seed, gain in enumerate(gains):
        members = [90.0 + seed, 80.0, 70.0, 91.0 + seed]
        base.results[seed] = result(members)
        ours.results[seed] = result([1.0, 2.0, 3.0, members[3] + gain], deployed=3)
    return [base, ours]


@pytest.mark.parametrize("data", SETS)
def test_every_demo_has_a_plan(data):
    config = demo(data)
    cells = plan_comparison(METHODS, config)
    assert [cell.label for cell in cells] == [
        "one plain network",
        *("independent networks", "okddip networks", "pcl networks"),
    ]
    assert all(cell.run_config(Path("runs"), seed).seed == seed for cell in cells for seed in config.seed_range())
    assert data != "digits" or config.seed_range() == range(100, 112)  # no option was chosen on these seeds


def test_a_method_of_one_network_is_compared_with_the_plain_one():
    cells = plan_comparison(["dlb", "mcl"], CompareConfig(peers=2))
    assert [(cell.label, cell.baseline) for cell in cells] == [
        ("one plain network", None),
        ("dlb networks", "one plain network"),
        ("independent networks", None),
        ("mcl networks", "independent networks"),
    ]
    assert [cell.run_config(Path("runs"), 0).resolved().peers for cell in cells] == [1, 1, 2, 2]
    assert len(plan_comparison(["dlb"], CompareConfig())) == 2


def test_baselines_of_one_network_are_rows():
    config = CompareConfig(peers=3, epochs=10, milestones=(4, 8), baselines=("ema", "longer", "sam", "swa", "ema"))
    cells = plan_comparison(["dml"], config)
    rows = {cell.label: cell.run_config(Path("runs"), 0).resolved() for cell in cells if cell.label.startswith("one ")}
    assert {cell.baseline for cell in cells if cell.label in rows} == {None, "one plain network"}
    assert {
        label: (c.peers, c.deploy, c.sam_rho, c.epochs, c.milestones, c.method.name) for label, c in rows.items()
    } == {
        "one plain network": (1, "member", 0.0, 10, (4, 8), "independent"),
        "one network, EMA": (1, "ema", 0.0, 10, (4, 8), "independent"),
        "one network, 3 x epochs": (1, "member", 0.0, 30, (12, 24), "independent"),
        "one network, SAM": (1, "member", 0.05, 10, (4, 8), "independent"),
        "one network, SWA": (1, "swa", 0.0, 10, (4, 8), "independent"),
    }
    for cell in cells[:2]:
        cell.results = {seed: result([50.0 + seed + (cell is cells[1])]) for seed in (0, 1)}
    assert summarize_comparison(cells, 3)[0].startswith(
        "Over 2 seeds one network, EMA is 1.0 ± 0.0 points better than one plain network trained without exchange"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ("ema",), "deploy": "ema"}, "--deploy ema holds for every row; drop one of them"),
        ({"baselines": ("sam",), "sam_rho": 0.1}, "--sam-rho 0.1 holds for every row"),
        ({"baselines": ("swa",), "deploy": "ensemble"}, "--deploy ensemble holds for every row"),
        ({"baselines": ("randaugment",), "auto_augment": "trivialaugment"}, "--auto-augment trivialaugment holds"),
    ],
)
def test_baselines_that_every_row_is_already_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan_comparison(["okddip"], CompareConfig(**options))


def test_paired_difference_is_the_t_interval():
    ours, theirs = {0: 2.0, 1: 5.0, 2: 4.0, 7: 9.0}, {0: 1.0, 1: 1.0, 2: 1.5, 8: 3.0}
    found = paired_difference(ours, theirs)
    gaps = [1.0, 4.0, 2.5]
    assert (found.mean, found.count) == (2.5, 3)
    assert found.deviation == pytest.approx(statistics.stdev(gaps))
    assert found.half_width == pytest.approx(4.302652729911275 * statistics.stdev(gaps) / math.sqrt(3))
    t = 2.5 / (statistics.stdev(gaps) / math.sqrt(3))  # 2 degrees of freedom: the tail has a closed form
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired_difference({0: 1.0}, {0: 2.0}) is None


def test_equal_values_differ_by_nothing():
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p_value == 1.0
    assert paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p_value == 0.0


def test_holm_corrects_step_down():
    table = [Difference(1, 0.5, 9, 1, p) for p in (0.04, 0.001, 0.03, 0.5)]
    correct_holm([*table, None])
    assert [d.corrected_p for d in table] == pytest.approx([0.09, 0.004, 0.09, 0.5])
    assert [d.significant for d in table] == [False, True, False, False]


def test_significance_is_the_corrected_one():
    one = Difference(1.0, 0.9, 9, 1.2, 0.03)
    assert format_difference(one) == "+1.00 ± 0.90"
    correct_holm([one, Difference(0.1, 0.9, 9, 1.2, 0.8)])
    assert format_difference(one) == "+1.00 ± 0.90 (n.s.)"


def test_differences_pair_members_of_one_number():
    found = differences_to_baselines(cells([1.0, 2.0, 1.5]))["okddip networks"]
    assert found.mean == pytest.approx(1.5)  # member 3 against member 3, not against the baseline's member 0
    assert comparison_rows(cells([1.0, 2.0, 1.5]))[1]["vs equal cost"] == format_difference(found)


def test_seeds_needed_is_the_least_number():
    from scipy.stats import t

    for deviation, half_width in ((1.5, 1.0), (0.3, 0.5), (2.0, 0.5)):
        n = seeds_needed(deviation, half_width)
        width = lambda n: t.ppf(0.975, n - 1) * deviation / math.sqrt(n)  # noqa: B023, E731
        assert width(n) <= half_width
        assert n == 2 or width(n - 1) > half_width


def test_summary_says_what_the_table_says():
    better, _, power = summarize_comparison(cells([1.0, 1.2, 0.9, 1.1]), peers=4)
    assert better == (
        "Over 4 seeds the okddip student (networks) is 1.1 ± 0.2 points better than the same network trained without "
        "exchange, at 4 x the training and 1 x the deployment cost."
    )
    assert power.endswith("an interval of ± 1 point needs 3 seeds, one of ± 0.5 needs 3.")
    unclear, *_ = summarize_comparison(cells([2.0, -2.0, 1.0]), peers=4)
    assert "does not differ significantly" in unclear
    assert "(+0.3 ± 5.2 points)" in unclear


def test_summary_states_the_measured_costs():
    rows = cells([1.0, 1.2, 0.9, 1.1])
    for cell, flops in zip(rows, (100, 530)):
        for run in cell.results.values():
            run["cost"] = {"training_flops_a_sample": flops, "samples_seen": 10, "flops_an_image": 7}
    assert "at 5.3 x the training and 1 x the deployment cost." in summarize_comparison(rows, peers=4)[0]
