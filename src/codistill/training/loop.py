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
from typing import Any, cast

import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.data import ImageSet, Loader
from codistill.distributed.launch import init_mesh, resume_after_restart
from codistill.evaluation.evaluate import collect, validate
from codistill.peers.base import Peers
from codistill.runs.records import CheckpointState, EpochLine
from codistill.runs.run_folder import RunFolder, SilentFolder
from codistill.runs.trackers import Tracker
from codistill.training.build import load_run, setup
from codistill.training.loaders import curve_loader, test_loader
from codistill.training.optim import learning_rate_at, set_learning_rate
from codistill.training.reporter import Reporter
from codistill.training.run import Run
from codistill.training.step import of_samples, outputs_of, train_step
from codistill.training.student import deployed_figures, deployed_network
from codistill.training.summary import MOST_CLASSES_IN_DETAIL, cost, describe, details, holdout_outputs, outcome
from codistill.utils.cpu_memory import keep_freed_memory, release_kept_memory
from codistill.utils.device import accumulation_dtype, peak_megabytes, pick_device, reset_peak_memory
from codistill.utils.errors import (
    InputError,
    MachineError,
    OtherRankFailedError,
    Stopped,
    UnreadableError,
    out_of_memory,
)
from codistill.utils.files import write_json
from codistill.utils.signals import catch_signals


@dataclass
class Result:
    """A finished run."""

    folder: Path
    figures: dict[str, Any]
    """What result.json holds."""
    training: Run

    @property
    def peers(self) -> Peers:
        """All members, as they ended (on a mesh: those of this rank)."""
        return self.training.peers

    @property
    def student(self) -> nn.Module:
        """The one plain network that is deployed; on a mesh it is read from the run folder."""
        return deployed_network(self.training if self.training.mesh is None else load_run(self.folder))


def fit(run: Run, folder: RunFolder, reporter: Reporter, tracker: Tracker) -> None:
    """Train from where `run` stands to the last epoch; checkpoints and metrics go to `folder`.

    Raises:
        Stopped: a signal asked for it; the checkpoint is written.
        MachineError: the loss became infinite or NaN; weights before that step are kept in the checkpoint.
    """
    curve = curve_loader(run)
    run.guard.steps_before = run.epoch * len(run.loader) + run.step
    with catch_signals() as caught:
        while run.epoch < run.config.epochs:
            if run.step == 0:
                run.sums = zero_sums(run)
            with _kept(run, folder):
                _run_epoch(run, folder, reporter, caught)
                line = _close_epoch(run, curve)
            better = run.best_validation is not None and run.best_validation["epoch"] == run.epoch
            folder.append_metrics(line)
            tracker.log(line)
            reporter.epoch(line)
            run.epoch, run.step = run.epoch + 1, 0
            stop = _stop_asked(run, caught)
            due = (
                run.epoch % run.config.checkpoint_every_epochs == 0
                or run.epoch == run.config.epochs
                or stop is not None
            )
            _save(run, folder, due, better)
            if stop and run.epoch < run.config.epochs:
                raise Stopped(stop)


def _stop_asked(run: Run, caught: list[str]) -> str | None:
    """Return the name of the signal that asks for an end; on a mesh the host waits for all ranks' answer."""
    if run.mesh is not None:
        return run.mesh.first_signal(caught)
    return caught[0] if caught else None


def _save(run: Run, folder: RunFolder, due: bool = True, best: bool = False) -> None:
    """Write a checkpoint where it is `due`, and the `best` one first; on a mesh all ranks go on once it is written."""
    if not (due or best):
        return
    state = run.state() or {}
    write = lambda: (folder.save_best(state) if best else None, folder.save(state) if due else None)  # noqa: E731
    _call(write) if run.mesh is None else run.mesh.run_on_main_rank(write)


@contextmanager
def _kept(run: Run, folder: RunFolder) -> Iterator[None]:
    """Where an image file cannot be read, write a checkpoint of the steps before it (on a mesh only one rank knows)."""
    try:
        yield
    except UnreadableError as error:
        if run.mesh is None:
            _look(run, folder)
            _save(run, folder)
        raise InputError(
            f"{str(error).removesuffix('; mend or remove it')}; mend it, or let others stand in for such files with "
            f"--skip-corrupt, and go on from {folder.checkpoint_path} with --resume auto"
        ) from None


