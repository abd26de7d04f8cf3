"""What is kept where a run ends early: checkpoints, and the sentences that name them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from codistill.config import learning_rate_at
from codistill.runs import RunFolder
from codistill.training.run import Run
from codistill.training.state import checkpoint_state
from codistill.utils import (
    DecodingError,
    InputError,
    MachineError,
    OtherRankFailedError,
    SignalReceived,
    Stopped,
    UnreadableError,
    out_of_memory,
)


def check_finite(run: Run, folder: RunFolder) -> None:
    """Read the guard's flag (waits for the device); if it is set, write a checkpoint of the good steps and raise.

    Raises:
        MachineError: the loss or a gradient was not finite.
    """
    bad = run.guard.check_finite()
    if bad is None:
        return
    steps_done, terms = bad
    progress = run.progress
    progress.epoch, progress.step = divmod(steps_done, len(run.loader))
    save_checkpoint(run, folder)
    if run.mesh.rank:
        raise OtherRankFailedError(1)
    values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    raise MachineError(
        f"the loss stopped being finite at epoch {progress.epoch}, step {progress.step} ({values}); the weights before "
        f"it are kept in {folder.checkpoint_path}; lower --lr (now {learning_rate_at(run.config, progress.epoch):g}) "
        "or add --warmup-epochs, or skip such steps with --skip-nonfinite N --resume auto"
    )


def save_checkpoint(run: Run, folder: RunFolder, *, last: bool = True, best: bool = False) -> None:
    """Write best.pt (if `best`) and then last.pt (if `last`); all ranks wait until they are written."""
    if not (last or best):
        return
    state = checkpoint_state(run) or {}

    def write() -> None:
        if best:
            folder.save_best(state)
        if last:
            folder.save(state)

    run.mesh.run_on_main_rank(write)


@contextmanager
def checkpoint_on_missing_images(run: Run, folder: RunFolder) -> Iterator[None]:
    """Where no images come, write a checkpoint of the steps before it, unless only one rank knows.

    Raises:
        InputError: an image file cannot be read.
        MachineError: the processes that decode image files failed.
        Stopped: a signal arrived while a batch was waited for that did not come.
    """
    try:
        yield
    except (UnreadableError, DecodingError, SignalReceived) as error:
        if run.mesh.world > 1 and not isinstance(error, UnreadableError):
            raise
        if run.mesh.world == 1:
            check_finite(run, folder)
            save_checkpoint(run, folder)
        if isinstance(error, SignalReceived):
            raise Stopped(str(error)) from None
        if isinstance(error, DecodingError):
            raise MachineError(f"{error}; continue from {folder.checkpoint_path} with --resume auto") from None
        reason = re.sub(r"; \w+ or remove it$", "", str(error))
        raise InputError(
            f"{reason}; fix it, or let others replace such files with "
            f"--skip-corrupt, and continue from {folder.checkpoint_path} with --resume auto"
        ) from None


def describe_out_of_memory(run: Run, folder: RunFolder, error: Exception) -> MachineError:
    """Return the error for a run that ran out of memory; its files are complete."""
    config, progress = run.config, run.progress
    can_recompute = config.topology != "branches" and run.execution == "loop" and not config.checkpoint_activations
    fix = "--checkpoint-activations, which takes less and gives the same" if can_recompute else "more free memory"
    return MachineError(
        f"{out_of_memory(error)} is out of memory at epoch {progress.epoch}, step {progress.step}; the checkpoints in "
        f"{folder.path} are kept: continue with --resume auto and {fix}, or train again with a lower --batch-size or "
        "--peers"
    )
