"""The loop: schedules, one plain network bit for bit, resumption, signals, non-finite losses, no host reads."""

import dataclasses
import json
import time
import warnings

import pytest
import torch

from codistill.config.config import Config
from codistill.config.methods import OKDDipConfig
from codistill.config.schedule import learning_rate_at
from codistill.data import DeviceLoader, load_set, make_splits
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.models import resolve
from codistill.peers.members import member_seed
from codistill.runs.run_folder import RunFolder
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.reporter import Reporter
from codistill.training.step import train_step
from codistill.utils.errors import InputError, MachineError, Stopped
from helpers.common import read_json
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, small, tiny


def test_the_rate_falls_when_the_papers_say():
    config = Config(epochs=300).resolved()
    expected = {0: 0.1, 149: 0.1, 150: 0.01, 224: 0.01, 225: 0.001, 299: 0.001}
    for epoch, rate in expected.items():
        assert learning_rate_at(config, epoch) == pytest.approx(rate)
    assert Config(epochs=30).resolved().milestones == (15, 22)
    cosine = Config(epochs=10, schedule="cosine").resolved()
    assert [round(learning_rate_at(cosine, e), 4) for e in (0, 5)] == [0.1, 0.05]
    warm = Config(epochs=10, warmup_epochs=1).resolved()
    rates = [learning_rate_at(warm, 0, s, 4) for s in range(4)] + [learning_rate_at(warm, 1, 0, 4)]
    assert rates == sorted(rates)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0.1)


def test_a_cosine_begins_where_the_warm_up_ends():
    warm = Config(epochs=10, schedule="cosine", warmup_epochs=5).resolved()
    rates = [round(learning_rate_at(warm, e), 4) for e in range(5, 10)]
    assert rates == [0.1, 0.0905, 0.0655, 0.0345, 0.0095]  # 0.05 (1 + cos(pi e / 5))
    assert learning_rate_at(warm, 4, 99, 100) == pytest.approx(0.0998, abs=5e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"warmup_epochs": 3.0}, "warm-up of 3 epochs does not end within the 2 epochs"),
        ({"warmup_epochs": 1.5, "milestones": (1,)}, "warm-up of 1.5 epochs does not end before the milestone 1"),
        ({"warmup_epochs": 1.0, "milestones": (1,)}, "warm-up of 1 epochs does not end before the milestone 1"),
    ],
)
def test_a_warm_up_without_a_peak_is_told(options, said, tmp_path):
    with pytest.warns(UserWarning, match=said):
        train(small(tmp_path / "run", epochs=2, **options))


def test_the_ramp_scales_with_the_run_and_warns_if_it_never_ends(tmp_path):
    assert Config(epochs=300).resolved().method.ramp_epochs == pytest.approx(80)
    assert Config(epochs=30).resolved().method.ramp_epochs == pytest.approx(8)
    config = tiny(out=str(tmp_path / "run"), epochs=1)
    config.method.ramp_epochs = 80.0
    with pytest.warns(UserWarning, match="only reaches 0.00674"):
        train(config)


