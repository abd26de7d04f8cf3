"""Sharpness-aware minimization (`--sam-rho`): two forwards and backwards per step."""

import dataclasses

import pytest
import torch

from codistill.config.config import Config
from codistill.config.methods import method_config
from codistill.peers.modes import copy_module
from codistill.training import sam
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils.errors import InputError
from helpers.common import close
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, tiny

RHO = 0.3


def config(name="independent", options=None, **more) -> Config:
    method = dataclasses.replace(method_config(name), **options or {})
    return tiny(**{"method": method, "batch_size": 12, "lr": 0.02, "sam_rho": RHO, "dtype": "float64"} | more)


def build(*args, **more):
    t = build_run(config(*args, **more).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


def take_steps(t, count: int):
    for _, batch in zip(range(count), t.loader.epoch(0)):
        train_step(t, *batch, 1.0)
        t.progress.step += 1


@pytest.mark.parametrize(
    ("name", "options", "topology"),
    [("dml", {"update": "joint"}, "networks"), ("okddip", {}, "networks"), ("okddip", {}, "branches")],
)
def test_one_step_is_the_papers(name, options, topology):
    """Move each network (or all branches) up its gradient, take the gradient there, and step from where it was."""
    t = build(name, options, topology=topology, momentum=0.0, nesterov=False)
    peers, method = copy_module(t.peers), copy_module(t.method)
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)

    loss = lambda: method(peers(views), targets, 1.0)["loss"]  # noqa: E731
    groups = [list(peers.parameters())] if topology == "branches" else [list(m.parameters()) for m in peers.members]
    weights = [p for group in groups for p in group]
    own = list(method.parameters())
    first = dict(zip(weights, torch.autograd.grad(loss(), weights)))
    start = {p: p.detach().clone() for p in weights}
    with torch.no_grad():
        for group in groups:
            length = sum(first[p].pow(2).sum() for p in group).sqrt()
            for p in group:
                p += RHO * first[p] / length
    second = torch.autograd.grad(loss(), [*weights, *own], allow_unused=True)
    with torch.no_grad():
        for p, gradient in zip([*weights, *own], second):
            old = start.get(p, p)
            p.copy_(old - 0.02 * ((0 if gradient is None else gradient) + 5e-4 * old))
    for ours, theirs in ((t.peers, peers), (t.method, method)):
        expected = dict(theirs.named_parameters())
        for key, value in ours.named_parameters():
            close(value.detach(), expected[key].detach(), 1e-10)


def test_networks_without_exchange_train_as_each_alone():
    together, alone = build(peers=3), build(peers=1)
    for t in (together, alone):
        take_steps(t, 4)
    for key, value in alone.peers.state_dict().items():
        assert torch.equal(value, together.peers.state_dict()[key])


def test_a_radius_of_nothing_is_plain_training():
    plain, moved = build(sam_rho=0.0), build(sam_rho=1e-12)
    for t in (plain, moved):
        take_steps(t, 3)
    for key, value in plain.peers.state_dict().items():  # the statistics too: those of the first forward
        close(moved.peers.state_dict()[key].double(), value.double(), 1e-8)


def test_parts_of_a_batch_move_together(monkeypatch):
    """With --accumulate the move has the length rho along the gradient of the whole batch."""
    t = build("cl_ilr", accumulate=2, topology="networks")
    start = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in t.peers.members]
    lengths = []
    real = sam.frozen_batchnorm_stats

    def record(peers):
        now = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in peers.members]
        lengths.extend((x - y).norm().item() for x, y in zip(now, start))
        return real(peers)

    monkeypatch.setattr(sam, "frozen_batchnorm_stats", record)
    take_steps(t, 1)
    assert lengths == pytest.approx([RHO] * 3)


def test_a_bad_step_leaves_the_weights_bit_for_bit():
    t = build(skip_nonfinite=3)
    take_steps(t, 2)
    before = {key: value.clone() for key, value in t.peers.state_dict().items() if value.is_floating_point()}
    views, targets = next(t.loader.epoch(1))
    train_step(t, torch.full_like(views, float("nan")), targets, 1.0)
    assert int(t.guard.skipped) == 1
    assert all(torch.equal(value, t.peers.state_dict()[key]) for key, value in before.items())


def test_the_host_does_not_wait_in_a_step():
    t = build("okddip")
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    with CountHostReads() as counter:
        train_step(t, views, targets, 1.0)
    assert counter.reads == []


@pytest.mark.slow
def test_a_resumed_run_ends_bit_identical(tmp_path):
    common = {"checkpoint_every_steps": 1, "log_every_steps": 1, "epochs": 2, "dtype": "float32"}
    whole = train(config("okddip", out=str(tmp_path / "whole"), **common))
    stopped = config("okddip", out=str(tmp_path / "stopped"), **common)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(1, 2))
    again = train(dataclasses.replace(stopped, resume="auto"))
    theirs = checkpoint_state(again.training)["peers"]
    assert all(torch.equal(v, theirs[key]) for key, v in checkpoint_state(whole.training)["peers"].items())
    cost = whole.figures["cost"]
    assert cost["training_passes"] == pytest.approx(2 * 3, abs=0.05)  # three networks


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("dml", {}, "--sam-rho: dml updates one member after the other"),
        ("switokd", {}, "--sam-rho: switokd decides in every forward who steps"),
        ("dlb", {"peers": 1}, "--sam-rho: dlb keeps what it computes of a batch"),
        ("okddip", {"execution": "stacked"}, "--execution stacked: --sam-rho moves each network by its own gradient"),
        ("okddip", {"sam_rho": -1.0}, "--sam-rho is -1.0; give 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(name, more, sentence):
    with pytest.raises(InputError, match=sentence):
        build(name, **more)
