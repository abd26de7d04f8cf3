"""What a run is fed with, from its config: its set as the networks take it, the splits, and loaders."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from codistill.config.config import Config
from codistill.config.methods import MethodConfig
from codistill.data import DeviceLoader, FileLoader, ImageSet, Loader, Splits, load_set, make_splits
from codistill.data.lazy_images import LazyImages
from codistill.data.loader import Augmentation, LoaderOptions
from codistill.data.normalization import with_normalization
from codistill.models.external import pretrained_statistics, takes_only_rgb
from codistill.training.run import Run
from codistill.utils.device import DTYPES
from codistill.utils.errors import InputError


def load_images(config: Config, data: ImageSet | None, held: dict[str, Any] | None) -> tuple[ImageSet, Splits]:
    """Load the set as the networks take it, and split it."""
    assert isinstance(config.method, MethodConfig)
    if data is None:
        data = load_set(
            config.data, config.data_dir, config.image_size, config.data_pipeline, skip_corrupt=config.skip_corrupt
        )
    elif not data.provenance.placeholder_reason:
        data.check()
    if not data.provenance.placeholder_reason:
        data = data.with_channels(channels_taken(config, data.channels))
        if held is not None and held.get("checksum", data.checksum()) != data.checksum():
            raise InputError(
                f"--data {config.data} is not what it was when the run began: other files, labels or numbers, so its "
                "splits would mix; put it back as it was, or start a run of another name"
            )
    asked = config.pretrained and config.normalise is None and held is None  # a library, or a hub, need not be there
    data = with_normalization(data, config.normalise, pretrained_statistics(config.model) if asked else {}, held)
    if data.provenance.placeholder_reason:
        nothing = np.arange(0)
        return data, Splits(np.arange(len(data.y_train)), nothing, nothing)
    holdout_fraction = getattr(config.method, "holdout_fraction", 0.0) if config.method.needs_holdout() else 0.0
    splits = make_splits(data, config.val_fraction, holdout_fraction, config.train_per_class)
    if config.batch_size > len(splits.train):
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(splits.train)} training images; give a smaller one"
        )
    return data, splits


def channels_taken(config: Config, channels: int) -> int:
    """Return the channels that the networks take: as asked for, 3 where one knows no other, or the data set's."""
    if config.channels is not None:
        return config.channels
    return 3 if any(takes_only_rgb(name, pretrained=config.pretrained) for name in config.model) else channels


def make_loader(
    config: Config,
    data: ImageSet,
    part: tuple[Any, Any],
    device: torch.device,
    augmentation: Augmentation | None = None,
    views: int = 1,
) -> Loader:
    """Return batches of `part`, normalised by the statistics of `data`; in order, where nothing is augmented."""
    options = LoaderOptions(
        batch_size=config.batch_size if augmentation else max(config.batch_size, 256),
        augmentation=augmentation,
        views=views,
        seed=config.seed,
        balanced=config.balanced_sampling and augmentation is not None,
        device=device,
        dtype=DTYPES[config.dtype],
        channels_last=config.channels_last,
    )
    images, labels = part
    if not isinstance(images, LazyImages):
        return DeviceLoader(images, labels, data.mean, data.std, options)
    workers = decoding_processes(config)
    return FileLoader(images, labels, data.mean, data.std, options, workers=workers, skip_corrupt=config.skip_corrupt)


def decoding_processes(config: Config) -> int:
    """Return how many processes decode image files: as asked for, or this process's share of the CPUs, 8 at most."""
    if config.data_workers is not None:
        return config.data_workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def curve_loader(run: Run) -> Loader | None:
    """Return the set that is looked at during training: validation, or the test set under the papers' protocol."""
    if run.config.protocol == "paper":
        return test_loader(run)
    if not len(run.splits.val):
        return None
    return part_loader(run, run.splits.val)


def test_loader(run: Run) -> Loader:
    """Return the test set."""
    return _sharded(run, run.data.x_test, run.data.y_test)


def part_loader(run: Run, part: Any) -> Loader:
    """Return a part of the training set (indices), in order and as it is."""
    return _sharded(run, run.data.x_train[part], run.data.y_train[part])


def _sharded(run: Run, images: Any, labels: Any) -> Loader:
    """Return a loader that keeps the order; on a mesh, of this rank's part of the samples, every one on one rank."""
    if run.mesh is not None:
        first, last = run.mesh.shard(len(labels))[run.mesh.data_index :][:2]
        images, labels = images[first:last], labels[first:last]
    return make_loader(run.config, run.data, (images, labels), run.device)
