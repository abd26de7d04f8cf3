"""`PeerTraining` in a loop of ten lines: the same losses and weights as codistill's own training step, in float64."""

import io
import warnings

import pytest
import torch

from codistill.methods import DML, KD, KDCL, PCL, Codistillation, Independent, SwitOKD
from codistill.peers import BranchPeers, NetworkPeers
from codistill.training import PeerTraining
from codistill.utils import InputError
from helpers.common import close
from helpers.reference_loop import CASES, EPOCHS, NAMES, make_optimizer, train_reference


def run_loop(training, optimizer, reference, epochs):
    losses = []
    training.train()
    for epoch in epochs:
        weight = training.method.weight_at(epoch)
        for views, targets in reference.batches:
            if training.method.update_mode == "alternating":
                turns = []
                for loss, parameters in training.take_turns(views, targets, weight):
                    optimizer.zero_grad()
                    loss.backward(inputs=parameters)
                    optimizer.step()
                    turns.append(loss.item())
                losses.append(sum(turns))
                continue
            terms = training(views, targets, weight)
            optimizer.zero_grad()
            terms["loss"].backward()
            with training.keep_inactive(optimizer):
                optimizer.step()
            training.end_step()
            losses.append(terms["loss"].item())
        if reference.holdout:
            training.update_on_holdout(reference.holdout)
    return losses


def build(reference):
    training = PeerTraining(reference.peers, reference.method, reference.teacher, len(reference.batches))
    return training.double(), make_optimizer(training.trained_parameters())


@pytest.mark.parametrize(("name", "options", "topology"), CASES, ids=NAMES)
def test_equals_the_own_training_step(name, options, topology):
    reference = train_reference(name, options, topology)
    training, optimizer = build(reference)
    losses = run_loop(training, optimizer, reference, range(EPOCHS))
    close(torch.tensor(losses), torch.tensor(reference.losses))
    for ours, theirs in zip(training.peers.state_dict().values(), reference.trained.state_dict().values(), strict=True):
        close(ours.double(), theirs.double())