def test_one_independent_peer_is_a_plain_network_bit_for_bit(tmp_path):
    config = tiny(method="independent", peers=1, out=str(tmp_path / "run"), channels_last=False, epochs=2)
    result = train(config)
    # The same training by hand, with nothing of codistill's peers, methods or loop.
    data = load_set("digits")
    splits = make_splits(data, 0.1, 0.0, 6)
    loader = DeviceLoader(
        data.x_train[splits.train],
        data.y_train[splits.train],
        data.mean,
        data.std,
        LoaderOptions(16, Augmentation(1), channels_last=False),
    )
    torch.manual_seed(member_seed(0, 0))
    network = resolve("resnet8")(num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, 0.0, 5e-4, True, fused=True)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 if epoch < 1 else 0.1 * 0.1**2  # milestones 2 // 2 and 2 * 3 // 4
        for views, targets in loader.epoch(epoch):
            optimizer.zero_grad()
            (-network(views[0]).log_softmax(-1).gather(1, targets[:, None])).mean().backward()
            optimizer.step()
    student = result.student.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(student[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["networks", "branches"])
@pytest.mark.parametrize("place", [(1, 2), (0, 1), (2, 4)])
def test_a_resumed_run_ends_bit_identical(tmp_path, topology, place):
    options = {"topology": topology, "checkpoint_every_steps": 1, "log_every_steps": 1, "cutout": 2}
    method = OKDDipConfig(ablation="random")  # draws from the global random state at every step
    runs = {}
    for name, stop in (("whole", None), ("stopped", place)):
        config = tiny(out=str(tmp_path / name), method=method, **options)
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                train(config, StopAt(*stop))
            torch.manual_seed(123)  # whatever ran in between
            config.resume, config.log_every_steps = "auto", 3  # which changes what is printed alone
        runs[name] = train(config)
    whole, stopped = runs["whole"], runs["stopped"]
    for name, value in whole.peers.state_dict().items():
        assert torch.equal(value, stopped.peers.state_dict()[name]), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in runs]
    assert lines[0] == lines[1]
    assert whole.figures["test"] == stopped.figures["test"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = tiny(out=str(tmp_path / "run"), epochs=1)
    first = train(config)
    config.resume = "auto"
    again = train(config)
    assert again.figures == first.figures


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    config = tiny(out=str(tmp_path / "run"), epochs=1)
    train(config)
    with pytest.raises(InputError, match="holds this run already"):
        train(config)
    with pytest.raises(InputError, match=r"--lr was 0.1, now 0.2"):
        train(dataclasses.replace(config, lr=0.2, resume="auto"))
    with pytest.raises(InputError, match="there is no run there"):
        train(dataclasses.replace(config, resume=str(tmp_path / "nothing")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is no run of codistill"):
        train(dataclasses.replace(config, out=str(tmp_path / "other")))
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


def test_the_saved_config_repeats_the_run(tmp_path):
    config = tiny(out=str(tmp_path / "first"), epochs=2)
    first = train(config)
    again = train(dataclasses.replace(Config.from_file(tmp_path / "first"), out=str(tmp_path / "again")))
    assert first.figures["test"] == again.figures["test"]


def test_the_papers_protocol_keeps_last_and_best_apart(tmp_path):
    result = train(tiny(out=str(tmp_path / "run"), protocol="paper", method="independent", peers=1))
    lines = RunFolder(
        tiny(out=str(tmp_path / "run"), protocol="paper", method="independent", peers=1, resume="auto").resolved()
    ).read_metrics()
    curve = [line["test"]["top1"][0] for line in lines]
    assert result.figures["test"]["top1"][0] == curve[-1]
    assert result.figures["best_test"]["top1"] == max(curve)
    assert "validation" not in result.figures["split"]


def test_the_honest_protocol_reads_the_test_set_only_at_the_end(tmp_path):
    train(tiny(out=str(tmp_path / "run"), epochs=1))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "val" in line
    assert "test" not in line


def test_a_non_finite_loss_stops_the_run_and_keeps_weights(tmp_path):
    config = tiny(out=str(tmp_path / "run"), lr=1e18, log_every_steps=50)
    with pytest.raises(MachineError, match=r"epoch 0, step \d+ \(loss .*lower --lr \(now 1e\+18\)"):
        train(config)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for name, value in state["peers"].items():
        assert value.isfinite().all(), name
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_update_is_masked_from_the_first_bad_step_on():
    t = build_run(tiny().resolved())
    t.progress.sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("hits_P", "distill_P")}
    t.progress.sums["loss"] = torch.zeros((), dtype=torch.float64)
    views, targets = next(t.loader.epoch(0))
    train_step(t, views, targets, 1.0)
    assert t.guard.check_finite() is None
    before = {name: value.clone() for name, value in t.peers.state_dict().items() if "num_batches" not in name}
    train_step(t, torch.full_like(views, float("nan")), targets, 1.0)
    train_step(t, views, targets, 1.0)
    good, terms = t.guard.check_finite()
    assert good == 1
    assert terms["loss"] != terms["loss"]
    for name, value in before.items():
        assert torch.equal(value, t.peers.state_dict()[name]), name


@pytest.mark.parametrize("topology", ["networks", "branches"])
def test_a_step_reads_nothing_from_the_device(topology):
    t = build_run(tiny(topology=topology).resolved())
    t.progress.sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("hits_P", "distill_P")}
    t.progress.sums["loss"] = torch.zeros((), dtype=torch.float64)
    batches = t.loader.epoch(0)
    next(batches)
    with CountHostReads() as counter:
        views, targets = next(batches)
        train_step(t, views, targets, 0.5)
    assert counter.reads == []
    with CountHostReads() as counter:
        t.guard.check_finite()
    assert counter.reads  # the counter does see a read


def test_a_signal_ends_the_run_after_a_checkpoint(tmp_path):
    import os
    import signal

    class Kill(Reporter):
        def step(self, epoch, step, loss):
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    config = tiny(out=str(tmp_path / "run"), log_every_steps=1)
    with pytest.raises(Stopped, match="SIGTERM"):
        train(config, Kill())
    config.resume = "auto"
    resumed = train(config)
    whole = train(tiny(out=str(tmp_path / "whole"), log_every_steps=1))
    assert resumed.figures["test"] == whole.figures["test"]


def test_bfloat16_keeps_weights_and_losses_in_float32(tmp_path):
    t = build_run(tiny(dtype="bfloat16").resolved())
    views, targets = next(t.loader.epoch(0))
    outputs = t.peers(views)
    assert outputs.logits_PBC.dtype == outputs.features[0].dtype == torch.float32
    assert t.method(outputs, targets)["loss"].dtype == torch.float32
    assert next(t.peers.parameters()).dtype == torch.float32
    result = train(tiny(dtype="bfloat16", epochs=1, out=str(tmp_path / "run")))
    assert result.figures["test"]["samples"] == 797


def test_a_run_describes_itself(tmp_path):
    class Keep(Reporter):
        def begin(self, notes, epochs, steps, start):
            self.notes = "\n".join(notes)

    keep = Keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(out=str(tmp_path / "run"), epochs=3), keep)
    for part in ("okddip: 3 networks of resnet8", "60 train / 101 validation / 797 test", "pad 1 and crop", "ramps up"):
        assert part in keep.notes
    about = read_json(tmp_path / "run" / "environment.json")
    assert about["torch"] == str(torch.__version__)
    assert {"command", "git_commit", "cpus", "codistill"} <= about.keys()


