"""One visible loop: views -> peers -> method -> backward -> step -> method.after_step -> metrics.

`fit` trains, `validate` measures, `train` does it all in a run folder.
Shapes: P peers, V views, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.data import ImageSet, Loader
from codistill.distributed.launch import after_restart, join_mesh
from codistill.evaluation.evaluate import collect, validate
from codistill.peers.base import Peers
from codistill.runs.run_folder import RunFolder, SilentFolder
from codistill.runs.trackers import Tracker
from codistill.training.build import load_run, setup
from codistill.training.loaders import curve_loader, test_loader
from codistill.training.optim import lr_at, set_rate
from codistill.training.reporter import Reporter
from codistill.training.run import Training
from codistill.training.step import of_samples, outputs_of, train_step
from codistill.training.student import deployed_figures, deployed_network
from codistill.training.summary import MOST_CLASSES_IN_DETAIL, cost, describe, details, holdout_outputs, outcome
from codistill.utils.cpu_memory import keep_freed_memory, release_kept_memory
from codistill.utils.device import forget_peak, peak_megabytes, pick_device, wide_dtype
from codistill.utils.errors import ElsewhereError, InputError, MachineError, UnreadableError
from codistill.utils.failures import out_of_memory
from codistill.utils.files import write_json
from codistill.utils.signals import Stopped, caught_signals


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
            better = t.best_validation is not None and t.best_validation["epoch"] == t.epoch
            folder.log(line)
            tracker.log(line)
            reporter.epoch(line)
            t.epoch, t.step = t.epoch + 1, 0
            stop = _stop_asked(t, caught)
            due = t.epoch % t.config.checkpoint_every_epochs == 0 or t.epoch == t.config.epochs or stop is not None
            _save(t, folder, due, better)
            if stop and t.epoch < t.config.epochs:
                raise Stopped(stop)


def _stop_asked(t: Training, caught: list[str]) -> str | None:
    """Return the name of the signal that asks for an end; on a mesh the host waits for all ranks' answer."""
    if t.mesh is not None:
        return t.mesh.first_signal(caught)
    return caught[0] if caught else None


def _save(t: Training, folder: RunFolder, due: bool = True, best: bool = False) -> None:
    """Write a checkpoint where it is `due`, and the `best` one first; on a mesh all ranks go on once it is written."""
    if not (due or best):
        return
    state = t.state() or {}
    write = lambda: (folder.save_best(state) if best else None, folder.save(state) if due else None)  # noqa: E731
    _call(write) if t.mesh is None else t.mesh.on_first(write)


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
        f"in {folder.checkpoint_path}; lower --lr (now {lr_at(t.config, t.epoch):g}) or add --warmup-epochs, or pass "
        "over such steps with --skip-nonfinite N --resume auto"
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
        t.guard.take()  # the method's new numbers are good ones
    sums = dict(_sums(t))
    count = max(t.loader.num_samples - int(sums.pop("skipped", 0)), 1)
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
    if t.guard.limit:
        line["skipped_steps"] = int(t.guard.skipped)
    inspected = {name: total for name, total in sums.items() if of_samples(name)}
    if inspected:  # means over the epoch's samples
        line["method"] = {name.rpartition("_")[0]: (total / count).tolist() for name, total in inspected.items()}
    due = (t.epoch + 1) % t.config.eval_every_epochs == 0 or t.epoch + 1 == t.config.epochs
    if curve is not None and due:
        part = "test" if t.config.protocol == "paper" else "val"
        figures = measure(t, curve)
        line |= {part: figures["members"], f"{part}_student": figures["student"]}
        if figures["ema"] is not None:
            line[f"{part}_ema"] = figures["ema"]
        held = t.best if part == "test" else t.best_validation
        if held is None or figures["student"]["top1"] > held["top1"]:  # of equal ones the first
            best = figures["student"] | {"epoch": t.epoch}
            t.best, t.best_validation = (best, None) if part == "test" else (None, best)
    return line


def measure(t: Training, loader: Loader) -> dict[str, Any]:
    """Return the figures of the `members`, of their mean teachers (`ema`, else None) and of the deployed `student`."""
    members = validate(t.peers, t.method, loader, t.mesh)
    ema = validate(t.ema.peers, t.method, loader, t.mesh) if t.ema is not None else None
    return {"members": members, "ema": ema, "student": deployed_figures(t, members, ema)}


