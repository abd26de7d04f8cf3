"""HSSAKD: joint labels, who learns from which rows, the authors' number, and rotations through the real step."""

import numpy as np
import pytest
import torch
from torch import nn

import codistill as cd
from codistill.config import HSSAKDConfig
from codistill.data import rotate_images
from codistill.methods import DML, HSSAKD
from codistill.methods.contrib.hssakd import joint_labels
from codistill.peers import NetworkPeers, PeerOutputs
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.step import forward_all, train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import GOLDEN, close
from helpers.host_reads import CountHostReads
from helpers.runs import tiny


class Given(nn.Module):
    """A classifier that returns what an exit is given, so that tests choose the logits of exits."""

    def forward(self, x):
        return x


def method_on_logits(num_peers, classes, exits, **options):
    method = HSSAKD(num_peers, [(1,) * exits] * num_peers, classes, exits=exits, **options)
    for heads in method.classifiers:
        for e in range(exits):
            heads[e] = Given()
    return method


def random_exits(num_peers=2, exits=3, batch=5, classes=6, rotations=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(num_peers, rotations * batch, classes, generator=rng, dtype=torch.float64)
    q = 2 * torch.randn(num_peers, exits, rotations * batch, rotations * classes, generator=rng, dtype=torch.float64)
    return z.requires_grad_(), q.requires_grad_(), torch.randint(classes, (batch,), generator=rng)


def outputs_of(z, q):
    return PeerOutputs(z, [], exits=[list(own) for own in q])


def test_the_authors_numbers():
    with np.load(GOLDEN.parent / "hssakd.npz") as archive:
        names = ("logits", "exits", "labels", "loss", "grad_logits")
        z, q, y, loss, gradient = (torch.tensor(archive[f"hssakd_{name}"]) for name in names)
    z.requires_grad_()
    ours = method_on_logits(2, 6, 3)(outputs_of(z, q), y)["loss"]
    close(ours, loss)
    close(torch.autograd.grad(ours, z)[0], gradient)


@pytest.mark.parametrize(
    ("num_peers", "exits", "rotations"), [(1, 3, True), (2, 3, True), (3, 2, True), (2, 0, True), (3, 2, False)]
)
def test_losses_and_gradients_equal_the_loop(num_peers, exits, rotations):
    z, q, y = random_exits(num_peers, exits, rotations=4 if rotations else 1)
    method = method_on_logits(num_peers, 6, exits, rotations=rotations, temperature=2.5, weight=0.5)
    terms = method(outputs_of(z, q), y, weight=0.5)
    naive = oracles.hssakd(z, q, y, temperature=2.5, weight=0.25, rotations=4 if rotations else 1)
    close(terms["loss"], naive)
    inputs = (z, q) if exits else (z,)
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (terms["loss"], naive))
    for one, other in zip(ours, theirs):
        close(one, other)
    assert terms["distill_P"].abs().max() > 0 or num_peers == 1


def test_without_rotations_and_exits_it_is_mutual_learning():
    z, _, y = random_exits(rotations=1)
    ours = HSSAKD(2, [], 6, exits=0, rotations=False)(PeerOutputs(z, []), y)["loss"]
    close(ours, DML(2, variant="paper", temperature=3.0)(PeerOutputs(z, []), y)["loss"])


