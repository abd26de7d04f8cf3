"""DLB: its loss, and what is kept of a batch for the next step."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from codistill.config import DLBConfig
from codistill.losses import kl_divergence
from codistill.methods import DLB
from codistill.peers import PeerOutputs, PreviousOutputs
from codistill.training.build import build_run
from codistill.training.load import load_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny


def build(**options):
    values = {"method": "dlb", "peers": None, "dtype": "float64", "momentum": 0.0, "nesterov": False}
    t = build_run(tiny(**values | options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("batch", [3, 6])
def test_equals_the_loop(temperature, batch):
    z, h, y = random_peers(1)
    again, old = (random_peers(1, batch=batch, seed=seed)[0] for seed in (1, 2))
    y_before = random_peers(1, batch=batch, seed=3)[2]
    method = DLB(temperature=temperature, weight=0.5)
    outputs = PeerOutputs(z, h, previous=PreviousOutputs(again, old, y_before))
    loss = method(outputs, y, weight=0.8)["loss"]
    naive = oracles.dlb(z[0], y, again[0], old[0], y_before, temperature=temperature, weight=0.4)
    close(loss, naive)
    for ours, theirs in zip(*(torch.autograd.grad(v, (z, again), retain_graph=True) for v in (loss, naive))):
        close(ours, theirs)
    assert torch.autograd.grad(loss, old, allow_unused=True)[0] is None


def test_another_divergence_takes_the_place_of_kl():
    z, h, y = random_peers(1)
    again, old = (random_peers(1, seed=seed)[0] for seed in (1, 2))
    terms = DLB(divergence="js")(PeerOutputs(z, h, previous=PreviousOutputs(again, old, y)), y)
    close(terms["distill_P"][0], oracles.divergence(again[0], old[0].detach(), y, kind="js", temperature=3.0))


def test_the_first_step_has_the_labels_alone():
    z, h, y = random_peers(1)
    terms = DLB()(PeerOutputs(z, h), y)
    close(terms["loss"], oracles.ce(z[0], y))
    assert terms["distill_P"].tolist() == [0.0]


@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_steps_equal_a_loop_over_both_views_across_epochs(mixup):
    """Uneven batches: 16, 16, 16, 12 images."""
    t = build(mixup=mixup, lr=0.05)
    network = t.peers.export_member(0).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, weight_decay=5e-4)
    kept, number = None, 0
    for epoch in range(2):
        for step, (views, labels) in enumerate(t.loader.epoch(epoch)):
            t.progress.epoch, t.progress.step = epoch, step
            train_step(t, views, labels, 1.0)
            if mixup:
                views, targets = t.mixer(views, labels, epoch, step)
            else:
                targets = F.one_hot(labels, 10).double()
            images = views[0] if kept is None else torch.cat((views[0], kept[0]))
            whole = targets if kept is None else torch.cat((targets, kept[1]))
            logits = network(images)
            loss = -(whole * logits.log_softmax(-1)).sum(-1).mean()
            if kept is not None:
                loss = loss + kl_divergence(logits[len(labels) :], kept[2], 3.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept, number = (views[1], targets, logits[: len(labels)].detach()), number + 1
    assert number == 8
    ours = t.peers.export_member(0).state_dict()
    for key, value in network.state_dict().items():
        close(ours[key].double(), value.double())


def test_the_two_views_of_an_image_differ():
    views, _ = next(build().loader.epoch(0))
    assert len(views) == 2
    assert not torch.equal(views[0], views[1])


def test_a_resumed_run_ends_bit_identical(tmp_path: Path):
    options = {"method": "dlb", "peers": None, "epochs": 3, "checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(small(tmp_path / "whole", **options))
    for place in ((1, 1), (2, 4)):  # within an epoch, and after its last step
        with pytest.raises(KeyboardInterrupt):
            train(small(tmp_path / "stopped", **options, resume="auto"), StopAt(*place))
    again = train(small(tmp_path / "stopped", **options, resume="auto"))
    ours, theirs = checkpoint_state(again.training), checkpoint_state(whole.training)
    for part in ("peers", "previous"):
        for key, value in theirs[part].items():
            same = torch.equal(value, ours[part][key]) if isinstance(value, torch.Tensor) else value == ours[part][key]
            assert same, (part, key)
    assert theirs["previous"]["_extra_state"] == {"rows": 12}
    assert whole.figures == again.figures | {"seconds": whole.figures["seconds"], "cost": whole.figures["cost"]}


def test_a_skipped_step_leaves_what_is_kept_as_it_was():
    t = build(skip_nonfinite=1)
    batches = list(t.loader.epoch(0))
    train_step(t, *batches[0], 1.0)
    kept = [b.clone() for b in t.previous.buffers()]
    train_step(t, torch.full_like(batches[1][0], torch.inf), batches[1][1], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, t.previous.buffers(), strict=True))
    assert train_step(t, *batches[2], 1.0)["loss"].isfinite()


@pytest.mark.parametrize("options", [{"augment": False}, {"augment": False, "mixup": 0.2}])
def test_without_augmentation_the_next_step_sees_the_same_images(options):
    t = build(**options)
    assert t.loader.sample_batch().shape[0] == 1
    batches = list(t.loader.epoch(0))
    for step, (views, labels) in enumerate(batches):
        t.progress.step = step
        given, targets = t.mixer(views, labels, 0, step) if options.get("mixup") else (views, labels)
        train_step(t, views, labels, 1.0)
        assert torch.equal(t.previous.images_BCHW[: len(labels)], given[0])
        assert torch.equal(t.previous.targets_B[: len(labels)], targets)


def test_a_step_costs_two_passes_and_deploys_the_plain_network(tmp_path: Path):
    result = train(tiny(method="dlb", peers=None, epochs=1, out=str(tmp_path / "run")))
    assert result.figures["cost"]["training_passes"] == 2.0
    assert result.figures["parameters_trained"] == result.figures["parameters_deployed"]
    assert load_run(tmp_path / "run").previous is None  # nothing is kept in evaluation


def test_the_step_reads_nothing_on_the_host():
    t = build()
    batches = t.loader.epoch(0)
    train_step(t, *next(batches), 1.0)
    views, labels = next(batches)
    with CountHostReads() as counter:
        train_step(t, views, labels, 1.0)
    assert not counter.reads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peers": 2}, "--peers is 2; dlb is defined for at most 1"),
        ({"topology": "branches"}, "dlb works on networks only"),
        ({"accumulate": 2}, "--accumulate: dlb sees the images of the step before whole"),
        ({"execution": "stacked"}, "one peer cannot be stacked"),
        ({"method": DLBConfig(divergence="dkd"), "mixup": 0.2}, "dkd reads one hard label"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        build(**options)


def test_a_mesh_is_refused(monkeypatch):
    t = build()
    from codistill.training.build import check_previous_can_be_kept

    t.mesh.world = 2
    with pytest.raises(InputError, match="--mesh: dlb sees the images of the step before again, in one process"):
        check_previous_can_be_kept(t.config, t.method, t.mesh)
