"""One visible loop: views -> peers -> method -> backward -> step -> method.after_step -> metrics.

`fit` trains, `validate` measures, `train` does it all in a run folder.
Shapes: P peers, V views, B batch, C classes.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import Config, MachineError, MethodConfig
from codistill.data import DeviceLoader
from codistill.folding import folded_for_evaluation
from codistill.losses import wide_dtype
from codistill.methods import Method
from codistill.metrics import PeerMetrics
from codistill.mixing import mix_batch, wants_soft_labels
from codistill.peers import PeerOutputs, Peers, eval_mode
from codistill.run import RunFolder, Tracker, write_json
from codistill.setup import (
    Training,
    count_parameters,
    curve_loader,
    deployed_figures,
    deployed_name,
    deployed_network,
    part_loader,
    setup,
    test_loader,
)
from codistill.signals import Stopped, caught_signals
from codistill.tuning import set_rate


class Reporter:
    """What a run tells its surroundings; this one keeps silent."""

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Hear that the run starts (or goes on) at epoch `start`; `notes` describe it."""

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Hear of a log point: `loss` is the epoch's mean so far."""

    def epoch(self, line: dict[str, Any]) -> None:
        """Hear that an epoch is over; `line` is what metrics.jsonl holds of it."""

    def end(self, result: dict[str, Any]) -> None:
        """Hear that the run is complete."""


@dataclass
class Result:
    """A finished run."""

    folder: Path
    figures: dict[str, Any]
    """What result.json holds."""
    training: Training

    @property
    def peers(self) -> Peers:
        """All members, as they ended."""
        return self.training.peers

    @property
    def student(self) -> nn.Module:
        """The one plain network that is deployed."""
        return deployed_network(self.training)