def test_joint_labels_of_hard_and_soft_labels():
    assert joint_labels(torch.tensor([3, 7]), 4).tolist() == [12, 13, 14, 15, 28, 29, 30, 31]
    soft = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    rows = joint_labels(soft, 4)
    assert rows.shape == (8, 8)
    for row in range(8):
        expected = torch.zeros(8)
        expected[row % 4], expected[4 + row % 4] = soft[row // 4]
        assert torch.equal(rows[row], expected)
    hard = torch.tensor([1, 0])
    one_hot = nn.functional.one_hot
    assert torch.equal(joint_labels(one_hot(hard, 3).float(), 4), one_hot(joint_labels(hard, 4), 12).float())


def test_turned_rows_learn_from_peers_but_not_from_labels():
    z, q, y = random_exits()
    turned = torch.arange(20) % 4 > 0
    for weight, reached in ((0.0, False), (1.0, True)):
        (gradient,) = torch.autograd.grad(method_on_logits(2, 6, 3)(outputs_of(z, q), y, weight)["loss"], z)
        assert bool((gradient[:, turned].abs() > 1e-9).any()) == reached
        assert bool((gradient[:, ~turned].abs() > 1e-9).all())


def test_the_classifiers_begin_with_no_bias_and_exits_have_a_top1():
    z, _, y = random_exits()
    method = HSSAKD(2, [(8, 4), (8, 4)], 6, exits=2).double()
    assert [tuple(head.weight.shape) for heads in method.classifiers for head in heads] == [(24, 8), (24, 4)] * 2
    assert all((head.bias == 0).all() for heads in method.classifiers for head in heads)
    exits = [[torch.randn(20, d, dtype=torch.float64) for d in (8, 4)] for _ in range(2)]
    terms = method(PeerOutputs(z, [], exits=exits), y)
    joint = torch.tensor([4 * int(label) + k for label in y for k in range(4)])
    hits = [
        [(head(x).argmax(-1) == joint).view(5, 4).double().mean(-1) for head, x in zip(heads, own)]
        for heads, own in zip(method.classifiers, exits)
    ]
    close(terms["exit_top1_BPE"], torch.stack([torch.stack(own, -1) for own in hits], 1))


@pytest.mark.parametrize("channels_last", [False, True])
def test_rotations_are_quarters_counterclockwise_in_rows_of_an_image(channels_last):
    images = torch.arange(2 * 3 * 25).view(2, 3, 5, 5).float()
    given = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    rows = rotate_images(given)
    assert rows.shape == (8, 3, 5, 5)
    for b in range(2):
        for k in range(4):
            slow = torch.empty(3, 5, 5)
            for i in range(5):
                for j in range(5):
                    # A quarter counterclockwise takes column 4 to row 0.
                    place = [(i, j), (j, 4 - i), (4 - i, 4 - j), (4 - j, i)][k]
                    slow[:, i, j] = images[b, :, place[0], place[1]]
            assert torch.equal(rows[4 * b + k], slow)
    assert rows.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert torch.equal(rotate_images(torch.stack([given, given + 1]))[1], rotate_images(given + 1))
    with pytest.raises(InputError, match="images of 4 x 6 cannot be rotated by quarters"):
        rotate_images(torch.zeros(2, 3, 4, 6))


def build(**options):
    t = build_run(tiny(**{"method": HSSAKDConfig(exits=2), "peers": 2, "dtype": "float64"} | options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_equals_one_on_rows_turned_by_hand(accumulate):
    t, slow = build(accumulate=accumulate), build()
    views, labels = next(t.loader.epoch(0))
    terms = train_step(t, views, labels, 1.0)
    (optimizer,) = slow.optimizers
    sizes = [len(part) for part in labels.tensor_split(accumulate)]
    hits = torch.zeros(2, dtype=torch.int64)
    for x, y in zip(views[0].split(sizes), labels.split(sizes)):
        rows = torch.stack([torch.rot90(image, k, (1, 2)) for image in x for k in range(4)])
        outputs = slow.peers(rows)
        hits += (outputs.logits_PBC[:, ::4].argmax(-1) == y).sum(-1)
        (slow.method(outputs, y)["loss"] * len(y) / len(labels)).backward()
    optimizer.step()
    for ours, theirs in zip(t.peers.state_dict().values(), slow.peers.state_dict().values(), strict=True):
        close(ours.double(), theirs.double(), 1e-12)
    for ours, theirs in zip(t.method.parameters(), slow.method.parameters(), strict=True):
        close(ours, theirs, 1e-12)
    assert t.progress.sums["hits_P"].tolist() == hits.tolist()
    assert t.progress.sums["exit_top1_BPE"].shape == (2, 2)
    assert terms["loss"].isfinite()


def test_mixed_labels_train_and_the_step_reads_nothing_on_the_host():
    t = build(mixup=0.3, label_smoothing=0.1)
    views, labels = next(t.loader.epoch(0))
    assert train_step(t, views, labels, 1.0)["loss"].isfinite()
    t = build()
    train_step(t, views, labels, 1.0)
    with CountHostReads() as counter:
        train_step(t, views, labels, 1.0)
    assert not counter.reads


def test_a_run_counts_all_that_is_trained_and_deploys_the_plain_network(tmp_path):
    result = train(tiny(method=HSSAKDConfig(), peers=2, epochs=2, out=str(tmp_path / "run")))
    plain = NetworkPeers("resnet8", 1, 10, in_channels=1, image_size=8).export_member(0)
    assert list(result.student.state_dict()) == list(plain.state_dict())
    deployed = sum(p.numel() for p in plain.parameters())
    assert result.figures["parameters_deployed"] == deployed
    of_exits = sum(p.numel() for p in result.peers.parameters()) - 2 * deployed
    assert result.figures["parameters_trained"] == 2 * deployed + of_exits + 6 * (64 * 40 + 40)
    flops = result.figures["cost"]["training_flops_a_sample"]
    assert flops > 4 * 3 * 2 * 0.9 * result.figures["cost"]["flops_an_image"]  # 4 rotations, forward and backward
    assert "exit_top1" in (tmp_path / "run/metrics.jsonl").read_text()


def test_the_sources_resnet_trains_and_deploys_its_parameters():
    peers = NetworkPeers("resnet32", 2, 100, exits=3)
    method = HSSAKD(2, peers.exit_dims, 100)
    trained = sum(p.numel() for module in (peers, method) for p in module.parameters())
    assert trained == 2 * 1_716_772
    assert sum(p.numel() for p in method.deploy(peers).parameters()) == 472_756


def test_by_hand_the_images_have_to_be_rotated():
    peers = cd.NetworkPeers("resnet8", 2, 10, image_size=8, exits=3)
    method = cd.methods.HSSAKD(2, peers.exit_dims, 10)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    with pytest.raises(InputError, match=r"in 4 rotations; give codistill\.data\.rotate_images\(images\) to the peers"):
        method(peers(images), labels)
    with pytest.raises(InputError, match="a target is 11"):
        method(peers(rotate_images(images)), torch.tensor([1, 2, 3, 11]))
    assert method(peers(rotate_images(images)), labels)["loss"].isfinite()
    with pytest.raises(InputError, match="needs the networks' exits; build NetworkPeers with exits=E"):
        method(cd.NetworkPeers("resnet8", 2, 10, image_size=8)(rotate_images(images)), labels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology": "branches"}, "hssakd works on networks only"),
        ({"checkpoint_activations": True}, "the exits of hssakd share its maps"),
        ({"execution": "stacked"}, "the exits of hssakd run beside the networks"),
        ({"model": "densenet40_12"}, "has 2 places for exits, not 3"),
        ({"accumulate": 2, "method": HSSAKDConfig(divergence="dist")}, "needs the full batch"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build_run(tiny(**{"method": HSSAKDConfig(), "peers": 2} | options).resolved())


def test_stacked_networks_on_rotations_equal_the_loop():
    loop, stacked = (build(method=HSSAKDConfig(exits=0), execution=name) for name in ("loop", "stacked"))
    for views, labels in list(loop.loader.epoch(0))[:3]:
        terms = [train_step(t, views, labels, 1.0) for t in (loop, stacked)]
        close(terms[1]["loss"], terms[0]["loss"])
    assert forward_all(stacked, views).logits_PBC.shape[1] == 4 * views.shape[1]