def _run_epoch(run: Run, folder: RunFolder, reporter: Reporter, caught: list[str]) -> None:
    """Do the rest of an epoch's steps."""
    config, steps = run.config, len(run.loader)
    began, before = time.perf_counter(), run.seconds
    weight = run.method.weight_at(run.epoch)
    run.peers.train()
    run.method.train()
    for module in run.frozen:
        module.eval()  # their running statistics and dropout stand still too
    for views_VBCHW, targets_B in run.loader.epoch(run.epoch, run.step):
        rate = learning_rate_at(config, run.epoch, run.step, steps)
        for optimizer in run.optimizers:
            set_learning_rate(optimizer, rate)
        train_step(run, views_VBCHW, targets_B, weight)
        run.step += 1
        last = run.step == steps
        due = bool(config.checkpoint_every_steps and run.step % config.checkpoint_every_steps == 0)
        look = last or due or run.step % config.log_every_steps == 0
        # On a mesh ranks hear of each other's signals only where they look.
        stop = _stop_asked(run, caught) if look or run.mesh is None else None
        if look or stop:
            _look(run, folder)
            reporter.step(run.epoch, run.step, _sums(run)["loss"].item() / (run.step * config.batch_size))
        run.seconds = before + time.perf_counter() - began
        if (due or stop) and not last:
            _save(run, folder)
        if stop and not last:
            raise Stopped(stop)


def _sums(run: Run) -> dict[str, Tensor]:
    """Return the epoch's sums, over all ranks."""
    return run.sums if run.mesh is None else {name: run.mesh.sum_along_data(value) for name, value in run.sums.items()}


def _look(run: Run, folder: RunFolder) -> None:
    """Read the guard's flag: this waits for the device."""
    bad = run.guard.look()
    if bad is None:
        return
    steps_done, terms = bad
    run.epoch, run.step = divmod(steps_done, len(run.loader))
    _save(run, folder)
    if run.mesh is not None and run.mesh.rank:
        raise OtherRankFailedError(1)
    values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    raise MachineError(
        f"the loss stopped being finite at epoch {run.epoch}, step {run.step} ({values}); the weights before it are "
        f"kept in {folder.checkpoint_path}; lower --lr (now {learning_rate_at(run.config, run.epoch):g}) or add "
        "--warmup-epochs, or pass over such steps with --skip-nonfinite N --resume auto"
    )


def zero_sums(run: Run) -> dict[str, Tensor]:
    """Return the sums with which an epoch begins."""
    zeros = torch.zeros(run.peers.num_peers, dtype=accumulation_dtype(run.device), device=run.device)
    return {"loss": zeros.sum(), "hits_P": zeros.clone(), "distill_P": zeros.clone()}


def _close_epoch(run: Run, curve: Loader | None) -> EpochLine:
    """Return the epoch's line: schedule, training figures, and the curve's set where it is due."""
    if run.mesh is not None:
        run.mesh.align([run.peers, *([run.ema] if run.ema else [])], run.method)
    if "holdout" in run.method.needs:
        run.method.update_on_holdout(*holdout_outputs(run))
        run.guard.take()  # the method's new numbers are good ones
    sums = dict(_sums(run))
    count = max(run.loader.num_samples - int(sums.pop("skipped", 0)), 1)
    line: dict[str, Any] = {
        "epoch": run.epoch,
        "lr": learning_rate_at(run.config, run.epoch),
        "weight": run.method.weight * run.method.weight_at(run.epoch),
        "train": {
            "loss": sums["loss"].item() / count,
            "top1": (sums["hits_P"] * 100 / count).tolist(),
            "distill": (sums["distill_P"] / count).tolist(),
        },
    }
    if run.guard.limit:
        line["skipped_steps"] = int(run.guard.skipped)
    inspected = {name: total for name, total in sums.items() if of_samples(name)}
    if inspected:  # means over the epoch's samples
        line["method"] = {name.rpartition("_")[0]: (total / count).tolist() for name, total in inspected.items()}
    due = (run.epoch + 1) % run.config.eval_every_epochs == 0 or run.epoch + 1 == run.config.epochs
    if curve is not None and due:
        part = "test" if run.config.protocol == "paper" else "val"
        figures = measure(run, curve)
        line |= {part: figures["members"], f"{part}_student": figures["student"]}
        if figures["ema"] is not None:
            line[f"{part}_ema"] = figures["ema"]
        held = run.best if part == "test" else run.best_validation
        if held is None or figures["student"]["top1"] > held["top1"]:  # of equal ones the first
            best = figures["student"] | {"epoch": run.epoch}
            run.best, run.best_validation = (best, None) if part == "test" else (None, best)
    return cast(EpochLine, line)


