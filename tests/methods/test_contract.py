"""One contract for all methods x topologies, through the real set-up and the real step."""

import copy
import dataclasses
import warnings

import pytest
import torch

from codistill.config.methods import METHODS
from codistill.peers.base import PeerOutputs
from codistill.peers.ema import MeanTeacher
from codistill.peers.networks import NetworkPeers
from codistill.runs.checkpoint import restore_rng, rng_state
from codistill.training.loop import train
from codistill.training.state import checkpoint_state, restore_state
from codistill.training.step import forward_all, train_step
from codistill.training.student import deployed_network
from codistill.utils.errors import InputError
from helpers.common import close
from helpers.method_cases import CASES, build, config, every

plain = pytest.mark.parametrize(("name", "options", "topology"), CASES)


def steps(t, count=2):
    batches = t.loader.epoch(0)
    return [train_step(t, *next(batches), 1.0) for _ in range(count)]


@every
def test_steps_are_finite_and_members_stay_different(name, options, topology):
    t = build(name, options, topology)
    for terms in steps(t):
        assert terms["loss"].isfinite()
    assert t.guard.check_finite() is None
    if t.peers.num_peers > 1 and topology != "twins":  # those are one network
        t.peers.eval()
        with torch.no_grad():
            probs = t.peers(next(t.loader.epoch(1))[0][:1]).logits_PBC.softmax(-1)
        assert (probs[0] - probs[1]).norm(dim=-1).mean() > 1e-3  # copies would stay copies for ever


@every
def test_every_trained_number_moves_and_teachers_do_not(name, options, topology):
    t = build(name, options, topology)
    fixed = {n: p.clone() for n, p in t.teacher.named_parameters()} if t.teacher is not None else {}
    before = {n: p.detach().clone() for n, p in [*t.peers.named_parameters(), *t.method.named_parameters()]}
    steps(t)
    after = dict([*t.peers.named_parameters(), *t.method.named_parameters()])
    still = [n for n, p in before.items() if torch.equal(p, after[n])]
    silent = ["query.weight", "key.weight"] if options.get("detach") == "all" else []  # nothing reaches them then
    assert still == silent
    assert all(torch.equal(p, fixed[n]) for n, p in (t.teacher.named_parameters() if fixed else ()))


@every
def test_a_members_own_loss_reaches_whom_it_should(name, options, topology):
    t = build(name, options, topology, dtype="float64")
    views, targets = next(t.loader.epoch(0))
    outputs = forward_all(t, views)
    logits = outputs.logits_PBC.detach().requires_grad_()
    outputs.logits_PBC = logits
    outputs.features = [f.detach() for f in outputs.features]
    terms = t.method(outputs, targets, 1.0)
    reached = torch.zeros(t.peers.num_peers, t.peers.num_peers, dtype=torch.bool)
    for p in range(t.peers.num_peers):
        (grad,) = torch.autograd.grad(terms["loss_P"][p], logits, retain_graph=True)
        reached[p] = grad.abs().amax((1, 2)) > 1e-12
    own = torch.eye(t.peers.num_peers, dtype=torch.bool)
    undetached = options.get("variant") == "okddip_code" or (name == "okddip" and options.get("detach") != "all")
    assert (reached & own).sum() == t.peers.num_peers
    assert bool((reached & ~own).any()) == undetached


@every
def test_bfloat16_and_a_batch_of_one(name, options, topology):
    t = build(name, options, topology, dtype="bfloat16")
    views, targets = next(t.loader.epoch(0))
    assert train_step(t, views, targets, 1.0)["loss"].dtype == torch.float32
    assert train_step(t, views[:, :1], targets[..., :1], 1.0)["loss"].isfinite()


@every
def test_state_goes_round_and_modes_are_kept(name, options, topology):
    first, second = build(name, options, topology), build(name, options, topology, seed=1)
    steps(first)
    state = checkpoint_state(first) | {"rng": rng_state()}
    restore_state(second, state)
    views = next(first.loader.epoch(1))[0][: first.peers.num_peers]
    for t in (first, second):
        t.peers.eval()
    with torch.no_grad():
        assert torch.equal(first.peers(views).logits_PBC, second.peers(views).logits_PBC)
    for ours, theirs in zip(first.method.state_dict().values(), second.method.state_dict().values()):
        assert torch.equal(ours, theirs)
    restore_rng(state["rng"])
    student = deployed_network(first)
    assert not student.training
    first.peers.train()
    from codistill.training.loaders import test_loader
    from codistill.training.summary import evaluate_run

    evaluate_run(first, test_loader(first))
    assert all(m.training for m in first.peers.modules())


