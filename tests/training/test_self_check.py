"""`codistill check`: stored figures of every method, and what a wrong machine looks like."""

import pytest
import torch

from codistill.cli.main import main
from codistill.config import METHODS
from codistill.methods import CLASSES
from codistill.training import self_check
from codistill.training.self_check import check_machine, compute_figures, read_figures, relative_difference


def test_every_method_has_stored_figures():
    keys = {f"{name}, {topology}" for name, config in METHODS.items() for topology in config.topologies}
    assert keys == set(read_figures()), "run: python benchmarks/check_figures.py"


@pytest.mark.slow
def test_check_passes_here_and_prints_a_row_for_each(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in read_figures())
    assert "two steps of okddip" in shown
    assert f"all {len(read_figures()) + 1} checks passed" in shown


def test_a_loss_that_is_wrong_by_a_millionth_fails(monkeypatch, capsys):
    forward = CLASSES["independent"].forward

    def wrong(self, *args):
        terms = forward(self, *args)
        return terms | {"loss": terms["loss"] * (1 + 1e-6)}

    monkeypatch.setattr(self_check, "METHODS", {"independent": METHODS["independent"]})
    monkeypatch.setattr(CLASSES["independent"], "forward", wrong)
    assert main(["check", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "2 of 3 checks failed: independent, networks; independent, branches" in shown
    assert "1.0e-06" in shown or "1e-06" in shown


def test_a_gradient_that_is_wrong_alone_fails():
    key = "independent, networks"
    figures, stored = compute_figures("independent", "networks", torch.device("cpu")), read_figures()[key]
    assert relative_difference(figures["loss"], stored["loss"]) <= 1e-12
    assert relative_difference(figures["gradient"], [1.001 * stored["gradient"][0], *stored["gradient"][1:]]) > 1e-4


def test_what_a_check_raises_is_its_outcome(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(self_check, "METHODS", {"independent": METHODS["independent"]})
    monkeypatch.setattr(self_check, "compute_figures", fail)
    rows = [*check_machine("cpu")]
    assert [row.passed for row in rows] == [False, False, True]
    assert "no kernel for this device" in rows[0].outcome


def test_figures_that_are_not_stored_fail(monkeypatch):
    monkeypatch.setattr(self_check, "METHODS", {"independent": METHODS["independent"]})
    monkeypatch.setattr(self_check, "read_figures", dict)
    assert [row.passed for row in check_machine("cpu")] == [False, False, True]


def test_a_device_that_is_not_here_is_refused(capsys):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert main(["check", "--device", "mps"]) == 2
    assert "mps" in capsys.readouterr().err