def measure(run: Run, loader: Loader) -> dict[str, Any]:
    """Return the figures of the `members`, of their mean teachers (`ema`, else None) and of the deployed `student`."""
    members = validate(run.peers, run.method, loader, run.mesh)
    ema = validate(run.ema.peers, run.method, loader, run.mesh) if run.ema is not None else None
    return {"members": members, "ema": ema, "student": deployed_figures(run, members, ema)}


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
    reporter, config = reporter or Reporter(), resume_after_restart(config.resolved())
    device = pick_device(config.device)
    mesh = init_mesh(config, device)
    with ExitStack() as stack:
        if device.type == "cpu" and keep_freed_memory():
            stack.callback(release_kept_memory)
        if mesh is None:
            folder = RunFolder(config)
            stack.enter_context(folder.lock())
            state = _held(folder)
            execution, held = None if state is None else state.get("execution"), folder.read("data.json")
            run = setup(config, teacher, execution, fresh=state is None, data=data, held=held)
            return _train(run, state, folder, reporter)
        stack.enter_context(mesh.watched())
        folder = mesh.run_on_main_rank(lambda: RunFolder(config))
        mesh.run_on_main_rank(lambda: stack.enter_context(folder.lock()))
        state = mesh.run_on_main_rank(lambda: _held(folder))
        held = mesh.run_on_main_rank(lambda: folder.read("data.json"))
        run = mesh.run_on_all_ranks(
            lambda: setup(config, teacher, mesh=mesh, fresh=state is None, data=data, held=held)
        )
        if mesh.rank:
            folder, reporter = SilentFolder(config), Reporter()
        return _train(run, state, folder, reporter)


def _held(folder: RunFolder) -> CheckpointState | None:
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


def _train(run: Run, state: CheckpointState | None, folder: RunFolder, reporter: Reporter) -> Result:
    """Train what is built, from `state` on if there is one."""
    first, run_on_main_rank = (
        run.mesh is None or run.mesh.rank == 0,
        _call if run.mesh is None else run.mesh.run_on_main_rank,
    )
    complete = run_on_main_rank(lambda: folder.complete)
    if state is not None:
        run.load_state(state) if run.mesh is None else run.mesh.run_on_all_ranks(lambda: run.load_state(state))
    if not complete:
        run_on_main_rank(
            lambda: (
                folder.write_metadata(),
                folder.write_data_info(run.data.metadata()),
                folder.truncate_metrics(run.epoch),
            )
        )
    tracker = Tracker(run.config.tracker if first else "none", run.config)
    notes = describe(run, None if state is None else state["file"])
    reporter.begin(notes, run.config.epochs, len(run.loader), run.epoch)
    if not complete:
        reset_peak_memory(run.device)
        try:
            fit(run, folder, reporter, tracker)
            figures, drawn = _finish(run)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error) is None:
                raise
            raise _no_memory(run, folder, error) from error
        run_on_main_rank(lambda: write_json(folder.path / "details.json", drawn))
        run_on_main_rank(
            lambda: write_json(folder.path / "result.json", figures)
        )  # last: it says that the run is complete
    tracker.close()
    figures = run_on_main_rank(lambda: folder.read("result.json"))
    reporter.end(figures)
    return Result(folder.path, figures, run)


def _no_memory(run: Run, folder: RunFolder, error: Exception) -> MachineError:
    """Return the sentence for a run that ran out of memory; what it has written is whole."""
    fits = run.config.topology == "networks" and run.execution == "loop" and not run.config.checkpoint_activations
    less = "--checkpoint-activations, which takes less and gives the same" if fits else "room"
    return MachineError(
        f"{out_of_memory(error)} is out of memory at epoch {run.epoch}, step {run.step}; the checkpoints in "
        f"{folder.path} are kept: continue with --resume auto and {less}, or train anew with a lower --batch-size or "
        "--peers"
    )


def _call(what: Callable[[], Any]) -> Any:
    return what()


def _finish(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the test set and return the run's figures, and the details that a report draws."""
    memory = peak_megabytes(run.device)
    loader, detail = test_loader(run), len(run.data.classes) <= MOST_CLASSES_IN_DETAIL
    members = collect(run.peers, run.method, loader, run.mesh, detail)
    ema = collect(run.ema.peers, run.method, loader, run.mesh, detail) if run.ema is not None else None
    figures = outcome(run, members.compute(), ema.compute() if ema is not None else None)
    figures["cost"] = {"training_peak_mb": memory, **cost(run, partial(outputs_of, run))}
    return figures, details(run, members, ema)