@plain
def test_order_of_peers_does_not_matter(name, options, topology):
    if name in ("okddip", "ffsd"):
        return  # their leader has a place; test_okddip.py permutes the others
    t = build(name, options, topology, dtype="float64")
    views, targets = next(t.loader.epoch(0))
    outputs = forward_all(t, views)
    outputs.logits_PBC = outputs.logits_PBC.detach()
    before = t.method(outputs, targets)["loss"]
    order = list(range(t.peers.num_peers))[::-1]
    outputs.logits_PBC = outputs.logits_PBC[order]
    outputs.features = [outputs.features[p] for p in order]
    outputs.exits = [outputs.exits[p] for p in order if outputs.exits]
    if outputs.ema_logits_PBC is not None:
        outputs.ema_logits_PBC = outputs.ema_logits_PBC[order]
    with torch.no_grad():  # what belongs to a place goes along
        if name == "one":
            for parameter in (
                t.method.gate.weight,
                t.method.gate.bias,
                t.method.gate_norm.weight,
                t.method.gate_norm.bias,
            ):
                parameter.copy_(parameter[order].clone())
        if name == "mcl":
            t.method.heads = torch.nn.ModuleList([t.method.heads[p] for p in order])
        if name == "pcl":
            weight = t.method.classifier.weight
            weight.copy_(torch.cat(weight.chunk(len(order), 1)[::-1], 1).clone())
        if name == "l_mcl":
            method, heads = t.method, t.method.num_heads
            method.classifiers, method.gates = method.classifiers[::-1], method.gates[::-1]
            groups = [method.embeddings[p * heads : (p + 1) * heads] for p in order]
            method.embeddings = torch.nn.ModuleList(head for group in groups for head in group)
        if name == "hssakd":
            t.method.classifiers = t.method.classifiers[::-1]
    close(t.method(outputs, targets)["loss"], before, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHODS if n != "kd"])
def test_a_resumed_run_ends_bit_identical_for_every_method(name, tmp_path):
    from helpers.runs import StopAt

    topology = METHODS[name].topologies[0]
    options = {"target": "general", "holdout_fraction": 0.1} if name == "kdcl" else {}
    common = {"checkpoint_every_steps": 1, "log_every_steps": 1, "epochs": 2}
    whole = train(config(name, options, topology, out=str(tmp_path / "whole"), **common))
    stopped = config(name, options, topology, out=str(tmp_path / "stopped"), **common)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(1, 2))
    again = train(dataclasses.replace(stopped, resume="auto"))
    for part in ("peers", "method", "ema"):
        theirs = checkpoint_state(again.training)[part]
        for key, value in (checkpoint_state(whole.training)[part] or {}).items():
            assert torch.equal(value, theirs[key]), (part, key)
    assert whole.figures["test"] == again.figures["test"]
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_peers_and_a_method_compile(topology):
    t = build("okddip", {}, topology)
    views, targets = next(t.loader.epoch(0))
    eager = t.method(t.peers(views), targets)["loss"]
    compiled = torch.compile(lambda v, y: t.method(t.peers(v), y)["loss"], backend="aot_eager")
    assert torch.allclose(compiled(views, targets), eager, atol=1e-5)


