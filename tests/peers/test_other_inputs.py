"""Inputs other than images: token ids with a mask, rows of a table, waves; every topology and every method."""

import io
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from codistill.config import METHODS, method_config
from codistill.evaluation import confusion_matrix, evaluate_peers, inference_cost, score_network
from codistill.methods import HSSAKD, build_method
from codistill.peers import BranchPeers, NetworkPeers, call_network, map_tensors
from codistill.training import PeerTraining
from codistill.utils import InputError

CLASSES = 3
KINDS = ("text", "rows", "waves")


class Rows(nn.Module):
    """A perceptron of two tensors: numbers and the index of a category."""

    def __init__(self) -> None:
        super().__init__()
        self.category = nn.Embedding(4, 6)
        self.first = nn.Sequential(nn.Linear(11, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, numbers, category):
        return self.head(self.second(self.first(torch.cat((numbers, self.category(category)), 1))))


class Waves(nn.Module):
    """A convolution over one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 8, 5, 2), nn.BatchNorm1d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(8, 12, 3), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, waves):
        return self.head(self.second(self.first(waves)).mean(2))


def text_network():
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    about = transformers.BertConfig(
        **options, intermediate_size=24, num_labels=CLASSES, max_position_embeddings=16, hidden_dropout_prob=0.1
    )
    return transformers.BertForSequenceClassification(about)


NETWORKS = {"text": text_network, "rows": Rows, "waves": Waves}
FORKS = {"text": "bert.encoder.layer.1", "rows": "second", "waves": "second"}


def make_batch(kind, rows=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % CLASSES
    if kind == "text":
        tokens = torch.randint(6, (rows, 7), generator=rng) + 6 * targets[:, None]  # each class has words of its own
        return {"input_ids": tokens, "attention_mask": torch.ones(rows, 7, dtype=torch.int64)}, targets
    if kind == "rows":
        return (torch.randn(rows, 5, generator=rng) + targets[:, None], targets.clone()), targets
    return torch.randn(rows, 2, 40, generator=rng) + targets[:, None, None], targets


def make_peers(kind, topology, num_peers):
    torch.manual_seed(0)
    example = make_batch(kind)[0]
    if topology == "branches":
        return BranchPeers(NETWORKS[kind], num_peers, CLASSES, branch_at=FORKS[kind], example=example)
    if topology == "twins":
        from codistill.peers import TwinPeers

        return TwinPeers(NETWORKS[kind], num_peers, CLASSES, example=example)
    return NetworkPeers(NETWORKS[kind], num_peers, CLASSES, example=example)


def make_training(kind, name, topology, **options):
    config = method_config(name)
    for key, value in options.items():
        setattr(config, key, value)
    config = config.resolved(10)
    peers = make_peers(kind, topology, config.max_peers or (3 if name in ("okddip", "pcl", "ffsd") else 2))
    torch.manual_seed(1)
    teacher = NETWORKS[kind]() if name == "kd" else None
    return PeerTraining(peers, build_method(config, peers), teacher, steps_per_epoch=2)


def do_step(training, optimizer, kind, seed):
    inputs, targets = make_batch(kind, seed=seed)
    views = [make_batch(kind, seed=seed + 100 * v)[0] for v in range(training.method.num_views)]
    inputs = views if len(views) > 1 else inputs
    if training.method.update_mode == "alternating":
        loss = torch.tensor(0.0)
        for member_loss, parameters in training.take_turns(inputs, targets, 1.0):
            optimizer.zero_grad()
            member_loss.backward(inputs=parameters)
            optimizer.step()
            loss += member_loss.detach()
        return loss
    terms = training(inputs, targets, weight=1.0)
    optimizer.zero_grad()
    terms["loss"].backward()
    with training.keep_inactive(optimizer):
        optimizer.step()
    training.end_step()
    return terms["loss"].detach()


def make_optimizer(training):
    return torch.optim.SGD(training.trained_parameters(), lr=0.02, momentum=0.9)


IMAGES_ONLY = {  # what refuses other inputs, with its words
    "dlb": "sees the images of the step before again",
    "hssakd": "hssakd learns at 3 exits of each network, and a network has 0",
    "ffsd": "ffsd reads 3 maps of each of . networks",
    "l_mcl": "l_mcl learns at 2 exits of each network, and a network has 0",
}
CASES = [(kind, name, topology) for kind in KINDS for name, config in METHODS.items() for topology in config.topologies]


@pytest.mark.parametrize(("kind", "name", "topology"), CASES)
def test_every_method_trains_on_every_kind(kind, name, topology):
    if name in IMAGES_ONLY:
        with pytest.raises(InputError, match=IMAGES_ONLY[name]):
            make_training(kind, name, topology)
        return
    training = make_training(kind, name, topology)
    optimizer = make_optimizer(training)
    training.train()
    losses = [do_step(training, optimizer, kind, seed) for seed in range(3)]
    assert all(loss.isfinite() for loss in losses)
    student, (inputs, _) = training.student(), make_batch(kind, seed=9)
    assert {*student.state_dict()} == {*NETWORKS[kind]().state_dict()}
    training.eval()
    with torch.no_grad():
        assert torch.allclose(call_network(student, inputs), training(inputs), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_training_learns_resumes_and_is_judged(kind, topology):
    training = make_training(kind, "okddip", topology)
    optimizer = make_optimizer(training)
    training.train()
    for seed in range(30):
        do_step(training, optimizer, kind, seed)
    file = io.BytesIO()
    torch.save({"training": training.state_dict(), "optimizer": optimizer.state_dict()}, file)
    random_state = torch.get_rng_state()  # of the text network's dropout
    going_on = [do_step(training, optimizer, kind, seed) for seed in (30, 31)]

    resumed = make_training(kind, "okddip", topology)
    other = make_optimizer(resumed)
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved["training"])
    other.load_state_dict(saved["optimizer"])
    resumed.train()
    torch.set_rng_state(random_state)
    assert [do_step(resumed, other, kind, seed) for seed in (30, 31)] == going_on

    batches = [make_batch(kind, rows=30, seed=seed) for seed in (50, 51)]
    figures = evaluate_peers(training.peers, training.method, batches).compute()
    assert figures["samples"] == 60
    scores, labels = score_network(training.student(), batches)
    top1 = 100 * (scores.argmax(1) == labels).double().mean().item()
    assert figures["top1"][training.method.deployed] == pytest.approx(top1)
    assert top1 > 60  # chance: 33
    assert sum(map(sum, confusion_matrix(scores, labels))) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_saved_exported_and_costed(kind, tmp_path):
    training = make_training(kind, "okddip", "networks")
    do_step(training, make_optimizer(training), kind, 0)
    student, (inputs, _) = training.student(), make_batch(kind, seed=9)
    with torch.no_grad():
        expected = call_network(student, inputs)
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    again = NETWORKS[kind]().eval()
    again.load_state_dict(load_file(tmp_path / "student.safetensors"))
    with torch.no_grad():
        assert torch.equal(call_network(again, inputs), expected)
    args, keywords = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    program = torch.export.export(student, args, keywords)
    assert torch.allclose(
        getattr(program.module()(*args, **keywords), "logits", program.module()(*args, **keywords)), expected, atol=1e-5
    )
    cost = inference_cost(student, map_tensors(lambda x: x[0], inputs))
    assert cost["flops_an_image"] > 0


@pytest.mark.parametrize(("seconds", "forwards"), [(0.0, 12), (0.06, 2)])
def test_a_slow_student_is_not_timed_for_long(seconds, forwards, monkeypatch):
    class Slow(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            time.sleep(seconds)
            return super().forward(x)

    monkeypatch.setattr("codistill.evaluation.cost.MAX_SECONDS", 0.05)
    student = Slow(3, 2).eval()
    figures = inference_cost(student, torch.zeros(3))
    assert student.calls == 1 + forwards  # of one image and of 64, and one that counts FLOPs
    assert figures["ms_an_image"] >= 1000 * seconds


def test_rotations_are_of_images():
    peers = make_peers("rows", "networks", 2)
    with pytest.raises(InputError, match="hssakd turns images, and these peers take other inputs"):
        PeerTraining(peers, HSSAKD(2, [(), ()], CLASSES, exits=0))
    training = PeerTraining(peers, HSSAKD(2, [(), ()], CLASSES, exits=0, rotations=False))
    assert do_step(training, make_optimizer(training), "rows", 0).isfinite()


def test_wrong_inputs_are_refused_in_a_sentence():
    numbers, category = make_batch("rows")[0]
    peers = make_peers("rows", "networks", 2)
    with pytest.raises(InputError, match="example\\[1\\] is a list; give a tensor"):
        NetworkPeers(Rows, 2, CLASSES, example=(numbers, [1, 2]))
    with pytest.raises(InputError, match="its tensors have 8, 3 rows"):
        NetworkPeers(Rows, 2, CLASSES, example=(numbers, category[:3]))
    with pytest.raises(InputError, match="leave out labels"):
        NetworkPeers(Rows, 2, CLASSES, example={"numbers": numbers, "labels": category})
    with pytest.raises(InputError, match="give one of both"):
        NetworkPeers(Rows, 2, CLASSES, example=(numbers, category), image_size=8)
    with pytest.raises(InputError, match="there is no batch to evaluate"):
        score_network(Rows(), [])
    with pytest.raises(InputError):
        peers(numbers)


def test_every_peer_may_get_inputs_of_its_own():
    training = make_training("rows", "okddip", "networks")
    inputs = [make_batch("rows", seed=seed)[0] for seed in range(training.peers.num_peers)]
    training.eval()
    with torch.no_grad():
        together = training.peers(inputs).logits_PBC
        for p, view in enumerate(inputs):
            alone = training.peers.export_member(p).eval()
            assert torch.allclose(together[p], call_network(alone, view), atol=1e-6)
