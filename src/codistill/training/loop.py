"""The training loop: `train` runs a config in its run folder, `fit` trains what is built.

An epoch is `run_epoch`, whose steps are `train_step` (codistill.training.step), and `end_epoch`. On several ranks every
rank runs this code; files are written by the main rank alone.
Shapes: P peers, V views, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from codistill.config import Config, learning_rate_at
from codistill.data import ImageSet, Loader, sample_checksum
from codistill.distributed import init_mesh, resume_after_restart
from codistill.evaluation import evaluate_peers
from codistill.peers import Peers
from codistill.runs import CheckpointState, EpochLine, RunFolder, Tracker, find_tracker
from codistill.training.averaging import recompute_statistics
from codistill.training.build import build_run
from codistill.training.early_ends import (
    check_finite,
    checkpoint_on_missing_images,
    describe_out_of_memory,
    save_checkpoint,
)
from codistill.training.load import load_run
from codistill.training.loaders import curve_loader, test_loader
from codistill.training.optim import set_learning_rate
from codistill.training.reporter import Reporter
from codistill.training.run import Run, zero_sums
from codistill.training.state import restore_state
from codistill.training.step import forward_all, is_per_sample, train_step
from codistill.training.student import deployed_network
from codistill.training.summary import (
    MAX_CLASSES_IN_DETAIL,
    collect_details,
    describe_run,
    evaluate_run,
    holdout_outputs,
    measure_cost,
    run_result,
)
from codistill.training.trained_images import TrainedImages
from codistill.utils import (
    InputError,
    MachineError,
    OtherRankFailedError,
    SignalReceived,
    Stopped,
    StoppedEarly,
    catch_signals,
    keep_freed_memory,
    out_of_memory,
    peak_megabytes,
    pick_device,
    raise_on_signals,
    release_kept_memory,
    reset_peak_memory,
)


@dataclass(repr=False)
class Result:
    """A finished run."""

    folder: Path
    figures: dict[str, Any]
    """The content of result.json."""
    training: Run

    def __repr__(self) -> str:
        """Return the folder, what is deployed and its accuracy, on one line."""
        figures = self.figures
        return f"Result({str(self.folder)!r}, {figures['deployed']}: {figures['student']['top1']:.2f} % test top-1)"

    @property
    def peers(self) -> Peers:
        """All members after training (on a mesh: those of this rank)."""
        return self.training.peers

    @property
    def student(self) -> nn.Module:
        """The one plain network that is deployed; on a mesh it is read from the run folder."""
        return deployed_network(self.training if self.training.mesh.world == 1 else load_run(self.folder))


def train(
    config: Config, reporter: Reporter | None = None, teacher: nn.Module | None = None, data: ImageSet | None = None
) -> Result:
    """Train one run in its folder and evaluate it on the test set once, at the end.

    On a CPU with glibc this process keeps the memory it frees until training ends (see `utils.cpu_memory`).

    Args:
        config: What to train.
        reporter: Called as training advances; default silent.
        teacher: A trained network, for kd; default the one its config names.
        data: Images from Python (`ImageSet.from_dataset`); default those that the config names.

    Returns:
        The peers after training, the deployed student, and the figures that result.json holds.

    Raises:
        InputError: the config or the data cannot be used, or another process uses the run folder.
        MachineError: the loss became non-finite, the disk is full, or memory ran out.
        Stopped: a signal ended the run; its newest checkpoint, if there is one yet, is complete.

    >>> config = Config("dml", "resnet8", "digits", peers=2, train_per_class=5, epochs=1, batch_size=25)
    >>> result = train(config)
    >>> result.figures["deployed"], type(result.student).__name__
    ('member 0', 'ResNet')
    """
    config = config if data is None else dataclasses.replace(config, data=data.name)
    config = resume_after_restart(config.resolved())
    find_tracker(config.tracker)
    try:
        with raise_on_signals():  # in set-up and evaluation; in the epochs `fit` records them
            return _train(config, reporter, teacher, data)
    except SignalReceived as received:
        folder = config.out if config.resume in (None, "auto") else config.resume
        kept = (Path(str(folder)) / "last.pt").exists()
        raise (Stopped if kept else StoppedEarly)(str(received)) from None


def _train(config: Config, reporter: Reporter | None, teacher: nn.Module | None, data: ImageSet | None) -> Result:
    """Train a resolved config; see `train`."""
    mesh = init_mesh(config, pick_device(config.device))
    with ExitStack() as stack:
        if mesh.device.type == "cpu" and keep_freed_memory():
            stack.callback(release_kept_memory)
        stack.enter_context(mesh.report_failures())
        folder = mesh.run_on_main_rank(lambda: RunFolder(config))
        mesh.run_on_main_rank(lambda: stack.enter_context(folder.lock()))
        state = mesh.run_on_main_rank(lambda: load_checkpoint_or_none(folder))
        data_info = mesh.run_on_main_rank(lambda: folder.read_data_info())
        build = partial(
            build_run,
            config,
            teacher,
            execution=None if state is None else state.get("execution", "loop"),
            mesh=mesh,
            load_weights=state is None,
            data=data,
            data_info=data_info,
        )
        run = mesh.run_on_all_ranks(build)
        _check_data_agree(run)
        reporter = Reporter() if reporter is None or mesh.rank else reporter
        return run_training(run, state, folder, reporter)


def _check_data_agree(run: Run) -> None:
    """Compare the images of all ranks.

    Raises:
        InputError: a rank has other images than the first one.
    """
    if run.mesh.world == 1:
        return
    checksums = run.mesh.all_gather_object((run.data.checksum(), sample_checksum(run.data)))
    others = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if others and run.mesh.rank:
        raise OtherRankFailedError(2)
    if others:
        raise InputError(
            f"--data {run.config.data}: rank {', '.join(map(str, others))} has other images than rank 0; give all "
            "ranks the same files"
        )


def load_checkpoint_or_none(folder: RunFolder) -> CheckpointState | None:
    """Return the newest good checkpoint, None where there is none yet.

    Raises:
        InputError: the run is complete, and its last weights are gone.
    """
    state = folder.load()
    if folder.complete and (state is None or state["epoch"] < folder.config.epochs):
        raise InputError(
            f"--resume: {folder.path} is complete, but the checkpoint of its last epoch is gone or damaged; put it "
            "back, or train again in another --out (its figures are in result.json)"
        )
    return state


def run_training(run: Run, state: CheckpointState | None, folder: RunFolder, reporter: Reporter) -> Result:
    """Train a built run to its end, from the checkpoint `state` if there is one, and write its result."""
    mesh = run.mesh
    complete = mesh.run_on_main_rank(lambda: folder.complete)
    if state is not None:
        mesh.run_on_all_ranks(lambda: restore_state(run, state))
    trained_images = TrainedImages(run, folder)
    notes = describe_run(run, None if state is None else state["file"])
    if not complete:
        mesh.run_on_main_rank(lambda: write_metadata(run, folder, trained_images))
    tracker = Tracker(run.config.tracker if mesh.rank == 0 else "none", run.config, run.progress.epoch)
    reporter.begin(notes, run.config.epochs, len(run.loader), run.progress.epoch)
    if not complete:
        reset_peak_memory(run.device)
        try:
            fit(run, folder, reporter, tracker)
            figures, details = evaluate_test_set(run)
            mesh.run_on_main_rank(trained_images.finish)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error) is None:
                raise
            raise describe_out_of_memory(run, folder, error) from error
        finally:
            trained_images.stop()
        mesh.run_on_main_rank(lambda: folder.write_result(figures, details))
    tracker.close()
    figures = mesh.run_on_main_rank(folder.read_result)
    if figures is None:
        raise MachineError(f"{folder.path / 'result.json'} was deleted while the run ended; run the command again")
    reporter.end(figures)
    return Result(folder.path, {**figures}, run)


def write_metadata(run: Run, folder: RunFolder, trained_images: TrainedImages) -> None:
    """Write the files on config, machine and data where they are missing; drop metrics that will be redone."""
    folder.write_metadata()
    folder.write_data_info(run.data.metadata())
    trained_images.begin()
    folder.truncate_metrics(run.progress.epoch)


def fit(run: Run, folder: RunFolder, reporter: Reporter, tracker: Tracker) -> None:
    """Train from `run.progress` to the last epoch; checkpoints and metrics go to `folder`.

    Raises:
        Stopped: a signal ended the run; the checkpoint is written.
        MachineError: the loss became infinite or NaN; the checkpoint holds the weights before that step.
    """
    config, progress, curve = run.config, run.progress, curve_loader(run)
    run.guard.steps_before = run.steps_done
    with catch_signals() as caught:
        while progress.epoch < config.epochs:
            if progress.step == 0:
                progress.sums = zero_sums(run)
            with checkpoint_on_missing_images(run, folder):
                run_epoch(run, folder, reporter, caught)
                line = end_epoch(run, curve)
            is_best = progress.best_validation is not None and progress.best_validation["epoch"] == progress.epoch
            run.mesh.run_on_main_rank(partial(folder.append_metrics, line))
            tracker.log(line)
            reporter.epoch(line)
            progress.epoch, progress.step = progress.epoch + 1, 0
            stop = run.mesh.first_signal(caught)
            is_last = progress.epoch == config.epochs
            due = progress.epoch % config.checkpoint_every_epochs == 0 or is_last or stop is not None
            save_checkpoint(run, folder, last=due, best=is_best)
            if stop and not is_last:
                raise Stopped(stop)


def run_epoch(run: Run, folder: RunFolder, reporter: Reporter, caught: list[str]) -> None:
    """Do the remaining steps of an epoch.

    Args:
        run: What is trained.
        folder: Where checkpoints go.
        reporter: Called every `log_every_steps`.
        caught: Signals that this process has caught.
    """
    config, progress, num_steps = run.config, run.progress, len(run.loader)
    started, seconds_before = time.perf_counter(), progress.seconds
    weight = run.method.weight_at(progress.epoch)
    run.peers.train()
    run.method.train()
    for module in run.frozen:
        module.eval()  # neither their running statistics nor dropout change
    for views_VBCHW, targets_B in run.loader.epoch(progress.epoch, progress.step):
        rate = learning_rate_at(config, progress.epoch, progress.step, num_steps)
        for optimizer in run.optimizers:
            set_learning_rate(optimizer, rate)
        train_step(run, views_VBCHW, targets_B, weight)
        progress.step += 1
        is_last = progress.step == num_steps
        due = bool(config.checkpoint_every_steps and progress.step % config.checkpoint_every_steps == 0)
        log = is_last or due or progress.step % config.log_every_steps == 0
        # Several ranks exchange their signals only where the host waits anyway.
        stop = run.mesh.first_signal(caught) if log or run.mesh.world == 1 else None
        if log or stop:
            check_finite(run, folder)
            loss = run.add_over_ranks(progress.sums["loss"]).item()
            reporter.step(progress.epoch, progress.step, loss / (progress.step * config.batch_size))
        progress.seconds = seconds_before + time.perf_counter() - started
        if (due or stop) and not is_last:
            save_checkpoint(run, folder)
        if stop and not is_last:
            raise Stopped(stop)


def end_epoch(run: Run, curve: Loader | None) -> EpochLine:
    """Return the epoch's line of metrics.jsonl: schedule, training figures, and the evaluation on `curve` if due."""
    config, progress = run.config, run.progress
    run.mesh.sync_buffers(run.modules_with_buffers, run.method)
    if "holdout" in run.method.needs:
        run.method.update_on_holdout(*holdout_outputs(run))
        run.guard.snapshot()  # the method's new state is a good one
    if recompute_statistics(run):
        run.guard.snapshot()
    sums = {name: run.add_over_ranks(value) for name, value in progress.sums.items()}
    count = max(run.loader.num_samples - int(sums.pop("skipped", 0)), 1)
    line: dict[str, Any] = {
        "epoch": progress.epoch,
        "lr": learning_rate_at(config, progress.epoch),
        "weight": run.method.weight * run.method.weight_at(progress.epoch),
        "train": {
            "loss": sums["loss"].item() / count,
            "top1": (sums["hits_P"] * 100 / count).tolist(),
            "distill": (sums["distill_P"] / count).tolist(),
        },
    }
    if run.guard.limit:
        line["skipped_steps"] = int(run.guard.skipped)
    method_means = {n.rpartition("_")[0]: (total / count).tolist() for n, total in sums.items() if is_per_sample(n)}
    if method_means:
        line["method"] = method_means
    due = (progress.epoch + 1) % config.eval_every_epochs == 0 or progress.epoch + 1 == config.epochs
    if curve is not None and due:
        line |= evaluate_curve(run, curve)
    return cast(EpochLine, line)


