"""Loading a run from its folder, with its weights: `load_run`, and where its images are not needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from codistill.config import Checkpoint, Device
from codistill.data import ImageSet, Provenance
from codistill.runs import DataInfo, load_run_checkpoint, open_run, read_record
from codistill.training.build import build_run
from codistill.training.run import Run
from codistill.training.state import restore_state
from codistill.utils import check_imports


def load_run(
    path: str | Path,
    data_dir: str | None = None,
    device: Device = "auto",
    checkpoint: Checkpoint = "last",
    allow_import: bool = False,
    data: ImageSet | None = None,
    with_images: bool = True,
) -> Run:
    """Build the run of a run folder with the weights of a checkpoint, for evaluation and export.

    `codistill.load_predictor` loads the student alone, and classifies image files.

    Args:
        path: The run folder.
        data_dir: Where the data is now; default where it was when the run was trained.
        device: Where to run.
        checkpoint: The newest good one, or the best on validation.
        allow_import: Run the code that the folder names, where its network or method is one's own
            (package.module:callable).
        data: The images, where they were given from Python.
        with_images: Load its images. Without them noise of their shape takes their place, which is enough for
            `student` and `peers`, wherever the images are now.

    Raises:
        InputError: there is no such run, its checkpoint is missing or damaged, its images are missing or have changed,
            or it names code.

    >>> from codistill.config import Config
    >>> from codistill.training import train
    >>> options = {"data": "digits", "peers": 1, "train_per_class": 20, "epochs": 1, "out": "runs/small"}
    >>> _ = train(Config("independent", "resnet8", **options))
    >>> run = load_run("runs/small")
    >>> run.peers.num_peers, run.config.epochs
    (1, 1)
    >>> load_run("runs/small", with_images=False).student.training
    False
    """
    path = Path(path)
    if not with_images:
        return load_without_images(path, device, checkpoint=checkpoint, allow_import=allow_import)
    config = open_run(path, allow_import=allow_import)
    check_imports(config.network_names(), path, allow_import)
    config = dataclasses.replace(config, device=device, data_dir=data_dir or config.data_dir, mesh=None).resolved()
    state = load_run_checkpoint(path, checkpoint)
    data_info = read_record(path / "data.json", DataInfo)
    run = build_run(
        config,
        execution=state.get("execution", "loop"),
        load_weights=False,
        for_training=False,
        data=data,
        data_info=data_info,
    )
    restore_state(run, state)
    return run


def load_without_images(
    path: str | Path,
    device: Device = "auto",
    why: str = "",
    checkpoint: Checkpoint = "last",
    allow_import: bool = False,
) -> Run:
    """Load a run with noise of the right shape instead of its images, which are missing or not needed.

    Args:
        path: The run folder.
        device: Where to run.
        why: The reason, in words.
        checkpoint: The newest good one, or the best on validation.
        allow_import: See `load_run`.

    Raises:
        InputError: there is no such run, or its data.json does not state the images' shape.
    """
    data_info = read_record(Path(path) / "data.json", DataInfo)
    if data_info is None:
        return load_run(path, device=device, checkpoint=checkpoint, allow_import=allow_import)
    size, classes = data_info["image_size"], tuple(data_info["classes"])
    count = max(min(64, 2**27 // (size**2 * data_info["channels"])), 2)
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, data_info["channels"]), dtype=np.uint8)
    labels = np.arange(count) % len(classes)
    placeholder = ImageSet(
        data_info["name"],
        noise,
        labels,
        noise,
        labels,
        classes,
        resize_mode=data_info.get("fit", "stretch"),
        bits=data_info.get("bits", 16),
        provenance=Provenance(placeholder_reason=why or "not asked for"),
    )
    return load_run(path, device=device, checkpoint=checkpoint, allow_import=allow_import, data=placeholder)
