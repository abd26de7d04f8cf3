"""Codistillation: its loss, when snapshots are taken, and the burn-in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from codistill.config import CodistillationConfig
from codistill.data import divide_images
from codistill.losses import kl_divergence
from codistill.methods import Codistillation, Independent
from codistill.peers import NetworkPeers, PeerOutputs, SnapshotTeacher
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import close, random_peers
from helpers.runs import StopAt, small, tiny


def build(**options):
    t = build_run(tiny(method=CodistillationConfig(**options), dtype="float64", model="tiny_network:Tiny").resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_peers", [2, 3])
def test_equals_the_loop(scale, temperature, num_peers):
    z, h, y = random_peers(num_peers, batch=3, classes=5, scale=scale)
    stale = z.detach().roll(1, 1).requires_grad_()
    method = Codistillation(num_peers, temperature=temperature, weight=0.5)
    loss = method(PeerOutputs(z, h, ema_logits_PBC=stale), y, weight=0.8)["loss"]
    naive = oracles.codistillation(z, stale, y, temperature=temperature, weight=0.4)
    close(loss, naive)
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], torch.autograd.grad(naive, z)[0])
    assert torch.autograd.grad(loss, stale, allow_unused=True)[0] is None


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("num_peers", [2, 3])
def test_disjoint_equals_the_loop(scale, num_peers):
    z, h, _ = random_peers(num_peers, batch=3, classes=5, scale=scale)
    y_PB = torch.randint(5, z.shape[:2])
    stale_PPBC = (torch.randn(num_peers, *z.shape) * scale).double().requires_grad_()  # snapshot, whose images
    others = [[stale_PPBC[(i + turn) % num_peers, i] for i in range(num_peers)] for turn in range(1, num_peers)]
    others_QPBC = torch.stack([torch.stack(own) for own in others])
    method = Codistillation(num_peers, temperature=2.0, weight=0.5, partition="disjoint")
    loss = method(PeerOutputs(z, h, others_logits_QPBC=others_QPBC), y_PB, weight=0.8)["loss"]
    naive = oracles.codistillation_disjoint(z, stale_PPBC, y_PB, temperature=2.0, weight=0.4)
    close(loss, naive)
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], torch.autograd.grad(naive, z)[0])
    assert torch.autograd.grad(loss, stale_PPBC, allow_unused=True)[0] is None


def test_snapshots_run_on_the_images_of_every_other_member():
    t = build(partition="disjoint", interval=100)
    views, targets = next(t.loader.epoch(0))
    for _ in range(2):  # members that have moved away from their snapshots
        train_step(t, views, targets, 1.0)
    others_QPBC = t.ema.outputs_of_others(views)
    snapshots = [t.ema.peers.member(p) for p in range(3)]
    for turn in (1, 2):
        for i in range(3):
            with torch.no_grad():
                close(others_QPBC[turn - 1, i], snapshots[(i + turn) % 3](views[i])[1])
    assert not torch.allclose(others_QPBC[1, 0], t.peers(views[0]).logits_PBC[2])


def test_every_member_trains_on_its_own_part():
    t = build(partition="disjoint", burn_in_epochs=1)
    assert len(t.loader) == 2  # 60 images, 20 for each of 3 members, in batches of 16 and 4
    seen = [[], [], []]
    for views, targets in t.loader.epoch(0):
        assert views.shape[:2] == targets.shape
        for p in range(3):
            seen[p] += targets[p].tolist()
    assert [sorted(labels) for labels in seen] == [sorted(2 * [*range(10)])] * 3  # each class twice
    labels = t.data.y_train[t.splits.train]
    parts = divide_images(labels, 3, t.config.seed)
    assert sorted(index for part in parts for index in part) == list(range(60))
    assert [sorted(labels[part].tolist()) for part in parts] == [sorted(own) for own in seen]


@pytest.mark.parametrize(("images", "count"), [(11, 2), (12, 5), (9, 3), (5, 2)])
def test_parts_are_disjoint_and_of_one_size(images, count):
    labels = np.arange(images) % 3
    parts = divide_images(labels, count, seed=4)
    together = np.concatenate(parts)
    assert len(set(together.tolist())) == len(together) == images - images % count
    for number in range(3):
        counts = [int((labels[part] == number).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1
    again, other = divide_images(labels, count, seed=4), divide_images(labels, count, seed=5)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other))


@pytest.mark.parametrize("p", [0, 2])
def test_in_the_burn_in_a_member_does_not_notice_the_others_images(p):
    ours, other = build(partition="disjoint", burn_in_epochs=1), build(partition="disjoint", burn_in_epochs=1)
    for views, targets in list(ours.loader.epoch(0)):
        others = [q for q in range(3) if q != p]
        changed, relabeled = views.clone(), targets.clone()
        changed[others], relabeled[others] = views[others].flip(-1), targets[others].flip(-1)
        train_step(ours, views, targets, ours.method.weight_at(0))
        train_step(other, changed, relabeled, other.method.weight_at(0))
    for key, value in ours.peers.member(p).state_dict().items():
        assert torch.equal(other.peers.member(p).state_dict()[key], value), key
    assert not torch.equal(other.peers.member(1).head.weight, ours.peers.member(1).head.weight)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 31, "peers": 2}, "--batch-size 31 is more than the 30 training images of each of 2 peers"),
        ({"batch_size": 16, "peers": 4}, "--batch-size 16 is more than the 15 training images of each of 4 peers"),
    ],
)
def test_a_batch_larger_than_a_part_is_refused(options, sentence):
    method = CodistillationConfig(partition="disjoint")
    with pytest.raises(InputError, match=sentence):
        build_run(tiny(method=method, model="tiny_network:Tiny", **options).resolved())


def test_disjoint_training_needs_targets_of_every_member():
    method = Codistillation(2, partition="disjoint")
    outputs = PeerOutputs(torch.zeros(2, 4, 10), [], others_logits_QPBC=torch.zeros(1, 2, 4, 10))
    with pytest.raises(InputError, match="give it targets of each, 2 x 4 class numbers, not 4"):
        method(outputs, torch.arange(4))
    with pytest.raises(InputError, match="a target is 12, which is none of the 10 classes"):
        method(outputs, torch.full((2, 4), 12))
    outputs.others_logits_QPBC = None
    with pytest.raises(InputError, match="what the others' snapshots give for each peer's images"):
        method(outputs, torch.zeros(2, 4, dtype=torch.int64))


def test_disjoint_divergences_read_the_labels_of_every_member():
    z, _, _ = random_peers(2, batch=3, classes=5)
    y_PB, others = torch.randint(5, (2, 3)), torch.randn(1, *z.shape).double()
    method = Codistillation(2, divergence="dkd", partition="disjoint")
    ours = method(PeerOutputs(z, [], others_logits_QPBC=others), y_PB)["distill_P"]
    for i in range(2):
        close(ours[i], method.divergence(z[i].detach(), others[0, i].log_softmax(-1), y_PB[i]))


def test_another_divergence_takes_the_place_of_the_cross_entropy():
    z, h, y = random_peers(2)
    stale = z.detach().roll(1, 1)
    method = Codistillation(2, divergence="reverse_kl")
    expected = oracles.with_divergence(z, y, {0: [stale[1]], 1: [stale[0]]}, kind="reverse_kl", temperature=1.0)
    close(method(PeerOutputs(z, h, ema_logits_PBC=stale), y)["loss"], expected)


def test_with_an_interval_of_1_the_gradient_is_that_of_the_mean_of_current_probabilities():
    t = build(interval=1, burn_in_epochs=0)
    for views, targets in list(t.loader.epoch(0))[:3]:
        now = t.peers(views)  # batch statistics, as in the step
        said = t.ema(views).logits_PBC
        assert torch.equal(said, now.logits_PBC.detach())
        z = now.logits_PBC.detach().requires_grad_()
        ours = t.method(PeerOutputs(z, [], ema_logits_PBC=said), targets)["loss"]
        probs = z.detach().softmax(-1)
        others = [(probs.sum(0) - probs[i]) / 2 for i in range(3)]
        dml = sum(oracles.ce(z[i], targets) + kl_divergence(z[i], others[i].log()) for i in range(3))
        close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(dml, z)[0])
        train_step(t, views, targets, 1.0)


def test_snapshots_are_the_weights_at_multiples_of_the_interval():
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    teacher = SnapshotTeacher(peers, 3)
    values = next(iter(peers.parameters()))
    seen = []
    for step in range(7):
        seen.append(teacher.peers.state_dict()["members.0.body.conv1.weight"].flatten()[0].item())
        with torch.no_grad():
            values.fill_(float(step + 1))
        good = torch.tensor(step != 5)  # the snapshot due after step 5 is left out
        teacher.update(peers, step, good)
    assert seen[0] == seen[1] == seen[2]
    assert seen[3:] == [3.0, 3.0, 3.0, 3.0]
    assert [Codistillation(2, n, u).snapshot_interval(7) for n, u in ((5, "steps"), (2, "epochs"))] == [5, 14]


def test_the_interval_in_epochs_counts_the_steps_of_the_run():
    t = build(interval=2, interval_unit="epochs")
    assert isinstance(t.ema, SnapshotTeacher)
    assert t.ema.interval == 2 * len(t.loader)


def test_the_burn_in_trains_independent_peers_bit_for_bit():
    ours = build(burn_in_epochs=1)
    plain = build_run(tiny(method="independent", dtype="float64", model="tiny_network:Tiny").resolved())
    plain.progress.sums = zero_sums(plain)
    plain.peers.train()
    assert [ours.method.weight_at(epoch) for epoch in (0, 1, 2)] == [0.0, 1.0, 1.0]
    for batch in list(ours.loader.epoch(0)):
        train_step(ours, *batch, ours.method.weight_at(0))
        train_step(plain, *batch, plain.method.weight_at(0))
    assert isinstance(plain.method, Independent)
    for key, value in plain.peers.state_dict().items():
        assert torch.equal(ours.peers.state_dict()[key], value), key
    train_step(ours, *batch, ours.method.weight_at(1))
    train_step(plain, *batch, plain.method.weight_at(1))
    assert not torch.equal(ours.peers.state_dict()[key], plain.peers.state_dict()[key])


def test_the_default_burn_in_is_two_fifths_and_none_may_fill_the_run():
    assert tiny(method="codistillation", epochs=70).resolved().method.burn_in_epochs == pytest.approx(28)
    assert Codistillation(2).burn_in_epochs == 120
    with pytest.raises(InputError, match="leaves none of --epochs 3 to distill"):
        tiny(method=CodistillationConfig(burn_in_epochs=3)).resolved()


@pytest.mark.parametrize("partition", ["same", "disjoint"])
def test_a_resumed_run_keeps_its_snapshot(tmp_path: Path, partition):
    method = CodistillationConfig(interval=3 if partition == "same" else 7, burn_in_epochs=0, partition=partition)
    options = {"method": method, "epochs": 2, "checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path / "stopped", **options), StopAt(1, 1))
    again = train(small(tmp_path / "stopped", **options, resume="auto"))
    ours, theirs = checkpoint_state(again.training), checkpoint_state(whole.training)
    assert ours["ema"].keys() == theirs["ema"].keys()
    for part in ("ema", "peers"):
        assert all(torch.equal(value, ours[part][key]) for key, value in theirs[part].items())
    snapshot, trained = theirs["ema"]["peers.members.0.head.weight"], theirs["peers"]["members.0.head.weight"]
    assert not torch.equal(snapshot, trained)  # 2 steps old
    assert not any("teacher" in name or "ema" in name for name in whole.figures)