def test_tensorboard_gets_the_curves_or_says_how_to_install_it(tmp_path):
    config = tiny(out=str(tmp_path / "run"), epochs=1, tracker="tensorboard")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"codistill\[tensorboard\]"):
            train(config)
    else:
        train(config)
        assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_run_that_begins_again_doubles_no_step_of_tensorboards_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from codistill.runs import Tracker
    from codistill.runs.records import TrainFigures

    for epochs, last in ((3, None), (5, "close")):  # killed before the first checkpoint, and begun again
        tracker = Tracker("tensorboard", tiny(out=str(tmp_path), tracker="tensorboard"), epoch=0)
        for epoch in range(epochs):
            figures: TrainFigures = {"loss": 1.0 + epochs, "top1": [0.0], "distill": [0.0]}
            tracker.log({"epoch": epoch, "lr": 0.1, "weight": 1.0, "train": figures})
        tracker.writer.flush() if last is None else tracker.close()
        time.sleep(1.1)  # the names of event files have seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(e, 6.0) for e in range(5)]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_of_wandbs_shape_hear_every_epoch(kind, tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    heard = []
    fake = SimpleNamespace(
        init=lambda **about: heard.append(about),
        log=lambda figures, step: heard.append((step, figures)),
        finish=lambda: heard.append("end"),
    )
    monkeypatch.setitem(sys.modules, kind, fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tiny(out=str(tmp_path / "run"), epochs=2, tracker=kind))
    about, first, second, end = heard
    assert about["project"] == "codistill"
    assert about.get("mode") == ("offline" if kind == "wandb" else None)
    assert (first[0], second[0], end) == (0, 1, "end")
    assert "val/ensemble_top1" in first[1]
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(InputError, match=rf"pip install 'codistill\[{kind}\]'"):
        train(tiny(out=str(tmp_path / "other"), epochs=1, tracker=kind))


def test_a_methods_own_weights_and_its_details_are_written_down(tmp_path):
    from codistill.config.methods import KDCLConfig
    from codistill.runs import read_epoch_lines

    attention = train(tiny(out=str(tmp_path / "okddip"), epochs=2))
    lines = read_epoch_lines(attention.folder / "metrics.jsonl")
    assert [sum(row) for row in lines[1]["method"]["attention"]] == pytest.approx([1.0, 1.0])
    shares = train(tiny(method=KDCLConfig(target="linear"), peers=2, out=str(tmp_path / "kdcl"), epochs=1))
    assert sum(read_epoch_lines(shares.folder / "metrics.jsonl")[0]["method"]["weights"]) == pytest.approx(1.0)
    details = read_json(attention.folder / "details.json")
    assert sum(map(sum, details["confusion"])) == sum(b["samples"] for b in details["reliability"]) == 797
    hits = sum(details["confusion"][c][c] for c in range(10))
    assert 100 * hits / 797 == pytest.approx(attention.figures["student"]["top1"])


def test_cost_counts_what_a_loop_over_layers_counts(tmp_path):
    from torch import nn

    run = train(tiny(out=str(tmp_path / "run"), epochs=1))
    macs = 0

    def count(module, inputs, output):
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += output[0].numel() * module.in_features

    student = run.student
    for module in student.modules():
        module.register_forward_hook(count)
    student(torch.zeros(1, 1, 8, 8))
    cost = run.figures["cost"]
    assert cost["flops_an_image"] == 2 * macs
    # Forward and both gradients of three networks; the first layer needs no gradient of its input.
    assert 5 * macs * 3 < cost["training_flops_a_sample"] < 6 * macs * 3 * 1.05
    assert cost["samples_seen"] == 60
