"""Weights that a method averages: the hybrid's logits and their gradient, changes after a step, what is refused."""

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch

from codistill.config.method_base import MethodConfig
from codistill.distributed.mesh import Mesh
from codistill.losses import cross_entropy
from codistill.methods import Method, combine_terms
from codistill.peers import NetworkPeers, fuse_members, hybrid_logits, hybrid_network, mix_members
from codistill.training.build import build_run, check_weights_can_be_averaged
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils import InputError
from helpers.common import close
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny


class Mixing(Method):
    """Cross-entropy of the members and of the mean of their weights; after every second step they move to the mean."""

    name = "mixing"
    citation = "-"

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        hybrid: bool = True
        same_start = True

    def __init__(self, num_peers: int, hybrid: bool = True) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"hybrid"} if hybrid else ())
        self.mixes_weights = True
        self.places = []

    def forward(self, outputs, targets_B, weight=1.0):
        self.check(outputs)
        ce_P = cross_entropy(outputs.logits_PBC, targets_B)
        terms = combine_terms(ce_P, torch.zeros_like(ce_P), 0.0)
        if outputs.hybrid_logits_BC is not None:
            terms["loss"] = terms["loss"] + cross_entropy(outputs.hybrid_logits_BC.unsqueeze(0), targets_B).sum()
        return terms

    def after_step(self, peers, step):
        self.places.append((step.number, step.epoch, step.ends_epoch, step.good))
        if step.number % 2:
            fuse_members(peers.local, 0.5, good=step.good)