@pytest.mark.parametrize(("steps_per_epoch", "warned_in"), [(2, "the third step"), (None, "student")])
def test_a_method_that_never_gets_its_holdout_says_so_once(steps_per_epoch, warned_in):
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    method = KDCL(2, target="general", own_views=False, holdout_fraction=0.1)
    training, words = PeerTraining(peers, method, None, steps_per_epoch), "call update_on_holdout"
    for step in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.end_step()
        assert [words in str(w.message) for w in caught] == [True] * (warned_in == "the third step" and step == 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.student()
        training.student()
    assert [words in str(w.message) for w in caught] == [True] * (warned_in == "student")
    with pytest.raises(InputError, match="update_on_holdout got no batch"):
        training.update_on_holdout([])
    fresh = PeerTraining(peers, method, None, 2)
    fresh.update_on_holdout([(torch.zeros(4, 1, 8, 8), torch.arange(4))])
    again = PeerTraining(peers, method, None, 2)
    again.load_state_dict(training.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for updated in (fresh, again):
            for _ in range(3):
                updated.end_step()


@pytest.mark.parametrize("name", ["pcl", "codistillation"])
def test_continues_from_its_state_dict(name):
    case = next(case for case in CASES if case[0] == name)
    reference = train_reference(*case)
    first, optimizer = build(reference)
    run_loop(first, optimizer, reference, [0])
    file = io.BytesIO()
    torch.save({"training": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, optimizer = build(train_reference(*case))
    second.load_state_dict(saved["training"])
    optimizer.load_state_dict(saved["optimizer"])
    assert second.steps_done == len(reference.batches)
    losses = run_loop(second, optimizer, reference, [1])
    close(torch.tensor(losses), torch.tensor(reference.losses[len(reference.batches) :]))


def test_the_student_is_plain_and_the_deployed_member():
    reference = train_reference("pcl", {"ema_decay": 0.9}, "branches")
    training, optimizer = build(reference)
    run_loop(training, optimizer, reference, range(EPOCHS))
    student, images = training.student(), reference.batches[0][0][0]
    assert type(student).__name__ == "Tiny"
    assert not student.training
    assert {type(m).__module__.partition(".")[0] for m in student.modules()} == {"torch", "tiny_network"}
    close(student(images), reference.student(images))
    training.eval()
    close(training(images), reference.student(images))
    mean = training.student("ema")
    assert (mean(images) - student(images)).abs().max() > 1e-6
    assert training.student("ensemble")(images).exp().sum(-1).allclose(torch.ones(1, dtype=torch.float64))


def test_the_loss_is_computed_outside_autocast():
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    training = PeerTraining(peers, KDCL(2, own_views=False))
    with torch.autocast("cpu", torch.bfloat16):
        terms = training(torch.randn(4, 1, 8, 8), torch.arange(4))
    assert {terms["loss"].dtype, terms["targets_PBC"].dtype} == {torch.float32}


def test_members_in_turn_run_in_the_callers_autocast():
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    losses = {}
    for own in (False, True):
        peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
        peers.autocast = torch.bfloat16 if own else None
        training = PeerTraining(peers, DML(2))
        optimizer = torch.optim.SGD(training.trained_parameters(), lr=0.5)
        turns, losses[own] = training.take_turns(images, labels), []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=not own):
                loss, parameters = next(turns)
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            losses[own].append(loss.item())
    assert losses[False] == losses[True]


def test_a_member_that_has_stepped_is_cast_again_within_autocast():
    """Autocast keeps cast weights until its outermost context ends."""
    peers, images = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8), torch.randn(8, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = peers(images)
        outputs.logits_PBC = outputs.logits_PBC.detach().clone()
        with torch.no_grad():
            for parameter in peers.member(0).body.parameters():
                parameter.mul_(-1)
        peers.refresh(outputs, images, 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = peers(images).logits_PBC[0]
    assert torch.equal(outputs.logits_PBC[0], expected)


def test_a_pausing_member_stays_though_the_optimizer_has_no_state_yet(peers):
    method = SwitOKD(2)
    method.learns = lambda z_PBC, targets_B: torch.zeros(1, 1, dtype=torch.bool)  # expert mode: only the student steps
    training = PeerTraining(peers, method)
    optimizer = torch.optim.AdamW(training.trained_parameters(), lr=0.1)
    before = [[q.clone() for q in peers.member(p).parameters()] for p in range(2)]
    training(torch.randn(4, 1, 8, 8), torch.arange(4))["loss"].backward()
    with training.keep_inactive(optimizer):
        optimizer.step()
    teacher, student = ([*peers.member(p).parameters()] for p in range(2))
    assert all(torch.equal(q, old) for q, old in zip(teacher, before[0]))
    assert all(not value.any() for q in teacher for value in optimizer.state[q].values())
    assert not any(torch.equal(q, old) for q, old in zip(student, before[1]))
    assert optimizer.state[student[0]]["step"] == 1


class Recording(Independent):
    """Writes down the steps that it is told of."""

    def before_step(self, peers, step):
        self.places.append(("before", step.number, step.epoch, step.ends_epoch, step.good))

    def after_step(self, peers, step):
        self.places.append(("after", step.number, step.epoch, step.ends_epoch, bool(step.good)))


def test_the_method_is_told_of_steps_once_each(peers):
    method = Recording(2)
    method.places = []
    training = PeerTraining(peers, method, steps_per_epoch=2)
    for _ in range(3):
        for _ in range(2):  # two batches a step
            training(torch.randn(4, 1, 8, 8), torch.arange(4))
        training.end_step()
    places = [(0, 0, False), (1, 0, True), (2, 1, False)]
    assert method.places == [x for p in places for x in (("before", *p, None), ("after", *p, True))]
    with pytest.raises(InputError, match="acts at certain steps of an epoch; give `steps_per_epoch`"):
        PeerTraining(peers, method)(torch.randn(4, 1, 8, 8), torch.arange(4))


@pytest.fixture
def peers():
    return NetworkPeers("tiny_network:Tiny", 2, 10, in_channels=1, image_size=8)


def test_one_view_for_a_method_that_needs_more(peers):
    training = PeerTraining(peers, PCL(2, [6, 6], 10))
    with pytest.raises(InputError, match="pcl trains on a view of its own for every peer; give a list of 2 inputs"):
        training(torch.randn(4, 1, 8, 8), torch.arange(4))
    views = [torch.randn(4, 1, 8, 8)] * 2
    assert training(views, torch.arange(4))["loss_P"].shape == (2,)


def test_what_a_method_needs_is_asked_for(peers):
    with pytest.raises(InputError, match="kd needs a trained teacher; give a network as `teacher`"):
        PeerTraining(peers, KD(2))
    branches = BranchPeers("tiny_network:Tiny", 2, 10, branch_at="norm", in_channels=1, image_size=8)
    with pytest.raises(InputError, match=r'dml updates one member after the other, .*build it with update="joint"'):
        PeerTraining(branches, DML(2))
    with pytest.raises(InputError, match="codistillation has no mean teachers"):
        PeerTraining(peers, Codistillation(2)).student("ema")


def test_loops_that_split_a_batch(peers):
    alternating, whole, any_loop = DML(2), DML(2, update="joint", divergence="dist"), DML(2, update="joint")
    for method, reason in ((alternating, "updates one member after the other"), (whole, "needs the whole batch")):
        training = PeerTraining(peers, method)
        training.check_loop(1, 1)
        with pytest.raises(InputError, match=f"dml {reason}.*2 processes"):
            training.check_loop(2, 1)
        with pytest.raises(InputError, match=f"dml {reason}.*4 batches a step"):
            training.check_loop(1, 4)
    PeerTraining(peers, any_loop).check_loop(2, 4)
