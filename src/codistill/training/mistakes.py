"""The deployed student's worst mistakes on a part of a run's data, with their images and file names."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from codistill.data import DeviceLoader, FileLoader, Loader
from codistill.evaluation import Mistake, collect_mistakes
from codistill.training.loaders import test_loader
from codistill.training.run import Run
from codistill.training.student import deployed_scores


def find_mistakes(run: Run, loader: Loader, scores: tuple[Tensor, Tensor], part: str, count: int) -> list[Mistake]:
    """Return the worst mistakes of the deployed student, the most confident first.

    Args:
        run: The trained run.
        loader: What was classified, in order.
        scores: The logits `N x C` and the labels `N`, from `deployed_scores(run, loader)`.
        part: test or val of the run's own data, or other (another data set).
        count: How many at most.
    """
    logits_NC, labels_N = scores
    files = loader.files if isinstance(loader, FileLoader) else None
    kept = [n for n in range(loader.num_samples) if files is None or files.path(n) not in loader.skipped]

    def pixels_of(position: int) -> np.ndarray:
        index = kept[position]
        if files is not None:
            return files.squared(files.open(index))
        assert isinstance(loader, DeviceLoader)
        return loader.images_NHWC[index].cpu().numpy()

    def name_of(position: int) -> str:
        index = kept[position]
        if files is not None:
            return files.path(index)
        if part == "other":
            return f"image {index}"
        return (
            run.data.name_image("test", index)
            if part == "test"
            else run.data.name_image("training", run.splits.val[index])
        )

    return collect_mistakes(logits_NC, labels_N, run.data.classes, pixels_of, name_of, count)


def find_test_mistakes(run: Run, count: int) -> list[Mistake]:
    """Return the worst mistakes of the deployed student on the run's test set; see `find_mistakes`."""
    loader = test_loader(run)
    return find_mistakes(run, loader, deployed_scores(run, loader), "test", count)