def build(hybrid=True, **options):
    t = build_run(tiny(method=Mixing.Config(hybrid=hybrid), **{"dtype": "float64", "peers": 2} | options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


def some_peers(**options):
    return NetworkPeers("resnet8", 3, 10, in_channels=1, image_size=8, **options).double()


def mean_by_hand(peers, shares):
    """A copy of member 0 whose every number is the mean of the members' numbers."""
    network = copy.deepcopy(peers.members[0])
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(sum(r * m.state_dict()[name] for r, m in zip(shares, peers.members)))
    return network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shares", [None, (0.5, 0.3, 0.2)])
def test_the_hybrids_logits_and_gradient_are_those_of_the_averaged_network(training, shares):
    peers, images = some_peers().train(training), torch.rand(6, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for member in peers.members:
            member(torch.rand(6, 1, 8, 8, dtype=torch.float64))  # running statistics that differ
    tensor = None if shares is None else torch.tensor(shares, dtype=torch.float64)
    shares = shares or (1 / 3, 1 / 3, 1 / 3)
    before = {name: value.clone() for name, value in peers.state_dict().items()}
    logits = hybrid_logits(peers, images, tensor)
    assert all(torch.equal(value, before[name]) for name, value in peers.state_dict().items())
    network = mean_by_hand(peers, shares)
    expected = network(images)[1]
    close(logits, expected)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    of_network = dict(network.named_parameters())
    for share, member in zip(shares, peers.members):
        for name, parameter in member.named_parameters():
            close(parameter.grad, share * of_network[name].grad)


def test_recomputed_activations_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        peers = some_peers(seed=1)
        peers.members[0].checkpoint_activations = recompute
        hybrid_logits(peers, torch.ones(6, 1, 8, 8, dtype=torch.float64).cumsum(0)).square().sum().backward()
        gradients.append([p.grad for p in peers.parameters()])
        assert peers.members[0].checkpoint_activations == recompute
    for ours, plain in zip(*gradients, strict=True):
        close(ours, plain)


def test_the_averaged_network_is_a_plain_one():
    peers = some_peers()
    plain, network = hybrid_network(peers), mean_by_hand(peers, (1 / 3, 1 / 3, 1 / 3))
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert plain.state_dict().keys() == peers.export_member(0).state_dict().keys()
    close(plain.eval()(images), network.eval()(images)[1])


def test_members_that_start_the_same_are_those_of_the_first_seed():
    peers, alone = some_peers(same_start=True), some_peers()
    for member in peers.members:
        assert all(torch.equal(v, alone.members[0].state_dict()[n]) for n, v in member.state_dict().items())
    assert not torch.equal(alone.members[0].head.weight, alone.members[1].head.weight)


def test_a_method_knows_the_place_of_a_step_and_moves_the_weights():
    t = build()
    batches = list(t.loader.epoch(0))
    for number, batch in enumerate(batches[:2]):
        train_step(t, *batch, 1.0)
        t.progress.step += 1
        gap = (t.peers.members[0].head.weight - t.peers.members[1].head.weight).abs().max().item()
        assert gap == 0 or number == 0  # all begin as one network and see the same images
    assert [place[:3] for place in t.method.places] == [(0, 0, False), (1, 0, False)]
    t.progress.step = len(batches) - 1
    train_step(t, *batches[-1], 1.0)
    assert t.method.places[-1][:3] == (len(batches) - 1, 0, True)


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_fusing_moves_parameters_and_statistics(amount):
    peers = some_peers()
    before = [copy.deepcopy(member.state_dict()) for member in peers.members]
    fuse_members(peers, amount, good=torch.tensor(False))
    assert all(torch.equal(v, before[0][n]) for n, v in peers.members[0].state_dict().items())
    fuse_members(peers, amount, good=torch.tensor(True))
    for p, member in enumerate(peers.members):
        for name, value in member.state_dict().items():
            if value.is_floating_point():
                close(value, (1 - amount) * before[p][name] + amount * sum(b[name] for b in before) / 3)


@pytest.mark.parametrize("limit", [0, 1])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(limit):
    t = build(skip_nonfinite=limit)
    batches = list(t.loader.epoch(0))
    train_step(t, *batches[0], 1.0)
    t.progress.step += 1
    with torch.no_grad():
        t.peers.members[0].head.weight.add_(1.0)  # so that fusing would move it
    before = {name: p.detach().clone() for name, p in t.peers.named_parameters()}
    views, targets = batches[1]
    train_step(t, torch.full_like(views, float("inf")), targets, 1.0)
    assert not t.method.places[-1][3]
    assert all(torch.equal(p, before[name]) for name, p in t.peers.named_parameters())
    t.progress.step += 2
    train_step(t, *batches[2], 1.0)
    moved = not torch.equal(t.peers.members[0].head.weight, before["members.0.head.weight"])
    assert moved == (limit == 1)  # without a limit nothing moves until the host has read the flag


def test_the_step_reads_nothing_on_the_host():
    t = build()
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    t.progress.step += 1
    with CountHostReads() as counter:
        train_step(t, views, targets, 1.0)
    assert not counter.reads


def test_stacked_peers_fuse_like_the_loop():
    runs = [build(hybrid=False, execution=execution, mixup=0.2) for execution in ("loop", "stacked")]
    for t in runs:
        with torch.no_grad():
            t.peers.members[1].head.weight.mul_(2.0)
        for step, batch in enumerate(list(t.loader.epoch(0))[:3]):
            t.progress.step = step
            train_step(t, *batch, 1.0)
    loop, stacked = (t.peers.state_dict() for t in runs)
    assert runs[1].execution == "stacked"
    for name, value in loop.items():
        close(stacked[name].double(), value.double(), 1e-9)


def test_a_resumed_run_ends_bit_identical(tmp_path):
    options = {"method": Mixing.Config(), "epochs": 2, "checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **options), StopAt(1, 1))
    again = train(dataclasses.replace(small(tmp_path / "stopped", **options), resume="auto"))
    theirs = checkpoint_state(whole.training)["peers"]
    assert all(torch.equal(value, theirs[key]) for key, value in checkpoint_state(again.training)["peers"].items())
    assert whole.figures["cost"]["training_flops_a_sample"] is not None


def test_mixed_weights_by_name_cover_the_network():
    peers = some_peers()
    floating = {name for name, value in peers.members[0].state_dict().items() if value.is_floating_point()}
    assert mix_members(peers).keys() == floating


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ("resnet8", "resnet20")}, "averages the weights of all peers, which takes one architecture"),
        ({"topology": "branches"}, "averages the weights of whole networks; give --topology networks"),
        ({"execution": "stacked"}, "runs a network whose weights are means"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build(**options)


def test_peers_on_several_processes_are_refused():
    peers = some_peers()
    with pytest.raises(InputError, match=r"averages the weights of all peers, .* give --mesh data=3"):
        check_weights_can_be_averaged(Mixing(3), peers, Mesh((1, 3), 0, 3, torch.device("cpu")))
    check_weights_can_be_averaged(Mixing(3), peers, Mesh((2, 1), 0, 3, torch.device("cpu")))
