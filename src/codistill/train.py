"""One visible loop: views -> peers -> method -> backward -> step -> method.after_step -> metrics.

`fit` trains, `validate` measures, `train` does it all in a run folder.
Shapes: P peers, V views, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill import FunctionModule
from codistill.config import Config, InputError, MachineError
from codistill.cost import forget_peak, peak_megabytes
from codistill.data import ImageSet, Loader
from codistill.errors import ElsewhereError, UnreadableError
from codistill.losses import wide_dtype
from codistill.mesh import Mesh, after_restart, join_mesh
from codistill.methods import Method
from codistill.mixing import mix_batch, wants_soft_labels
from codistill.outcome import MOST_CLASSES_IN_DETAIL, collect, cost, details, holdout_outputs, outcome
from codistill.peers import PeerOutputs, Peers
from codistill.reporting import Reporter, describe
from codistill.run import RunFolder, SilentFolder, write_json
from codistill.setup import (
    Training,
    curve_loader,
    deployed_figures,
    deployed_network,
    load_run,
    pick_device,
    setup,
    test_loader,
)
from codistill.signals import Stopped, caught_signals
from codistill.trackers import Tracker
from codistill.tuning import lr_at, set_rate

sys.modules[__name__].__class__ = FunctionModule


@dataclass
class Result:
    """A finished run."""

    folder: Path
    figures: dict[str, Any]
    """What result.json holds."""
    training: Training

    @property
    def peers(self) -> Peers:
        """All members, as they ended (on a mesh: those of this rank)."""
        return self.training.peers

    @property
    def student(self) -> nn.Module:
        """The one plain network that is deployed; on a mesh it is read from the run folder."""
        return deployed_network(self.training if self.training.mesh is None else load_run(self.folder))


def train_step(t: Training, views_VBCHW: Tensor, targets_B: Tensor, weight: float) -> dict[str, Tensor]:
    """Do one step and return the method's terms; the host waits for nothing here."""
    count, number = len(targets_B), t.epoch * len(t.loader) + t.step
    if t.mesh is not None:
        t.mesh.open(count, number)
        count = t.mesh.counted(t.method.whole_batch)
        targets_B = targets_B if t.method.whole_batch else targets_B[t.mesh.own_rows()]
    labels_B = targets_B
    if wants_soft_labels(t.config):
        views_VBCHW, targets_B = mix_batch(t.config, t.peers.num_classes, views_VBCHW, labels_B, t.epoch, t.step)
    if t.method.update == "alternating":
        terms, hits_P = _alternate(t, views_VBCHW, targets_B, labels_B, weight)
    else:
        outputs = _outputs(t, views_VBCHW)
        terms = t.method(outputs, targets_B, weight)
        _backward(t, terms["loss"], t.optimizers[0])
        _update(t, t.optimizers[0], terms)
        hits_P = (outputs.logits_PBC.detach().argmax(-1) == labels_B).sum(-1)
    t.guard.count()
    if t.ema is not None:
        t.ema.update(t.peers, number)
    if count:  # on a mesh, samples that other ranks count too are counted by one of them
        t.sums["loss"] += terms["loss"].detach().to(t.sums["loss"].dtype) * count
        t.sums["hits_P"] += hits_P
        t.sums["distill_P"] += terms["distill_P"].to(t.sums["loss"].dtype) * count
    for name in filter(_of_samples, terms):  # every rank keeps the sum, so that all can be added up
        total = terms[name].sum(0, dtype=t.sums["loss"].dtype)
        t.sums[name] = t.sums.get(name, torch.zeros_like(total)) + total * bool(count)
    return terms


def _of_samples(name: str) -> bool:
    """Say whether a term holds a row a sample (its letters begin with B): a method's attention, gate or weights."""
    return name.rpartition("_")[2].startswith("B")


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


