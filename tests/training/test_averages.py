"""Averages of weights that are deployed: EMA over all steps, SWA over the last epochs."""

import dataclasses

import pytest
import torch
from torch import nn

from codistill.config.config import Config
from codistill.config.schedule import learning_rate_at
from codistill.deploy.export import export_student
from codistill.models.registry import build as build_network
from codistill.models.registry import resolve
from codistill.reproduce.grid import Cell
from codistill.reproduce.statistics import comparison_rows, differences_to_baselines
from codistill.training.averaging import recompute_statistics
from codistill.training.build import build_run
from codistill.training.load import load_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.student import deployed_network
from codistill.utils.errors import InputError
from helpers.common import close
from helpers.runs import StopAt, tiny

PLACES = [("independent", "networks"), ("okddip", "branches"), ("pcl", "networks")]


def config(name="independent", topology="networks", **options) -> Config:
    return tiny(**{"method": name, "topology": topology, "batch_size": 12, "epochs": 4, "lr": 0.02} | options)


def floating(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items() if v.is_floating_point()}


def run_epochs(t, epochs: int) -> list[dict[str, torch.Tensor]]:
    """Train whole epochs, with what ends them; return the peers' state after every step."""
    states = []
    for _ in range(epochs):
        t.progress.sums, t.progress.step = zero_sums(t), 0
        t.peers.train()
        for batch in t.loader.epoch(t.progress.epoch):
            train_step(t, *batch, 1.0)
            states.append(floating(t.peers))
            t.progress.step += 1
        recompute_statistics(t)
        t.progress.epoch += 1
    return states


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize(("name", "topology"), PLACES[:2])
def test_ema_is_the_sum_of_all_weights(name, topology, execution):
    t = build_run(config(name, topology, dtype="float64", deploy="ema", ema_decay=0.6, execution=execution).resolved())
    initial = floating(t.peers)
    states = run_epochs(t, 2)
    keeps = [min((g + 1) / (g + 10), 0.6) for g in range(len(states))]
    assert (keeps[0], len(states)) == (0.1, 10)
    for key, value in floating(t.average.peers).items():
        expected, rest = torch.zeros_like(value), 1.0  # from the newest to the oldest
        for state, keep in zip(reversed(states), reversed(keeps)):
            expected += rest * (1 - keep) * state[key]
            rest *= keep
        close(value, expected + rest * initial[key], 1e-10)


@pytest.mark.parametrize(("name", "topology"), PLACES)
def test_swa_is_the_mean_of_the_last_epochs_ends(name, topology):
    t = build_run(config(name, topology, dtype="float64", deploy="swa", swa_start=0.5).resolved())
    steps = len(t.loader)
    copied = run_epochs(t, 2)[-1]
    for key, value in floating(t.average.peers).items():  # until then a copy, statistics included
        assert torch.equal(value, copied[key])
    ends = run_epochs(t, 2)[steps - 1 :: steps]
    assert len(ends) == 2
    for key, value in floating(t.average.peers).items():
        if "running" not in key:
            close(value, torch.stack([state[key] for state in ends]).mean(0), 1e-10)


def test_swa_has_the_statistics_of_its_own_weights():
    t = build_run(config(dtype="float64", deploy="swa", swa_start=0.5, peers=2).resolved())
    run_epochs(t, 4)
    for p in range(2):
        student = t.average.peers.export_member(p)
        means, variances = [], []
        for views, _ in t.loader.epoch(3):
            maps = student.conv1(views[0]).detach()
            means.append(maps.mean((0, 2, 3)))
            variances.append(maps.var((0, 2, 3)))
        close(student.bn1.running_mean, torch.stack(means).mean(0), 1e-10)
        close(student.bn1.running_var, torch.stack(variances).mean(0), 1e-10)


@pytest.mark.parametrize(("topology", "freeze"), [("networks", "bn1"), ("networks", "trunk"), ("branches", "trunk")])
def test_swa_keeps_the_statistics_of_frozen_modules(topology, freeze):
    """They stand still in training, so what follows was trained on them, not on those of the training images."""
    options = {"freeze": (freeze,), "swa_start": 0.25, "peers": 2, "milestones": (9,)}
    t = build_run(config(topology=topology, deploy="swa", **options).resolved())
    for module in t.frozen:
        module.eval()
    named = t.average.peers.named_modules(remove_duplicate=False)  # branches share modules
    frozen = tuple(f"{name}." for name, module in named if module in t.frozen)
    before = floating(t.average.peers)
    t.progress.epoch = 3
    recompute_statistics(t)
    changed = {key for key, value in floating(t.average.peers).items() if not torch.equal(value, before[key])}
    running = {key for key in before if "running" in key}
    assert changed == {key for key in running if not key.startswith(frozen)}


def test_swa_is_the_same_stacked():
    ours, theirs = (
        build_run(config(dtype="float64", deploy="swa", swa_start=0.5, execution=execution).resolved())
        for execution in ("loop", "stacked")
    )
    for t in (ours, theirs):
        run_epochs(t, 4)
    state = checkpoint_state(theirs)["average"]
    for key, value in checkpoint_state(ours)["average"].items():
        close(state[key].double(), value.double(), 1e-9)


