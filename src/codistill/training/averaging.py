"""The BatchNorm statistics of weights that are averaged over the last epochs (`--deploy swa`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from codistill.peers import TailAverage
from codistill.training.run import Run


def recompute_statistics(run: Run) -> bool:
    """Compute the statistics of the average anew at the end of an epoch, if it is one of several weights.

    Costs a forward of all members over the training images. They are those of this epoch, augmented but not mixed. The
    members' training does not change: the random states are put back.

    Returns:
        Whether there was anything to compute.
    """
    average, epoch = run.average, run.progress.epoch
    if not isinstance(average, TailAverage) or average.count(epoch) == 1:
        return False
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        average.recompute_statistics(_local_views(run, epoch), run.frozen)
    run.mesh.sync_buffers([average], run.method)
    return True


def _local_views(run: Run, epoch: int) -> Iterator[Tensor]:
    """Yield this rank's part of the training images of an epoch."""
    for number, (views_VBCHW, labels_B) in enumerate(run.loader.epoch(epoch)):
        run.mesh.begin_step(labels_B.shape[-1], number)
        # Where images are mixed, every rank has the full batch.
        yield views_VBCHW[:, run.mesh.local_rows()] if run.mixer.mixes_images else views_VBCHW
