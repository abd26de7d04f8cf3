"""SwitOKD: who learns, its losses, and that a paused teacher keeps its weights and momenta."""

from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.config import SwitOKDConfig
from codistill.losses import kl_divergence
from codistill.methods import SwitOKD
from codistill.peers import PeerOutputs
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import GOLDEN, close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny


def mixed(y, strengths):
    """Logits that lean towards the labels, the more the larger the strength."""
    z, h, _ = random_peers(len(strengths), batch=len(y), classes=7)
    labels = torch.nn.functional.one_hot(y, 7)
    lean = torch.tensor(strengths, dtype=torch.float64).reshape(-1, 1, 1) * labels
    return (z.detach() + lean).requires_grad_(), h


@pytest.mark.parametrize("case", ["a", "b"])
def test_the_authors_numbers(case):
    with np.load(GOLDEN.parent / "next.npz") as archive:
        names = ("student", "teacher", "gap", "delta", "paused", "kl")
        student, teacher, gap, delta, paused, kl = (torch.tensor(archive[f"switokd_{case}_{name}"]) for name in names)
        labels = torch.tensor(archive["dkd_labels"])
    method = SwitOKD(2)
    ours = method.compare(torch.stack((teacher, student)), labels)
    close(ours[0], gap)
    close(ours[1], delta)
    assert method.learns(torch.stack((teacher, student)), labels).item() == (not paused)
    close(kl_divergence(student, teacher), kl)


@pytest.mark.parametrize("strengths", [(0, 0), (5, 0), (0, 5), (4, 1), (4, 4)])
def test_two_networks_equal_the_loop(strengths):
    _, _, y = random_peers()
    z, h = mixed(y, strengths)
    terms = SwitOKD(2)(PeerOutputs(z, h), y)
    naive, learns = oracles.switokd(z, y, students=1)
    compare(terms["loss"], naive, z)
    assert terms["active_P"].tolist() == [learns[0][0], True]
    assert learns[0][0] == (strengths in ((0, 5), (4, 4)))  # one that is behind, or little ahead


@pytest.mark.parametrize("students", [1, 2])
@pytest.mark.parametrize("strengths", [(0, 0, 0), (5, 5, 0), (6, 0, 4), (0, 6, 4), (3, 4, 2), (3, 2, 4), (3, 4, 6)])
def test_three_networks_equal_the_loop(students, strengths):
    _, _, y = random_peers()
    z, h = mixed(y, strengths)
    method = SwitOKD(3, students)
    terms = method(PeerOutputs(z, h), y, weight=0.5)
    naive, learns = oracles.switokd(z, y, students=students, weight=0.5)
    compare(terms["loss"], naive, z)
    assert method.learns(z, y).tolist() == learns
    expected = [*(row[0] for row in learns), True] if students == 1 else [True] * 3
    assert terms["active_P"].tolist() == expected
    assert method.deployed == 2


def compare(loss, naive, z):
    close(loss, naive)
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], torch.autograd.grad(naive, z)[0])


def test_each_comparison_uses_its_own_distances():
    """The released code mixes them up: with these logits it would decide otherwise."""
    _, _, y = random_peers()
    seen = set()
    for first in range(0, 8, 2):
        for second in range(0, 8, 2):
            z, _ = mixed(y, (first, second, 4))
            learns = SwitOKD(3).learns(z, y).flatten().tolist()
            alone = [SwitOKD(2).learns(z[[t, 2]], y).item() for t in (0, 1)]
            assert learns == alone
            seen.add(tuple(learns))
    assert len(seen) == 4  # the teachers are switched one by one


def test_equal_networks_learn():
    z, _, y = random_peers(1)
    twice = torch.cat((z, z)).detach()
    assert SwitOKD(2).compare(twice, y)[0].item() == 0
    assert SwitOKD(2).learns(twice, y).item()


def build(**options):
    t = build_run(tiny(method=SwitOKDConfig(), peers=2, dtype="float64", momentum=0.9, **options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_paused_teacher_keeps_all_but_its_batchnorm_statistics(optimizer, monkeypatch):
    t, plain = build(optimizer=optimizer, lr=0.01), build(optimizer=optimizer, lr=0.01)
    batches = list(t.loader.epoch(0))[:3]
    for run in (t, plain):  # so that there are momenta
        monkeypatch.setattr(run.method, "learns", lambda z, y: torch.tensor([[True]]))
        train_step(run, *batches[0], 1.0)
    (state,), (teacher, student) = [o.state for o in t.optimizers], t.peers.members
    before = [x.clone() for p in teacher.parameters() for x in (p, *state[p].values())]
    moved = {name: b.clone() for name, b in teacher.named_buffers()}
    monkeypatch.setattr(t.method, "learns", lambda z, y: torch.tensor([[False]]))
    for run in (t, plain):
        terms = train_step(run, *batches[1], 1.0)
    after = [x for p in teacher.parameters() for x in (p, *state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(not torch.equal(b, moved[name]) for name, b in teacher.named_buffers())
    assert terms["active_P"].tolist() == [True, True]
    for ours, theirs in zip(student.parameters(), plain.peers.members[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the student steps as if the teacher had
    assert t.progress.sums["stepping_BP"].tolist() == [len(batches[0][1]), 2 * len(batches[0][1])]


def test_the_step_reads_nothing_on_the_host():
    t = build()
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    with CountHostReads() as counter:
        train_step(t, views, targets, 1.0)
    assert not counter.reads


def test_unequal_networks_train_and_resume_exactly(tmp_path: Path):
    options = {"method": SwitOKDConfig(students=2), "peers": 3, "epochs": 2, "log_every_steps": 1}
    options |= {"checkpoint_every_steps": 1, "model": ("resnet20", "resnet8", "resnet8"), "train_per_class": 3}
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **options), StopAt(1, 1))
    again = train(small(tmp_path / "stopped", **options, resume="auto"))
    theirs = checkpoint_state(whole.training)["peers"]
    assert all(torch.equal(value, theirs[key]) for key, value in checkpoint_state(again.training)["peers"].items())
    assert whole.figures["deployed"] == "member 2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peers": 4}, "--peers is 4; switokd is defined for at most 3"),
        ({"peers": 2, "students": 2}, "leaves no teacher of 2 networks"),
        ({"peers": 2, "topology": "branches"}, "works on networks only"),
        ({"peers": 2, "execution": "stacked"}, "steps some members and not others"),
        ({"peers": 2, "accumulate": 2}, "needs the full batch"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    students = options.pop("students", 1)
    with pytest.raises(InputError, match=words):
        build_run(tiny(method=SwitOKDConfig(students=students), **options).resolved())
