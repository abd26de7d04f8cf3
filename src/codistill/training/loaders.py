"""A run's data, from its config: the data set as the networks take it, its splits, and loaders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from codistill.config import Config, images_per_class
from codistill.data import (
    Augmentation,
    DeviceLoader,
    FileLoader,
    ImageSet,
    LazyImages,
    Loader,
    LoaderOptions,
    PartitionedLoader,
    Splits,
    divide_images,
    load_set,
    make_splits,
    part_seed,
    with_normalization,
)
from codistill.models import pretrained_statistics, takes_only_rgb
from codistill.training.run import Run
from codistill.utils import DTYPES, InputError, environment_number


def load_images(config: Config, data: ImageSet | None, data_info: Mapping[str, Any] | None) -> tuple[ImageSet, Splits]:
    """Load the data set as the networks take it, and split it.

    Args:
        config: A resolved config.
        data: Images given from Python, instead of those that the config names.
        data_info: The content of the run folder's data.json, where it exists.

    Raises:
        InputError: the data set cannot be used, or is not what data.json describes.
    """
    if data is None:
        how = {"skip_corrupt": config.skip_corrupt, "bits": config.bits}
        data = load_set(config.data, config.data_dir, config.image_size, config.data_pipeline, **how)
    elif not data.provenance.placeholder_reason:
        data.check()
    data = dataclasses.replace(data, flip=data.flip and config.flip)
    if not data.provenance.placeholder_reason:
        data = data.with_channels(num_input_channels(config, data.channels))
        if data_info is not None and data_info.get("checksum", data.checksum()) != data.checksum():
            raise InputError(
                f"--data {config.data} is not what it was when the run began: other files, labels or numbers, so its "
                "splits would mix; put it back as it was, or start a run of another name"
            )
    # Where data.json has the statistics, neither the library nor the hub of the pretrained weights is needed.
    use_pretrained = config.pretrained and config.normalize is None and data_info is None
    statistics = pretrained_statistics(config.model) if use_pretrained else {}
    data = with_normalization(data, config.normalize, statistics, data_info)
    if data.provenance.placeholder_reason:
        empty = np.arange(0)
        return data, Splits(np.arange(len(data.y_train)), empty, empty)
    holdout_fraction = getattr(config.method, "holdout_fraction", 0.0) if config.method.needs_holdout() else 0.0
    splits = make_splits(data, config.val_fraction, holdout_fraction, config.train_per_class)
    if config.batch_size > len(splits.train):
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {len(splits.train)} training images; give a smaller one"
        )
    return data, splits


def num_input_channels(config: Config, channels: int) -> int:
    """Return the networks' input channels: as configured, 3 where a network takes RGB only, or the data set's."""
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
    """Return a loader of `part`, normalized by the statistics of `data`; in order, where nothing is augmented.

    Args:
        config: A resolved config.
        data: The data set whose statistics are used.
        part: Images and labels.
        device: Where batches go.
        augmentation: Of training images; None for evaluation.
        views: Augmented views per image.
    """
    draws_batches = augmentation is not None and not data.provenance.placeholder_reason
    options = LoaderOptions(
        batch_size=config.batch_size if augmentation else evaluation_batch(config.batch_size, data.image_size, device),
        augmentation=augmentation,
        views=views,
        seed=config.seed,
        balanced=config.balanced_sampling and augmentation is not None,
        images_per_class=images_per_class(config.sampler) if draws_batches else 0,
        device=device,
        dtype=DTYPES[config.dtype],
        channels_last=config.channels_last,
    )
    images, labels = part
    if not isinstance(images, LazyImages):
        return DeviceLoader(images, labels, data.mean, data.std, options)
    workers = num_decoding_processes(config)
    how = {"skip_corrupt": config.skip_corrupt, "timeout": config.collective_timeout}
    return FileLoader(images, labels, data.mean, data.std, options, workers=workers, **how)


def make_partitioned_loader(
    config: Config, data: ImageSet, part: tuple[Any, Any], device: torch.device, augmentation: Augmentation, count: int
) -> PartitionedLoader:
    """Return a loader that shows each of `count` peers its own part of the training images.

    Args:
        config: A resolved config.
        data: The data set whose statistics are used.
        part: The training images and labels.
        device: Where batches go.
        augmentation: Of the images.
        count: Peers.

    Raises:
        InputError: a part has fewer images than a batch.
    """
    images, labels = part
    size = len(labels) // count
    if config.batch_size > size and not data.provenance.placeholder_reason:
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {size} training images of each of {count} peers "
            "(--method.partition disjoint); give a smaller one, or --method.partition same"
        )
    workers = num_decoding_processes(config)
    shared = dataclasses.replace(config, data_workers=-(-workers // count))
    loaders = []
    for p, own in enumerate(divide_images(labels, count, config.seed)):
        own_config = dataclasses.replace(shared, seed=part_seed(config.seed, p))
        loaders.append(make_loader(own_config, data, (images[own], labels[own]), device, augmentation))
    return PartitionedLoader(loaders)


def evaluation_batch(batch_size: int, image_size: int, device: torch.device) -> int:
    """Return how many images are evaluated at once: at least 256, and more small ones on a GPU, to use all of it."""
    least = max(batch_size, 256)
    return max(least, min(2_048, 2**21 // image_size**2)) if device.type == "cuda" else least


def num_decoding_processes(config: Config) -> int:
    """Return how many processes decode image files: as configured, or this process's CPUs, 8 at most."""
    if config.data_workers is not None:
        return config.data_workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // environment_number("LOCAL_WORLD_SIZE", 1, 1)))


def curve_loader(run: Run) -> Loader | None:
    """Return the images evaluated during training: validation, or the test set under the papers' protocol."""
    if run.config.protocol == "paper":
        return test_loader(run)
    if not len(run.splits.val):
        return None
    return part_loader(run, run.splits.val)


def test_loader(run: Run) -> Loader:
    """Return the loader of the test set."""
    return _make_sharded_loader(run, run.data.x_test, run.data.y_test)


def part_loader(run: Run, part: Any) -> Loader:
    """Return a loader of a part of the training set (indices), in order and not augmented."""
    return _make_sharded_loader(run, run.data.x_train[part], run.data.y_train[part])


def _make_sharded_loader(run: Run, images: Any, labels: Any) -> Loader:
    """Return a loader in order; on a mesh, of this data rank's shard of the samples."""
    if run.mesh.num_data > 1:
        first, last = run.mesh.shard_bounds(len(labels))[run.mesh.data_index :][:2]
        images, labels = images[first:last], labels[first:last]
    return make_loader(run.config, run.data, (images, labels), run.device)