@pytest.mark.parametrize("deploy", ["ema", "swa"])
def test_members_train_as_without_an_average(deploy):
    """Bit for bit, where the learning rate is the same; the forwards for statistics change no random state."""
    options = {"milestones": (9,), "dtype": "float32", "peers": 2}
    plain = build_run(config(**options).resolved())
    averaged = build_run(config(deploy=deploy, **options | ({"swa_lr": 0.02} if deploy == "swa" else {})).resolved())
    for one, other in zip(run_epochs(plain, 4), run_epochs(averaged, 4), strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert "average" not in checkpoint_state(plain)


def test_the_rate_of_averaged_epochs_is_constant():
    c = config(deploy="swa", epochs=8, lr=0.4, schedule="cosine").resolved()
    rates = [learning_rate_at(c, epoch, 1, 5) for epoch in range(8)]
    assert rates[6:] == [0.2, 0.2]
    assert rates[5] != 0.2
    assert learning_rate_at(dataclasses.replace(c, swa_lr=0.07), 7) == 0.07


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deploy", "name"), [("ema", "dml"), ("swa", "one"), ("swa", "pcl"), ("ema", "codistillation")]
)
def test_a_resumed_run_has_the_same_average(deploy, name, tmp_path):
    common = {"checkpoint_every_steps": 1, "log_every_steps": 1, "deploy": deploy, "peers": 2, "epochs": 3}
    common |= {"topology": None, "swa_start": 0.34 if deploy == "swa" else None}
    whole = train(config(name, out=str(tmp_path / "whole"), **common))
    stopped = config(name, out=str(tmp_path / "stopped"), **common)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(2, 2))
    again = train(dataclasses.replace(stopped, resume="auto"))
    for part in ("peers", "method", "average"):
        theirs = checkpoint_state(again.training)[part]
        for key, value in checkpoint_state(whole.training)[part].items():
            assert torch.equal(value, theirs[key]), (part, key)
    assert whole.figures["student"] == again.figures["student"]
    assert whole.figures["student"]["top1"] == whole.figures[f"test_{deploy}"]["top1"][0]
    assert whole.figures["deployed"] == f"{deploy.upper()} of member 0"
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()
    assert f'"val_{deploy}"' in (tmp_path / "whole/metrics.jsonl").read_text()


@pytest.mark.parametrize(("deploy", "name"), [("ema", "okddip"), ("swa", "one")])
def test_what_is_exported_is_the_plain_network(deploy, name, tmp_path):
    out = tmp_path / "run"
    result = train(
        config(name, None, deploy=deploy, out=str(out), epochs=2, swa_start=0.0 if deploy == "swa" else None)
    )
    plain = build_network(resolve("resnet8"), num_classes=10, in_channels=1, image_size=8)
    assert result.student.state_dict().keys() == plain.state_dict().keys()
    assert result.figures["parameters_deployed"] == sum(p.numel() for p in plain.parameters())
    loaded = load_run(out)
    assert export_student(loaded, tmp_path / "student.safetensors") < 1e-4
    average, member = deployed_network(loaded), loaded.peers.export_member(loaded.method.deployed)
    assert not torch.allclose(average.conv1.weight, member.conv1.weight)
    assert torch.equal(average.conv1.weight, result.student.conv1.weight)


def test_a_skipped_step_does_not_touch_the_average():
    t = build_run(config(deploy="ema", skip_nonfinite=5).resolved())
    t.peers.train()
    batches = list(t.loader.epoch(0))
    for views, targets in batches[:2]:
        train_step(t, views, targets, 1.0)
        t.progress.step += 1
    train_step(t, torch.full_like(batches[2][0], float("nan")), batches[2][1], 1.0)
    assert int(t.guard.skipped) == 1
    assert all(value.isfinite().all() for value in floating(t.average).values())


@pytest.mark.slow
def test_costs_are_those_of_the_members_and_of_the_statistics(tmp_path):
    def passes(**options):
        more = {"train_per_class": 2, "epochs": 4, "eval_every_epochs": 4}
        return train(config(out=str(tmp_path / str(options)), **more | options)).figures["cost"]["training_passes"]

    assert passes(peers=1) == 1.0
    assert passes(peers=2) == passes(peers=2, deploy="ema") == 2.0
    # 2 of the 4 epochs end in an average of several weights, and a forward is a third of a pass.
    assert passes(peers=2, deploy="swa", swa_start=0.25) == pytest.approx(2 + 2 * 2 / 4 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ema_decay": 0.9}, "--ema-decay shapes --deploy ema; add it"),
        ({"swa_lr": 0.9, "deploy": "ema"}, "--swa-lr shapes --deploy swa"),
        ({"swa_start": 0.5}, "--swa-start shapes --deploy swa"),
        ({"swa_start": 1.0, "deploy": "swa"}, "--swa-start is 1.0; give from 0 to below 1"),
        ({"ema_decay": 0.9, "deploy": "ema", "name": "pcl"}, "give that"),
        ({"deploy": "average"}, "give member, ensemble, ema, swa, or a number from 0 to 2"),
    ],
)
def test_bad_options_end_in_a_sentence(options, sentence):
    with pytest.raises(InputError, match=sentence):
        config(**options).resolved()


def test_an_average_is_compared_with_the_average_of_the_same_member():
    cells = [Cell("baseline", Config()), Cell("ours", Config(), "baseline")]
    for seed in range(3):
        part = {"test_ema": {"top1": [50.0, 60.0 + seed]}, "parameters_trained": 2, "parameters_deployed": 1}
        test = {"top1": [1.0, 2.0], "ensemble_top1": 3.0, "diversity": 0.0}
        common = part | {"test": test, "seconds": 1.0, "cost": {"training_passes": 2.0 + seed}}
        cells[0].results[seed] = common | {"deployed": "EMA of member 0", "student": {"top1": 50.0, "ece": 0.1}}
        cells[1].results[seed] = common | {"deployed": "EMA of member 1", "student": {"top1": 64.0, "ece": 0.1}}
    assert differences_to_baselines(cells)["ours"].mean == pytest.approx(3.0)
    assert comparison_rows(cells)[1]["passes"] == "3.00"
