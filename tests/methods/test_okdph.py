"""OKDPH: its loss, the gradient that reaches the students through the hybrid, fusion, and the draws of the shares."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from codistill.config import OKDPHConfig
from codistill.methods import OKDPH, TrainingStep
from codistill.peers import NetworkPeers, PeerOutputs
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import compute_gradients, train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny


def build(peers=2, dtype="float64", **options):
    method = OKDPHConfig(**options)
    t = build_run(tiny(method=method, peers=peers, dtype=dtype, model="tiny_network:Tiny", nesterov=False).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


def place(number=0, epoch=0, ends_epoch=False):
    return TrainingStep(number, epoch, ends_epoch, good=torch.tensor(True))


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("num_peers", [2, 3])
def test_equals_the_loop(scale, num_peers):
    z, _, y = random_peers(num_peers + 1, batch=3, classes=5, scale=scale)
    outputs = PeerOutputs(z[:-1], [], hybrid_logits_BC=z[-1])
    method = OKDPH(num_peers, label_weight=0.3, weight=0.5, temperature=2.0)
    terms = method(outputs, y)
    naive = oracles.okdph(z[:-1], z[-1], y, label_weight=0.3, weight=0.5, temperature=2.0)
    close(terms["loss"], naive)
    close(torch.autograd.grad(terms["loss"], z, retain_graph=True)[0], torch.autograd.grad(naive, z)[0])
    close(terms["hybrid_loss_B1"].mean(), oracles.ce(z[-1].detach(), y))


def test_another_divergence_compares_with_the_same_mean():
    z, _, y = random_peers(3)
    ours = OKDPH(2, label_weight=1.0, weight=1.0, divergence="reverse_kl")
    mean = z.detach().mean(0)
    expected = oracles.with_divergence(z[:2], y, {0: [mean], 1: [mean]}, kind="reverse_kl", temperature=4.0)
    close(ours(PeerOutputs(z[:2], [], hybrid_logits_BC=z[2]), y)["loss"], expected)


@pytest.mark.parametrize("shares", ["equal", "dirichlet"])
@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_the_hybrids_loss_reaches_each_student_with_its_share(shares, variant):
    """Each student's gradient is that of its own L_k, where theta_h is a function of theta_k (not for the authors)."""
    t = build(peers=3, shares=shares, variant=variant, label_weight=0.3, weight=0.5)
    with torch.no_grad():
        for k, member in enumerate(t.peers.members):
            member.head.weight.mul_(1 + k)
    views, y = next(t.loader.epoch(0))
    assert len(views) == 4  # the last is the hybrid's
    assert not torch.equal(views[0], views[3])
    t.method.before_step(t.peers, place())
    r = t.method.shares_P if shares == "dirichlet" else torch.full((3,), 1 / 3, dtype=torch.float64)
    students, hybrid = [copy.deepcopy(m) for m in t.peers.members], copy.deepcopy(t.peers.members[0])
    with torch.no_grad():
        for name, value in hybrid.named_parameters():
            value.copy_(sum(share * dict(s.named_parameters())[name] for share, s in zip(r, students)))
    z, z_h = [student(views[k])[1] for k, student in enumerate(students)], hybrid(views[3])[1]
    mean = (sum(z).detach() + z_h.detach()) / 4
    oracles.ce(z_h, y).backward()
    t.mesh.begin_step(len(y), 0)
    compute_gradients(t, views, y, y, 1.0)
    for k, member in enumerate(t.peers.members):
        (0.3 * oracles.ce(z[k], y) + 0.5 * oracles.kl(z[k], mean, 4.0)).backward()
        for name, parameter in member.named_parameters():
            of_hybrid = 0.7 * r[k] * dict(hybrid.named_parameters())[name].grad
            of_hybrid = of_hybrid if variant == "paper" else torch.zeros_like(of_hybrid)
            close(parameter.grad, dict(students[k].named_parameters())[name].grad + of_hybrid)
            assert variant == "authors" or of_hybrid.abs().max() > 0 or "hidden.bias" in name