def lr_at(config: Config, epoch: int, step: int = 0, steps: int = 1) -> float:
    """Return the learning rate of a step of an epoch (both counted from 0): warm-up, then steps or half a cosine."""
    done = epoch + step / steps
    if done < config.warmup_epochs:
        return config.lr * (done + 1 / steps) / (config.warmup_epochs + 1 / steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    return config.lr * 0.1 ** sum(epoch >= m for m in config.milestones or ())


def train_step(t: Training, views_VBCHW: Tensor, targets_B: Tensor, weight: float) -> dict[str, Tensor]:
    """Do one step and return the method's terms; the host waits for nothing here."""
    labels_B = targets_B
    if wants_soft_labels(t.config):
        views_VBCHW, targets_B = mix_batch(t.config, t.peers.num_classes, views_VBCHW, labels_B, t.epoch, t.step)
    if t.method.update == "alternating":
        terms, hits_P = _alternate(t, views_VBCHW, targets_B, labels_B, weight)
    else:
        outputs = _outputs(t, views_VBCHW)
        terms = t.method(outputs, targets_B, weight)
        terms["loss"].backward()
        _update(t, t.optimizers[0], terms)
        hits_P = (outputs.logits_PBC.detach().argmax(-1) == labels_B).sum(-1)
    t.guard.count()
    if t.ema is not None:
        t.ema.update(t.peers, t.epoch * len(t.loader) + t.step)
    t.sums["loss"] += terms["loss"].detach().to(t.sums["loss"].dtype) * len(targets_B)
    t.sums["hits_P"] += hits_P
    t.sums["distill_P"] += terms["distill_P"].to(t.sums["distill_P"].dtype) * len(targets_B)
    return terms


def _outputs(t: Training, views_VBCHW: Tensor, only: int | None = None) -> PeerOutputs:
    """Run the peers, and whatever else the method needs to hear."""
    outputs = t.peers(views_VBCHW) if only is None else t.peers(views_VBCHW, only=only)
    if t.ema is not None:
        outputs.ema_logits_PBC = t.ema(views_VBCHW).logits_PBC
    if t.teacher is not None:
        autocast = t.peers.autocast
        with torch.no_grad(), torch.autocast(t.device.type, autocast, enabled=autocast is not None):
            outputs.teacher_logits_BC = t.teacher(views_VBCHW[0]).to(outputs.logits_PBC.dtype)
    return outputs


def _update(t: Training, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
    t.guard.watch(terms)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _alternate(
    t: Training, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step one member after the other, each on fresh predictions of all; its figures are those of its turn."""
    turns, hits = [], []
    for p, optimizer in enumerate(t.optimizers):
        outputs = _outputs(t, views_VBCHW, only=p)
        terms = t.method(outputs, targets_B, weight)
        terms["loss_P"][p].backward()
        _update(t, optimizer, terms)
        turns.append((terms["loss_P"][p].detach(), terms["distill_P"][p]))
        hits.append((outputs.logits_PBC[p].detach().argmax(-1) == labels_B).sum())
    loss_P, distill_P = (torch.stack(values) for values in zip(*turns))
    return {"loss": loss_P.sum(), "distill_P": distill_P}, torch.stack(hits)


def fit(t: Training, folder: RunFolder, reporter: Reporter, tracker: Tracker) -> None:
    """Train from where `t` stands to the last epoch; checkpoints and metrics go to `folder`.

    Raises:
        Stopped: a signal asked for it; the checkpoint is written.
        MachineError: the loss became infinite or NaN; weights before that step are kept in the checkpoint.
    """
    curve = curve_loader(t)
    t.guard.steps_before = t.epoch * len(t.loader) + t.step
    with caught_signals() as caught:
        while t.epoch < t.config.epochs:
            if t.step == 0:
                t.sums = zero_sums(t)
            _run_epoch(t, folder, reporter, caught)
            line = _close_epoch(t, curve)
            folder.log(line)
            tracker.log(line)
            reporter.epoch(line)
            t.epoch, t.step = t.epoch + 1, 0
            if t.epoch % t.config.checkpoint_every_epochs == 0 or t.epoch == t.config.epochs or caught:
                folder.save(t.state())
            if caught and t.epoch < t.config.epochs:
                raise Stopped(caught[0])


def _run_epoch(t: Training, folder: RunFolder, reporter: Reporter, caught: list[str]) -> None:
    """Do the rest of an epoch's steps."""
    config, steps = t.config, len(t.loader)
    began, before = time.perf_counter(), t.seconds
    weight = t.method.weight_at(t.epoch)
    t.peers.train()
    t.method.train()
    for module in t.frozen:
        module.eval()  # their running statistics and dropout stand still too
    for views_VBCHW, targets_B in t.loader.epoch(t.epoch, t.step):
        rate = lr_at(config, t.epoch, t.step, steps)
        for optimizer in t.optimizers:
            set_rate(optimizer, rate)
        train_step(t, views_VBCHW, targets_B, weight)
        t.step += 1
        last = t.step == steps
        save = bool(caught) or (config.checkpoint_every_steps and t.step % config.checkpoint_every_steps == 0)
        if last or save or t.step % config.log_every_steps == 0:
            _look(t, folder)
            reporter.step(t.epoch, t.step, t.sums["loss"].item() / (t.step * config.batch_size))
        t.seconds = before + time.perf_counter() - began
        if save and not last:
            folder.save(t.state())
        if caught and not last:
            raise Stopped(caught[0])


def _look(t: Training, folder: RunFolder) -> None:
    """Read the guard's flag: this waits for the device."""
    bad = t.guard.look()
    if bad is None:
        return
    steps_done, terms = bad
    t.epoch, t.step = divmod(steps_done, len(t.loader))
    folder.save(t.state())
    values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    raise MachineError(
        f"the loss stopped being finite at epoch {t.epoch}, step {t.step} ({values}); the weights before it are kept "
        f"in {folder.checkpoint_path}; lower --lr (now {lr_at(t.config, t.epoch):g}) or add --warmup-epochs"
    )


def zero_sums(t: Training) -> dict[str, Tensor]:
    """Return the sums with which an epoch begins."""
    zeros = torch.zeros(t.peers.num_peers, dtype=wide_dtype(t.device), device=t.device)
    return {"loss": zeros.sum(), "hits_P": zeros.clone(), "distill_P": zeros.clone()}


def _close_epoch(t: Training, curve: DeviceLoader | None) -> dict[str, Any]:
    """Return the epoch's line: schedule, training figures, and the curve's set where it is due."""
    if "holdout" in t.method.needs:
        t.method.after_epoch(*_holdout_outputs(t))
    count = t.loader.num_samples
    line: dict[str, Any] = {
        "epoch": t.epoch,
        "lr": lr_at(t.config, t.epoch),
        "weight": t.method.weight * t.method.weight_at(t.epoch),
        "train": {
            "loss": t.sums["loss"].item() / count,
            "top1": (t.sums["hits_P"] * 100 / count).tolist(),
            "distill": (t.sums["distill_P"] / count).tolist(),
        },
    }
    due = (t.epoch + 1) % t.config.eval_every_epochs == 0 or t.epoch + 1 == t.config.epochs
    if curve is not None and due:
        part = "test" if t.config.protocol == "paper" else "val"
        figures = measure(t, curve)
        line |= {part: figures["members"], f"{part}_student": figures["student"]}
        if figures["ema"] is not None:
            line[f"{part}_ema"] = figures["ema"]
        if part == "test" and (t.best is None or figures["student"]["top1"] > t.best["top1"]):
            t.best = figures["student"] | {"epoch": t.epoch}
    return line


@torch.inference_mode()
def _holdout_outputs(t: Training) -> tuple[Tensor, Tensor]:
    """Return every member's logits on the holdout, `P x N x C`, in evaluation mode, and the labels."""
    with eval_mode(t.peers):
        batches = [(t.peers(views).logits_PBC, targets) for views, targets in part_loader(t, t.splits.holdout).epoch()]
    logits, targets = zip(*batches)
    return torch.cat(logits, 1), torch.cat(targets)


def validate(peers: Peers, method: Method, loader: DeviceLoader) -> dict[str, Any]:
    """Measure every member and the method's ensemble on a set."""
    metrics = PeerMetrics(peers.num_peers, peers.num_classes, method.group, loader.device)
    with eval_mode(peers), eval_mode(method), torch.inference_mode():
        folded = folded_for_evaluation(peers, loader.first()[0][:2])
        for views_VBCHW, targets_B in loader.epoch():
            outputs = folded(views_VBCHW)
            metrics.update(outputs.logits_PBC, targets_B, method.ensemble(outputs))
    return metrics.compute()


def measure(t: Training, loader: DeviceLoader) -> dict[str, Any]:
    """Return the figures of the `members`, of their mean teachers (`ema`, else None) and of the deployed `student`."""
    members = validate(t.peers, t.method, loader)
    ema = validate(t.ema.peers, t.method, loader) if t.ema is not None else None
    return {"members": members, "ema": ema, "student": deployed_figures(t, members, ema)}


def train(config: Config, reporter: Reporter | None = None, teacher: nn.Module | None = None) -> Result:
    """Train one run in its folder and read the test set once, at the end.

    Args:
        config: What to train.
        reporter: Told of the progress; default silent.
        teacher: A trained network, for kd; default the one its config names.

    Returns:
        The peers as they ended, the deployed student, and the figures that result.json holds.

    Raises:
        InputError: the config or the data cannot be used.
        MachineError: the loss became non-finite, or the disk is full.
        Stopped: a signal ended the run after a checkpoint.

    >>> result = train(Config("okddip", "resnet8", "digits", epochs=60))   # doctest: +SKIP
    """
    reporter = reporter or Reporter()
    config = config.resolved()
    folder = RunFolder(config)
    state = folder.load()
    t = setup(config, teacher, None if state is None else state.get("execution"), fresh=state is None)
    if state is not None:
        t.load_state(state)
    tracker = Tracker(config.tracker, folder.path)
    folder.begin()
    if not (folder.path / "data.json").exists():
        write_json(folder.path / "data.json", t.data.about())
    folder.keep_lines(t.epoch)
    reporter.begin(describe(t, resumed=state is not None), config.epochs, len(t.loader), t.epoch)
    if not folder.complete:
        fit(t, folder, reporter, tracker)
        write_json(folder.path / "result.json", _result(t))
    tracker.close()
    figures = _read_result(folder)
    reporter.end(figures)
    return Result(folder.path, figures, t)


def _read_result(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "result.json").read_text())


def _result(t: Training) -> dict[str, Any]:
    """Read the test set and gather the run's figures."""
    measured = measure(t, test_loader(t))
    figures: dict[str, Any] = {
        "deployed": deployed_name(t),
        "student": measured["student"],
        "protocol": t.config.protocol,
        "epochs": t.config.epochs,
        "test": measured["members"],
        "parameters_trained": count_parameters(t.peers) + count_parameters(t.method),
        "parameters_deployed": count_parameters(deployed_network(t)),
        "split": t.splits.describe(t.data),
        "seconds": round(t.seconds, 3),
        "execution": t.execution,
    }
    if measured["ema"] is not None:
        figures["test_ema"] = measured["ema"]
    if t.best is not None:
        figures["best_test"] = t.best
    return figures


def describe(t: Training, resumed: bool = False) -> list[str]:
    """Say in a few lines what is trained on what; warn where the distillation never reaches its weight."""
    config, method = t.config, t.method
    assert isinstance(config.method, MethodConfig)
    members = f"{t.peers.num_peers} {config.topology}" if t.peers.num_peers > 1 else "1 network"
    trained, deployed = count_parameters(t.peers) + count_parameters(method), count_parameters(deployed_network(t))
    notes = [
        f"{config.method.name}: {members} of {' + '.join(config.model)}, {trained:,} parameters trained; "
        f"deployed: {deployed_name(t)} ({deployed:,})",
        f"{config.data}: {t.splits.describe(t.data)}; augmentation: "
        f"{t.data.describe_augmentation(config.augment, config.cutout)}; protocol {config.protocol}",
        f"{config.epochs} epochs of {len(t.loader)} steps, batch {config.batch_size}, lr {config.lr:g}, "
        f"{config.schedule}{' at ' + ' '.join(map(str, config.milestones)) if config.milestones else ''}; "
        f"{config.dtype} on {t.device}, execution {t.execution}, seed {config.seed}",
    ]
    imbalance = t.data.imbalance(t.splits.train)
    if imbalance is not None:
        notes.append(imbalance)
    if method.ramp_epochs:
        notes.append(f"distillation weight ramps up to {method.weight:g} over {method.ramp_epochs:g} epochs")
        reached = method.weight_at(config.epochs - 1)
        if reached < 0.99:
            warnings.warn(
                f"the distillation weight only reaches {reached:.3g} of its full value in {config.epochs} epochs; "
                "shorten --method.ramp-epochs",
                stacklevel=2,
            )
    if resumed:
        notes.append(f"resumed at epoch {t.epoch}, step {t.step}")
    return notes