def _backward(t: Training, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Find the gradients of what `optimizer` holds; on a mesh, those of the whole batch."""
    if t.mesh is None:
        loss.backward()
        return
    (loss * t.mesh.weight(t.method.whole_batch)).backward()
    if t.method.whole_batch:  # every rank's loss is of the whole batch, so each has found the whole already
        for parameter in t.method.parameters():
            if parameter.grad is not None:
                parameter.grad /= t.mesh.num_data
    t.mesh.sum_gradients([p for group in optimizer.param_groups for p in group["params"]])


def _update(t: Training, optimizer: torch.optim.Optimizer | None, terms: dict[str, Tensor]) -> None:
    t.guard.watch(terms)
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _alternate(
    t: Training, views_VBCHW: Tensor, targets_B: Tensor, labels_B: Tensor, weight: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Step one member after the other, each on fresh predictions of all; its figures are those of its turn."""
    turns, hits = [], []
    for p in range(t.peers.num_peers):
        optimizer = _optimizer_of(t, p)
        outputs = _outputs(t, views_VBCHW, only=p)
        terms = t.method(outputs, targets_B, weight)
        if optimizer is not None:
            _backward(t, terms["loss_P"][p], optimizer)
        _update(t, optimizer, terms)
        turns.append((terms["loss_P"][p].detach(), terms["distill_P"][p]))
        hits.append((outputs.logits_PBC[p].detach().argmax(-1) == labels_B).sum())
    loss_P, distill_P = (torch.stack(values) for values in zip(*turns))
    return {"loss": loss_P.sum(), "distill_P": distill_P}, torch.stack(hits)


def _optimizer_of(t: Training, member: int) -> torch.optim.Optimizer | None:
    """Return the optimiser of a member; None where the member lives on another rank."""
    own = range(len(t.optimizers)) if t.mesh is None else t.mesh.own
    return t.optimizers[member - own.start] if member in own else None


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
                t.sums = _zero_sums(t)
            with _kept(t, folder):
                _run_epoch(t, folder, reporter, caught)
                line = _close_epoch(t, curve)
            folder.log(line)
            tracker.log(line)
            reporter.epoch(line)
            t.epoch, t.step = t.epoch + 1, 0
            stop = _stop_asked(t, caught)
            if t.epoch % t.config.checkpoint_every_epochs == 0 or t.epoch == t.config.epochs or stop:
                _save(t, folder)
            if stop and t.epoch < t.config.epochs:
                raise Stopped(stop)


def _stop_asked(t: Training, caught: list[str]) -> str | None:
    """Return the name of the signal that asks for an end; on a mesh the host waits for all ranks' answer."""
    if t.mesh is not None:
        return t.mesh.first_signal(caught)
    return caught[0] if caught else None


def _save(t: Training, folder: RunFolder) -> None:
    """Write a checkpoint; on a mesh all ranks go on once it is written."""
    state = t.state()
    if t.mesh is None:
        folder.save(state or {})
    else:
        t.mesh.on_first(lambda: folder.save(state or {}))


@contextmanager
def _kept(t: Training, folder: RunFolder) -> Iterator[None]:
    """Where an image file cannot be read, write a checkpoint of the steps before it (on a mesh only one rank knows)."""
    try:
        yield
    except UnreadableError as error:
        if t.mesh is None:
            _look(t, folder)
            _save(t, folder)
        raise InputError(
            f"{str(error).removesuffix('; mend or remove it')}; mend it, or let others stand in for such files with "
            f"--skip-corrupt, and go on from {folder.checkpoint_path} with --resume auto"
        ) from None


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
        due = bool(config.checkpoint_every_steps and t.step % config.checkpoint_every_steps == 0)
        look = last or due or t.step % config.log_every_steps == 0
        # On a mesh ranks hear of each other's signals only where they look.
        stop = _stop_asked(t, caught) if look or t.mesh is None else None
        if look or stop:
            _look(t, folder)
            reporter.step(t.epoch, t.step, _sums(t)["loss"].item() / (t.step * config.batch_size))
        t.seconds = before + time.perf_counter() - began
        if (due or stop) and not last:
            _save(t, folder)
        if stop and not last:
            raise Stopped(stop)


def _sums(t: Training) -> dict[str, Tensor]:
    """Return the epoch's sums, over all ranks."""
    return t.sums if t.mesh is None else {name: t.mesh.sum_along_data(value) for name, value in t.sums.items()}


def _look(t: Training, folder: RunFolder) -> None:
    """Read the guard's flag: this waits for the device."""
    bad = t.guard.look()
    if bad is None:
        return
    steps_done, terms = bad
    t.epoch, t.step = divmod(steps_done, len(t.loader))
    _save(t, folder)
    if t.mesh is not None and t.mesh.rank:
        raise ElsewhereError(1)
    values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    raise MachineError(
        f"the loss stopped being finite at epoch {t.epoch}, step {t.step} ({values}); the weights before it are kept "
        f"in {folder.checkpoint_path}; lower --lr (now {lr_at(t.config, t.epoch):g}) or add --warmup-epochs"
    )


def _zero_sums(t: Training) -> dict[str, Tensor]:
    """Return the sums with which an epoch begins."""
    zeros = torch.zeros(t.peers.num_peers, dtype=wide_dtype(t.device), device=t.device)
    return {"loss": zeros.sum(), "hits_P": zeros.clone(), "distill_P": zeros.clone()}


def _close_epoch(t: Training, curve: Loader | None) -> dict[str, Any]:
    """Return the epoch's line: schedule, training figures, and the curve's set where it is due."""
    if t.mesh is not None:
        t.mesh.align([t.peers, *([t.ema] if t.ema else [])], t.method)
    if "holdout" in t.method.needs:
        t.method.after_epoch(*holdout_outputs(t))
    count, sums = t.loader.num_samples, _sums(t)
    line: dict[str, Any] = {
        "epoch": t.epoch,
        "lr": lr_at(t.config, t.epoch),
        "weight": t.method.weight * t.method.weight_at(t.epoch),
        "train": {
            "loss": sums["loss"].item() / count,
            "top1": (sums["hits_P"] * 100 / count).tolist(),
            "distill": (sums["distill_P"] / count).tolist(),
        },
    }
    if t.loader.skipped:
        line["skipped_files"] = len(t.loader.skipped)
    inspected = {name: total for name, total in sums.items() if _of_samples(name)}
    if inspected:  # means over the epoch's samples
        line["method"] = {name.rpartition("_")[0]: (total / count).tolist() for name, total in inspected.items()}
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


def validate(peers: Peers, method: Method, loader: Loader, mesh: Mesh | None = None) -> dict[str, Any]:
    """Measure every member and the method's ensemble on a set; on a mesh, each rank on its part of it."""
    return collect(peers, method, loader, mesh).compute()


def measure(t: Training, loader: Loader) -> dict[str, Any]:
    """Return the figures of the `members`, of their mean teachers (`ema`, else None) and of the deployed `student`."""
    members = validate(t.peers, t.method, loader, t.mesh)
    ema = validate(t.ema.peers, t.method, loader, t.mesh) if t.ema is not None else None
    return {"members": members, "ema": ema, "student": deployed_figures(t, members, ema)}


def train(
    config: Config, reporter: Reporter | None = None, teacher: nn.Module | None = None, data: ImageSet | None = None
) -> Result:
    """Train one run in its folder and read the test set once, at the end.

    Args:
        config: What to train.
        reporter: Told of the progress; default silent.
        teacher: A trained network, for kd; default the one its config names.
        data: Images from Python (`ImageSet.from_dataset`); default those that the config names.

    Returns:
        The peers as they ended, the deployed student, and the figures that result.json holds.

    Raises:
        InputError: the config or the data cannot be used.
        MachineError: the loss became non-finite, or the disk is full.
        Stopped: a signal ended the run after a checkpoint.

    >>> result = train(Config("okddip", "resnet8", "digits", epochs=60))   # doctest: +SKIP
    """
    config = config if data is None else dataclasses.replace(config, data=data.name)
    reporter, config = reporter or Reporter(), after_restart(config.resolved())
    mesh = join_mesh(config, pick_device(config.device))
    if mesh is None:
        folder = RunFolder(config)
        state = folder.load()
        execution, held = None if state is None else state.get("execution"), folder.read("data.json")
        t = setup(config, teacher, execution, fresh=state is None, data=data, held=held)
        return _train(t, state, folder, reporter)
    with mesh.watched():
        folder = mesh.on_first(lambda: RunFolder(config))
        state = mesh.on_first(folder.load)
        held = mesh.on_first(lambda: folder.read("data.json"))
        t = mesh.together(lambda: setup(config, teacher, mesh=mesh, fresh=state is None, data=data, held=held))
        if mesh.rank:
            folder, reporter = SilentFolder(config), Reporter()
        return _train(t, state, folder, reporter)


def _train(t: Training, state: dict[str, Any] | None, folder: RunFolder, reporter: Reporter) -> Result:
    """Train what is built, from `state` on if there is one."""
    first, on_first = t.mesh is None or t.mesh.rank == 0, _call if t.mesh is None else t.mesh.on_first
    complete = on_first(lambda: folder.complete)
    if state is not None:
        t.load_state(state) if t.mesh is None else t.mesh.together(lambda: t.load_state(state))
    on_first(lambda: (folder.begin(), folder.describe(t.data.about()), folder.keep_lines(t.epoch)))
    tracker = Tracker(t.config.tracker if first else "none", t.config)
    notes = describe(t, resumed=state is not None)
    reporter.begin(notes, t.config.epochs, len(t.loader), t.epoch)
    if not complete:
        forget_peak(t.device)
        fit(t, folder, reporter, tracker)
        figures, drawn = _finish(t)
        on_first(lambda: write_json(folder.path / "details.json", drawn))
        on_first(lambda: write_json(folder.path / "result.json", figures))  # last: it says that the run is complete
    tracker.close()
    figures = on_first(lambda: folder.read("result.json"))
    reporter.end(figures)
    return Result(folder.path, figures, t)


def _call(what: Callable[[], Any]) -> Any:
    return what()


def _finish(t: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the test set and return the run's figures, and the details that a report draws."""
    memory = peak_megabytes(t.device)
    loader, detail = test_loader(t), len(t.data.classes) <= MOST_CLASSES_IN_DETAIL
    members = collect(t.peers, t.method, loader, t.mesh, detail)
    ema = collect(t.ema.peers, t.method, loader, t.mesh, detail) if t.ema is not None else None
    figures = outcome(t, members.compute(), ema.compute() if ema is not None else None)
    figures["cost"] = {"training_peak_mb": memory, **cost(t, partial(_outputs, t))}
    return figures, details(t, members, ema)
