"""A run that goes on to another number of epochs: as if it had been begun with them, or refused with the reason."""

import json

import pytest
import torch

from codistill.config import KDCLConfig, OKDDipConfig
from codistill.training.loop import train
from codistill.utils import InputError, write_json
from helpers.common import read_json
from helpers.runs import StopAt, tiny

SHORT, LONG = {"epochs": 2, "milestones": (1,)}, {"epochs": 4, "milestones": (1, 3)}


def lines(folder):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name in ("epoch", "lr", "weight", "train", "val")}
        for line in kept
    ]


def run(folder, **options):
    return train(tiny(**{"method": KDCLConfig(), "peers": 2, "out": str(folder)} | options))


@pytest.mark.filterwarnings("ignore:this run ended after 2 epochs before")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_lengthened_run_is_the_long_one(stopped, tmp_path):
    """Also where it was stopped within an epoch."""
    whole, first = run(tmp_path / "whole", **LONG), None
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            train(
                tiny(method=KDCLConfig(), peers=2, out=str(tmp_path / "again"), checkpoint_every_steps=1, **SHORT),
                StopAt(1, 2),
            )
    else:
        first = run(tmp_path / "again", **SHORT).figures["test"]
    again = run(tmp_path / "again", resume="auto", **LONG)
    ours, theirs = again.peers.state_dict(), whole.peers.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert again.figures["test"] == whole.figures["test"]
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")
    assert read_json(tmp_path / "again/config.json")["epochs"] == 4
    if not stopped:
        assert read_json(tmp_path / "again/result-2-epochs.json")["test"] == first
    assert run(tmp_path / "again", resume="auto", **LONG).figures["test"] == whole.figures["test"]  # complete again


def test_the_first_result_is_said_to_be_kept(tmp_path):
    run(tmp_path / "run", **SHORT)
    with pytest.warns(UserWarning, match="its test images were read then; that result is kept in result-2-epochs.json"):
        run(tmp_path / "run", resume="auto", **LONG)


def test_a_run_killed_while_its_length_changes_can_do_both(tmp_path, monkeypatch):
    import codistill.runs.run_folder as module

    result = run(tmp_path / "run", **SHORT).figures["test"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_record", killed)
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="ended after 2 epochs"):
            run(tmp_path / "run", resume="auto", **LONG)
    assert run(tmp_path / "run", resume="auto", **SHORT).figures["test"] == result


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"epochs": 4}, {"epochs": 8}, "epoch 3 had the learning rate .* give --milestones 2 3, those of the run"),
        ({"epochs": 2, "schedule": "cosine"}, {"epochs": 4, "schedule": "cosine"}, "it has .*; name another --out"),
        (SHORT, {"epochs": 1, "milestones": (1,)}, "--epochs 1: the run has trained 2 epochs already"),
        ({"epochs": 2, "deploy": "swa"}, {"epochs": 4, "deploy": "swa"}, "--deploy swa averages the last part"),
        (
            SHORT | {"method": OKDDipConfig(), "peers": 3},
            LONG | {"method": OKDDipConfig(), "peers": 3},
            "in a run of 4 epochs --method.ramp-epochs is 1.06.*; add --method.ramp-epochs 0.53",
        ),
        (SHORT, LONG | {"lr": 0.01}, "holds another run"),
    ],
)
def test_what_would_have_been_another_run_is_refused(first, then, message, tmp_path):
    run(tmp_path / "run", **first)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", resume="auto", **then)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")} == before


def test_without_resume_the_way_to_go_on_is_said(tmp_path):
    run(tmp_path / "run", **SHORT)
    with pytest.raises(InputError, match="or go on with --resume auto"):
        run(tmp_path / "run", **LONG)


@pytest.mark.filterwarnings("ignore:this run ended after 2 epochs before")
def test_a_temperature_does_not_outlive_the_weights_that_it_was_fitted_to(tmp_path):
    run(tmp_path / "run", **SHORT)
    info = read_json(tmp_path / "run" / "data.json")
    write_json(tmp_path / "run" / "data.json", info | {"temperature": 12.5, "temperature_best": 3.5})
    run(tmp_path / "run", resume="auto", **LONG)
    after = read_json(tmp_path / "run" / "data.json")
    assert "temperature" not in after
    is_better = read_json(tmp_path / "run" / "result.json")["best_validation"]["epoch"] > 1
    assert ("temperature_best" in after) != is_better  # best.pt was replaced, or not
    assert {name: value for name, value in after.items() if name != "temperature_best"} == info
