"""A loss that is not finite, in the middle of things: what was stepped, solved or recorded is as it was."""

from pathlib import Path

import pytest
import torch

from codistill.config.methods import KDCLConfig
from codistill.training.build import build_run
from codistill.training.loop import end_epoch
from codistill.training.nonfinite_guard import _ignores_flag
from codistill.training.run import zero_sums
from codistill.training.step import train_step
from helpers.host_reads import CountHostReads
from helpers.runs import small


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_bad_first_step_leaves_no_trace(optimizer, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    config = small(Path("unused"), model="resnet8", skip_nonfinite=1, deterministic=True, optimizer=optimizer, lr=0.01)
    weights = []
    for bad in (True, False):
        t = build_run(config.resolved())
        t.progress.sums = zero_sums(t)
        views, targets = next(t.loader.epoch(0))
        if bad:
            train_step(t, torch.full_like(views, float("nan")), targets, 1.0)
        for _ in range(2):
            train_step(t, views, targets, 1.0)
        weights.append(t.peers.state_dict())
    torch.use_deterministic_algorithms(False)
    for name, value in weights[1].items():
        assert torch.equal(weights[0][name], value), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_members_who_stepped_before_another_failed_are_put_back(optimizer):
    config = small(Path("unused"), model="resnet8", optimizer=optimizer, lr=0.01, skip_nonfinite=1)
    config.method, config.peers = "dml", 3
    config.__post_init__()
    t = build_run(config.resolved())
    t.progress.sums = zero_sums(t)
    batches = [batch for _, batch in zip(range(3), t.loader.epoch(0))]
    for number in (1, 0):  # the first step, and one with momenta
        before = {name: value.clone() for name, value in t.peers.state_dict().items()}
        states = [{k: v.clone() for k, v in held.items()} for o in t.optimizers for held in o.state.values()]
        head = t.peers.member(1).head.weight
        hook = head.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        train_step(t, *batches[number], 1.0)
        hook.remove()
        assert t.guard.skipped_mask()
        for name, value in t.peers.state_dict().items():
            if "running" not in name and "tracked" not in name:  # those go back when the next step is counted
                assert torch.equal(before[name], value), name
        after = [held for o in t.optimizers for held in o.state.values()]
        assert all(torch.equal(one[k], other[k]) for one, other in zip(states, after, strict=True) for k in one)
        t.guard.limit += 1
        train_step(t, *batches[2], 1.0)
        assert not t.guard.skipped_mask()
        assert any(not torch.equal(before[name], value) for name, value in t.peers.state_dict().items())


def test_a_diverged_member_is_restored_when_another_fails():
    config = small(Path("unused"), model="resnet8")
    config.method, config.peers = "dml", 2
    config.__post_init__()
    t = build_run(config.resolved())
    t.progress.sums = zero_sums(t)
    before = {name: value.clone() for name, value in t.peers.named_parameters()}
    t.optimizers[0].param_groups[0]["lr"] = 1e38
    head, seen = t.peers.member(0).head.weight, []
    head.register_hook(lambda gradient: torch.full_like(gradient, 1e6))
    t.optimizers[0].register_step_post_hook(lambda *_: seen.append(bool(head.isinf().any())))
    train_step(t, *next(t.loader.epoch(0)), 1.0)
    assert seen == [True]
    assert t.guard.check_finite() is not None
    for name, value in t.peers.named_parameters():
        assert torch.equal(before[name], value), name


def test_a_methods_epoch_weights_survive_a_bad_step(tmp_path):
    config = small(Path("unused"), model="resnet8", skip_nonfinite=1)
    config.method, config.peers = KDCLConfig(target="general", holdout_fraction=0.2), 2
    config.__post_init__()
    t = build_run(config.resolved())
    t.progress.sums, t.progress.step = zero_sums(t), len(t.loader)
    for batch in t.loader.epoch(0):
        train_step(t, *batch, 1.0)
    assert t.guard.check_finite() is None
    end_epoch(t, None)
    solved = t.method.weights_P.clone()
    assert not torch.allclose(solved, torch.tensor(0.5, dtype=solved.dtype))
    views, targets = next(t.loader.epoch(1))
    train_step(t, torch.full_like(views, float("nan")), targets, 1.0)
    assert torch.equal(t.method.weights_P, solved)


def test_optimizers_that_ignore_the_flag_keep_good_weights(monkeypatch):
    step = torch.optim.SGD.step

    def heedless(self, *words):
        self.found_inf = None
        return step(self, *words)

    monkeypatch.setattr(torch.optim.SGD, "step", heedless)
    t = build_run(small(Path("unused"), model="resnet8").resolved())
    assert not t.guard.ignored  # this device heeds it, and the host is spared the look
    assert _ignores_flag(t.optimizers[0], t.device)
    t.guard.ignored = True
    t.progress.sums = zero_sums(t)
    batches = [batch for _, batch in zip(range(3), t.loader.epoch(0))]
    train_step(t, *batches[0], 1.0)
    before = {name: value.clone() for name, value in t.peers.named_parameters()}
    train_step(t, torch.full_like(batches[1][0], float("nan")), batches[1][1], 1.0)
    train_step(t, *batches[2], 1.0)
    assert t.guard.check_finite() is not None
    for name, value in t.peers.named_parameters():
        assert torch.equal(before[name], value), name
    monkeypatch.undo()
    assert not _ignores_flag(t.optimizers[0], t.device)


@pytest.mark.parametrize("method", ["okddip", "pcl", "one", "dml", "kdcl"])
def test_a_skipped_step_leaves_everything_as_it_was(method):
    config = small(Path("unused"), model="resnet8", skip_nonfinite=1, optimizer="adamw", lr=0.001)
    config.method, config.peers = method, 3
    config.__post_init__()
    t = build_run(config.resolved())
    t.progress.sums = zero_sums(t)
    batches = [batch for _, batch in zip(range(3), t.loader.epoch(0))]
    train_step(t, *batches[0], 1.0)
    modules = [m for m in (t.peers, t.method, t.ema) if m is not None]
    assert len(modules) == 2 + (method == "pcl")
    kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    sums = {name: value.clone() for name, value in t.progress.sums.items()}
    with CountHostReads() as counter:
        train_step(t, torch.full_like(batches[1][0], float("nan")), batches[1][1], 1.0)
    assert not counter.reads
    for module, before in zip(modules, kept):
        for name, value in before.items():
            assert torch.equal(value, module.state_dict()[name]), name
    for name, value in sums.items():
        assert name == "skipped" or torch.equal(value, t.progress.sums[name]), name
    assert t.progress.sums["skipped"] == len(batches[1][1])
    train_step(t, *batches[2], 1.0)
    assert not all(torch.equal(value, t.peers.state_dict()[name]) for name, value in kept[0].items())
    with pytest.warns(UserWarning, match="1 of at most 1 steps skipped"):
        assert t.guard.check_finite() is None