def test_without_a_weight_the_hybrid_costs_no_backward():
    assert [OKDPH(2, label_weight=w, variant=v).hybrid_has_gradient for w, v in ((1.0, "paper"), (0.5, "authors"))] == [
        False,
        False,
    ]
    assert OKDPH(2).hybrid_has_gradient


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_fusion_takes_the_mean_after_the_step_or_that_before_it(variant):
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8).double()
    method = OKDPH(2, variant=variant, interval=3, fusion=1.0)
    weight = [m.head.weight for m in peers.members]
    for number in range(6):
        method.before_step(peers, place(number))
        before = (weight[0] + weight[1]).detach() / 2
        with torch.no_grad():
            weight[0].add_(1.0)  # the step
        after = (weight[0] + weight[1]).detach() / 2
        method.after_step(peers, place(number))
        assert torch.equal(weight[0], weight[1]) == (number in (2, 5))
        if number in (2, 5):
            close(weight[0].detach(), after if variant == "paper" else before)


def test_fusion_by_epochs_and_not_where_the_step_was_bad():
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    weight = [m.head.weight for m in peers.members]
    start = weight[0].detach().clone()
    method = OKDPH(2, interval=2, interval_unit="epochs")
    method.after_step(peers, place(7, epoch=0, ends_epoch=True))
    method.after_step(peers, place(8, epoch=1))
    method.after_step(peers, dataclasses.replace(place(15, epoch=1, ends_epoch=True), good=torch.tensor(False)))
    assert torch.equal(weight[0], start)
    method.after_step(peers, place(15, epoch=1, ends_epoch=True))
    assert not torch.equal(weight[0], start)


def test_shares_are_drawn_from_the_seed_and_the_step_alone():
    method, other = OKDPH(3, shares="dirichlet", seed=1), OKDPH(3, shares="dirichlet", seed=1)
    peers = NetworkPeers("resnet8", 3, 10, in_channels=1, image_size=8)
    drawn = []
    for number in range(400):
        method.before_step(peers, place(number))
        drawn.append(method.shares_P.clone())
    other.before_step(peers, place(399))
    assert torch.equal(other.shares_P, drawn[-1])
    r = torch.stack(drawn).double()
    close(r.sum(1), torch.ones(400).double(), 1e-6)
    assert ((r.mean(0) - 1 / 3).abs() < 0.04).all()
    assert ((r.var(0) - 2 / 36).abs() < 0.015).all()  # Dirichlet(1, 1, 1): (K - 1) / (K^2 (K + 1))
    assert OKDPH(3).hybrid_shares() is None
    assert not method.state_dict()


@pytest.mark.parametrize("options", [{}, {"shares": "dirichlet", "interval": 2}, {"variant": "authors", "interval": 2}])
def test_a_resumed_run_ends_bit_identical(options, tmp_path: Path):
    common = {"method": OKDPHConfig(**options), "epochs": 2, "checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(small(tmp_path / "whole", **common))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **common), StopAt(1, 1))
    again = train(small(tmp_path / "stopped", **common, resume="auto"))
    theirs = checkpoint_state(whole.training)["peers"]
    assert all(torch.equal(value, theirs[key]) for key, value in checkpoint_state(again.training)["peers"].items())
    assert whole.figures["deployed"] == "member 0"


def test_microbatches_and_no_host_reads():
    t = build(shares="dirichlet", interval=1)
    t.config.accumulate = 2
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    with CountHostReads() as counter:
        terms = train_step(t, views, targets, 1.0)
    assert not counter.reads
    assert len(terms["hybrid_loss_B1"]) == len(targets)
    assert t.execution == "loop"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augment": False}, "would stay copies"),
        ({"topology": "branches"}, "works on networks only"),
        ({"model": ("resnet8", "resnet20")}, "takes one architecture"),
        ({"execution": "stacked"}, "means of the members' own parameters"),
        ({"peers": 1}, "needs at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_run(tiny(**{"method": OKDPHConfig(), "peers": 2} | options).resolved())