def train(
    config: Config, reporter: Reporter | None = None, teacher: nn.Module | None = None, data: ImageSet | None = None
) -> Result:
    """Train one run in its folder and read the test set once, at the end.

    On a CPU with glibc this process keeps the memory it frees from here on (see `allocator`).

    Args:
        config: What to train.
        reporter: Told of the progress; default silent.
        teacher: A trained network, for kd; default the one its config names.
        data: Images from Python (`ImageSet.from_dataset`); default those that the config names.

    Returns:
        The peers as they ended, the deployed student, and the figures that result.json holds.

    Raises:
        InputError: the config or the data cannot be used, or another process uses the run folder.
        MachineError: the loss became non-finite, the disk is full, or memory ran out.
        Stopped: a signal ended the run after a checkpoint.

    >>> result = train(Config("okddip", "resnet8", "digits", epochs=60))   # doctest: +SKIP
    """
    config = config if data is None else dataclasses.replace(config, data=data.name)
    reporter, config = reporter or Reporter(), after_restart(config.resolved())
    device = pick_device(config.device)
    mesh = join_mesh(config, device)
    with ExitStack() as stack:
        if device.type == "cpu" and keep_freed_memory():
            stack.callback(release_kept_memory)
        if mesh is None:
            folder = RunFolder(config)
            stack.enter_context(folder.held())
            state = _held(folder)
            execution, held = None if state is None else state.get("execution"), folder.read("data.json")
            t = setup(config, teacher, execution, fresh=state is None, data=data, held=held)
            return _train(t, state, folder, reporter)
        stack.enter_context(mesh.watched())
        folder = mesh.on_first(lambda: RunFolder(config))
        mesh.on_first(lambda: stack.enter_context(folder.held()))
        state = mesh.on_first(lambda: _held(folder))
        held = mesh.on_first(lambda: folder.read("data.json"))
        t = mesh.together(lambda: setup(config, teacher, mesh=mesh, fresh=state is None, data=data, held=held))
        if mesh.rank:
            folder, reporter = SilentFolder(config), Reporter()
        return _train(t, state, folder, reporter)


def _held(folder: RunFolder) -> dict[str, Any] | None:
    """Return the newest good checkpoint, None where there is none yet.

    Raises:
        InputError: the run is complete, and its last weights are gone.
    """
    state = folder.load()
    if folder.complete and (state is None or state["epoch"] < folder.config.epochs):
        raise InputError(
            f"--resume: {folder.path} is complete, but the checkpoint of its last epoch is gone or damaged; put it "
            "back, or train anew in another --out (its figures are in result.json)"
        )
    return state


def _train(t: Training, state: dict[str, Any] | None, folder: RunFolder, reporter: Reporter) -> Result:
    """Train what is built, from `state` on if there is one."""
    first, on_first = t.mesh is None or t.mesh.rank == 0, _call if t.mesh is None else t.mesh.on_first
    complete = on_first(lambda: folder.complete)
    if state is not None:
        t.load_state(state) if t.mesh is None else t.mesh.together(lambda: t.load_state(state))
    if not complete:
        on_first(lambda: (folder.begin(), folder.describe(t.data.about()), folder.keep_lines(t.epoch)))
    tracker = Tracker(t.config.tracker if first else "none", t.config)
    notes = describe(t, None if state is None else state["file"])
    reporter.begin(notes, t.config.epochs, len(t.loader), t.epoch)
    if not complete:
        forget_peak(t.device)
        try:
            fit(t, folder, reporter, tracker)
            figures, drawn = _finish(t)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error) is None:
                raise
            raise _no_memory(t, folder, error) from error
        on_first(lambda: write_json(folder.path / "details.json", drawn))
        on_first(lambda: write_json(folder.path / "result.json", figures))  # last: it says that the run is complete
    tracker.close()
    figures = on_first(lambda: folder.read("result.json"))
    reporter.end(figures)
    return Result(folder.path, figures, t)


def _no_memory(t: Training, folder: RunFolder, error: Exception) -> MachineError:
    """Return the sentence for a run that ran out of memory; what it has written is whole."""
    fits = t.config.topology == "networks" and t.execution == "loop" and not t.config.checkpoint_activations
    less = "--checkpoint-activations, which takes less and gives the same" if fits else "room"
    return MachineError(
        f"{out_of_memory(error)} is out of memory at epoch {t.epoch}, step {t.step}; the checkpoints in {folder.path} "
        f"are kept: continue with --resume auto and {less}, or train anew with a lower --batch-size or --peers"
    )


def _call(what: Callable[[], Any]) -> Any:
    return what()


def _finish(t: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the test set and return the run's figures, and the details that a report draws."""
    memory = peak_megabytes(t.device)
    loader, detail = test_loader(t), len(t.data.classes) <= MOST_CLASSES_IN_DETAIL
    members = collect(t.peers, t.method, loader, t.mesh, detail)
    ema = collect(t.ema.peers, t.method, loader, t.mesh, detail) if t.ema is not None else None
    figures = outcome(t, members.compute(), ema.compute() if ema is not None else None)
    figures["cost"] = {"training_peak_mb": memory, **cost(t, partial(outputs_of, t))}
    return figures, details(t, members, ema)