def evaluate_curve(run: Run, curve: Loader) -> dict[str, Any]:
    """Evaluate the run during training: the part of the epoch's line; the best epoch is kept in `run.progress`."""
    progress, part = run.progress, "test" if run.config.protocol == "paper" else "val"
    figures = evaluate_run(run, curve)
    line = {part: figures["members"], f"{part}_student": figures["student"]}
    key = run.config.average_key
    if figures[key] is not None:
        line[f"{part}_{key}"] = figures[key]
    best = progress.best if part == "test" else progress.best_validation
    if best is None or figures["student"]["top1"] > best["top1"]:  # of equal ones the first
        best = figures["student"] | {"epoch": progress.epoch}
        progress.best, progress.best_validation = (best, None) if part == "test" else (None, best)
    return line


def evaluate_test_set(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate on the test set; return the contents of result.json and of details.json."""
    memory = peak_megabytes(run.device)
    loader, detail = test_loader(run), len(run.data.classes) <= MAX_CLASSES_IN_DETAIL
    members = evaluate_peers(run.peers, run.method, loader, run.mesh, detail=detail)
    average, averages = run.evaluated_average, None
    if average is not None:
        averages = evaluate_peers(average.peers, run.method, loader, run.mesh, detail=detail)
    figures = run_result(run, members.compute(), None if averages is None else averages.compute())
    figures["cost"] = {"training_peak_mb": memory, **measure_cost(run, partial(forward_all, run))}
    return figures, collect_details(run, members, averages)
