"""Cosub: its losses, and runs of the topology twins from the options to the exported student."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codistill.config import CosubConfig
from codistill.config.config import CompareConfig
from codistill.deploy import export_student
from codistill.methods import Cosub
from codistill.models import build as build_network
from codistill.models import resolve
from codistill.peers import PeerOutputs, TwinPeers
from codistill.reproduce.comparison import plan_comparison
from codistill.training.build import build_run
from codistill.training.dry_run import describe_dry_run
from codistill.training.load import load_run
from codistill.training.loop import train
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.student import count_trained_and_deployed
from codistill.utils import InputError, count_parameters
from helpers import oracles
from helpers.common import GOLDEN, close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny

RANDOM = "tiny_network:Dropping"


def test_the_authors_numbers():
    with np.load(GOLDEN.parent / "next.npz") as archive:
        z, y, loss = (torch.tensor(archive[f"cosub_{name}"]) for name in ("logits", "labels", "loss"))
    close(Cosub()(PeerOutputs(z, []), y)["loss"], loss)
    close(loss, torch.tensor(0.7597533280, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_equals_the_loop(loss, soft, scale):
    z, h, y = random_peers(2, scale=scale)
    targets = F.one_hot(y, 7).double()
    targets = 0.7 * targets + 0.3 * targets.roll(1, 0) if soft else targets
    method = Cosub(loss=loss, weight=0.5)
    value = method(PeerOutputs(z, h), targets if soft else y, weight=0.8)["loss"]
    naive = oracles.cosub(z, targets, loss=loss, weight=0.4)
    close(value, naive)
    close(torch.autograd.grad(value, z)[0], torch.autograd.grad(naive, z)[0])


def test_mixed_labels_become_full_labels_where_asked():
    z, h, y = random_peers(2)
    mixed = 0.7 * F.one_hot(y, 7).double() + 0.3 * F.one_hot(y.roll(1), 7).double()
    value = Cosub(threshold_labels=True)(PeerOutputs(z, h), mixed)["loss"]
    close(value, oracles.cosub(z, (mixed > 0).double(), loss="bce", weight=1.0))


def test_equal_twins_are_pulled_nowhere_by_each_other():
    z, h, y = random_peers(1)
    twice = torch.cat((z, z)).detach().requires_grad_()
    for loss in ("bce", "ce"):
        terms = Cosub(loss=loss)(PeerOutputs(twice, h), y)
        of_labels = 0.25 * sum(oracles.cosub(twice, F.one_hot(y, 7).double(), loss=loss, weight=0.0) for _ in range(4))
        close(torch.autograd.grad(terms["loss"], twice)[0], torch.autograd.grad(of_labels, twice)[0])


def test_a_run_counts_trains_and_deploys_one_network(tmp_path: Path):
    options = {"method": CosubConfig(own_views=True), "peers": None, "epochs": 2, "protocol": "paper"}
    result = train(tiny(**options, out=str(tmp_path / "run")))
    plain = build_network(resolve("resnet8"), num_classes=10, in_channels=1, image_size=8)
    assert isinstance(result.peers, TwinPeers)
    assert result.student.state_dict().keys() == plain.state_dict().keys()
    assert count_trained_and_deployed(result.training) == (count_parameters(plain),) * 2
    (group,) = result.training.optimizers[0].param_groups
    assert len(group["params"]) == len([*plain.parameters()])
    figures = result.figures
    assert figures["cost"]["training_passes"] == 2.0
    assert figures["test"]["top1"][0] == figures["test"]["top1"][1] == figures["student"]["top1"]
    assert figures["test"]["diversity"] == 0.0
    run = load_run(tmp_path / "run")
    assert export_student(run, tmp_path / "student.safetensors") < 1e-4


def test_a_resumed_run_ends_bit_identical(tmp_path: Path):
    options = {"method": "cosub", "peers": None, "model": RANDOM, "epochs": 2}
    options |= {"checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **options), StopAt(1, 1))
    again = train(small(tmp_path / "stopped", **options, resume="auto"))
    theirs = checkpoint_state(again.training)["peers"]
    assert all(torch.equal(value, theirs[key]) for key, value in checkpoint_state(whole.training)["peers"].items())


@pytest.mark.parametrize("deploy", ["1", "ema", "swa"])
def test_averages_and_either_twin_can_be_deployed(deploy, tmp_path: Path):
    c = small(tmp_path / "run", method="cosub", peers=None, model=RANDOM, epochs=2, deploy=deploy)
    result = train(c)
    assert result.figures["parameters_deployed"] == result.figures["parameters_trained"]


def test_a_dry_run_describes_twins():
    said = " ".join(describe_dry_run(tiny(method="cosub", peers=None, model=RANDOM)))
    assert "cosub: 2 twins of tiny_network:Dropping" in said


def test_a_comparison_pairs_it_with_the_plain_network():
    cells = plan_comparison(["cosub", "dml"], CompareConfig(peers=4))
    labels = [(cell.label, cell.baseline) for cell in cells]
    assert ("cosub twins", "one plain network") in labels
    cell = next(cell for cell in cells if cell.label == "cosub twins")
    assert cell.run_config(Path("runs"), 0).resolved().peers == 2
    both = plan_comparison(["cosub"], CompareConfig(topology="both"))
    assert "cosub twins" in [cell.label for cell in both]
    with pytest.raises(InputError, match="cosub works on twins only; drop --topology networks"):
        plan_comparison(["cosub"], CompareConfig(topology="networks"))


def test_the_step_reads_nothing_on_the_host():
    t = build_run(tiny(method="cosub", peers=None, model=RANDOM).resolved())
    t.peers.train()
    batches = t.loader.epoch(0)
    train_step(t, *next(batches), 1.0)
    views, labels = next(batches)
    with CountHostReads() as counter:
        train_step(t, views, labels, 1.0)
    assert not counter.reads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet8"}, "nothing is random in this network.*drop_path_rate=0.1.*--method.own-views"),
        ({"peers": 3}, "--peers is 3; cosub is defined for at most 2"),
        ({"topology": "networks"}, "cosub works on twins only; drop --topology networks"),
        ({"topology": "branches"}, "cosub works on twins only; drop --topology branches"),
        ({"method": "dml", "topology": "twins"}, "dml works on networks and branches only; drop --topology twins"),
        ({"method": "one", "topology": "networks"}, "one needs a trunk, so it works on branches only"),
        ({"model": (RANDOM, RANDOM)}, "--topology twins takes one --model"),
        ({"deploy": "ensemble"}, "twins are one network, which is deployed as it is"),
        ({"execution": "stacked"}, "--execution stacked: twins are one network"),
        ({"branch_at": ("norm",)}, "--branch-at and --fan-out shape branches"),
        ({"mesh": "data=1,peer=2"}, "twins are one network, so they cannot be spread .*; give --mesh data=2"),
        ({"method": CosubConfig(loss="ce", threshold_labels=True)}, "--method.threshold-labels makes labels that sum"),
        ({"method": CosubConfig(threshold_labels=True), "label_smoothing": 0.1}, "--label-smoothing gives every class"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_run(tiny(**{"method": "cosub", "peers": None, "model": RANDOM} | options).resolved())


def test_python_refuses_more_than_two():
    with pytest.raises(InputError, match="cosub is defined for 2 twins"):
        Cosub(3)