def test_a_mean_teacher_starts_equal_and_records_no_statistics():
    peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    teacher = MeanTeacher(peers, 0.999)
    x = torch.randn(8, 1, 8, 8)
    buffers = {n: b.clone() for n, b in teacher.named_buffers()}
    teacher.train()
    with torch.no_grad():
        outputs = teacher(x)
        assert torch.allclose(outputs.logits_PBC, peers.train()(x).logits_PBC)  # the batch's own statistics
    assert all(torch.equal(b, buffers[n]) for n, b in teacher.named_buffers())
    other = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8, seed=9)
    teacher.update(other, 0)  # phi(0) = 0
    for ours, theirs in zip(teacher.peers.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
    before = [p.clone() for p in teacher.peers.parameters()]
    teacher.update(peers, 3)  # phi(3) = 1 - 1/4
    for ours, old, new in zip(teacher.peers.parameters(), before, peers.parameters()):
        assert torch.allclose(ours, 0.75 * old + 0.25 * new, atol=1e-6)
    teacher.update(peers, 10**6)  # phi = 0.999 at the most
    with torch.no_grad():
        running = [b for n, b in peers.named_buffers() if n.endswith("running_var")]
        [b.fill_(7.0) for b in running]
        teacher.update(peers, 0)
        assert all((b == 7).all() for n, b in teacher.peers.named_buffers() if n.endswith("running_var"))


def test_alternating_keeps_the_others_statistics_and_weights():
    t = build("dml", {}, "networks")
    views, targets = next(t.loader.epoch(0))
    tracked = t.peers.members[1].body.bn1.num_batches_tracked
    train_step(t, views, targets, 1.0)
    assert tracked.item() == 1  # once a step, in its own turn
    before = [p.detach().clone() for p in t.peers.members[1].parameters()]
    outputs = t.peers(views[: t.peers.num_peers])
    t.method(outputs, targets)["loss_P"][0].backward(inputs=[*t.peers.members[0].parameters()])
    said = dataclasses.replace(outputs, logits_PBC=outputs.logits_PBC.detach().clone())
    t.peers.refresh(said, views, 1)
    assert tracked.item() == 2  # the forward above; what is said again leaves no trace
    assert all(p.grad is None for p in t.peers.members[1].parameters())
    assert any(p.grad is not None for p in t.peers.members[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, t.peers.members[1].parameters()))


@pytest.mark.parametrize("variant", ["paper", "okddip_code"])
def test_alternating_equals_fresh_forwards_of_all_at_every_turn(variant):
    options = {"update": "alternating", "variant": variant}
    ours, slow = (build("dml", options, "networks", dtype="float64") for _ in range(2))
    for views, targets in list(ours.loader.epoch(0))[:3]:
        terms = train_step(ours, views, targets, 0.7)
        losses = []
        for p, optimizer in enumerate(slow.optimizers):
            others = [copy.deepcopy(m) for m in slow.peers.members]  # their statistics are thrown away
            z = [slow.peers.members[q](views[0])[1] if q == p else others[q](views[0])[1].detach() for q in range(3)]
            loss = slow.method(PeerOutputs(torch.stack(z), []), targets, 0.7)["loss_P"][p]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        close(terms["loss"], torch.stack(losses).sum(), 1e-12)
    for key, value in slow.peers.state_dict().items():
        close(ours.peers.state_dict()[key].double(), value.double(), 1e-12)


def test_unequal_peers_train_wherever_the_formulas_allow(tmp_path):
    models = ("resnet8", "wrn16_2", "resnet8")
    for name in ("independent", "dml", "cl_ilr", "pcl", "kdcl"):
        t = build(name, {}, "networks", model=models)
        assert steps(t, 1)[0]["loss"].isfinite()
    with pytest.raises(InputError, match="widths 64, 128"):
        build("okddip", {}, "networks", model=models)
    assert steps(build("okddip", {}, "networks", model=("resnet8", "resnet8", "wrn16_2")), 1)


@pytest.mark.parametrize(("deploy", "name"), [("ensemble", "pcl"), ("ema", "pcl"), ("1", "pcl"), ("ensemble", "one")])
def test_what_is_deployed_is_what_is_measured(deploy, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(config(name, {}, "branches", deploy=deploy, epochs=1, out=str(tmp_path / "run")))
    from codistill.training.loaders import test_loader

    labels = torch.from_numpy(result.training.data.y_test)
    loader = test_loader(result.training)
    with torch.no_grad():
        guesses = torch.cat([result.student(v[0]).argmax(-1) for v, _ in loader.epoch()])
    assert (guesses == labels).double().mean().item() * 100 == pytest.approx(
        result.figures["student"]["top1"], abs=1e-9
    )
    assert result.figures["deployed"] == {"ensemble": "ensemble", "ema": "mean teacher 0", "1": "member 1"}[deploy]
