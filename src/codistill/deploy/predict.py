"""Predictions of the deployed student for image files, from the run folder alone (`codistill predict`).

Shapes: B batch, C classes, K guesses.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import nn

from codistill.config import Checkpoint, Device
from codistill.data import ENDINGS, LeftOut, is_hidden, read_pixels
from codistill.deploy.calibrate import read_temperature
from codistill.runs import DataInfo, load_run_checkpoint, open_run, read_record
from codistill.training import load_student
from codistill.utils import InputError, check_imports, escape_csv, find_outside_links, pick_device


@dataclass
class Predictor:
    """A run's deployed student, and how images become its inputs; `load_predictor` makes one."""

    network: nn.Module
    data_info: DataInfo
    device: torch.device
    temperature: float = 1.0
    """Divides the logits: 1, or what `evaluate --calibrate` fitted for these weights."""

    @torch.inference_mode()
    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Return `B x C` probabilities of uint8 images `B x C x H x W`."""
        mean = torch.tensor(self.data_info["mean"], device=self.device).view(-1, 1, 1)
        std = torch.tensor(self.data_info["std"], device=self.device).view(-1, 1, 1)
        pixels = np.ascontiguousarray(pixels)  # networks that use view take no other layout
        x = (torch.from_numpy(pixels).to(self.device) / 255 - mean) / std
        dtype = next(self.network.parameters()).dtype
        scores = self.network(x.to(dtype)).cpu().double() / self.temperature
        return scores.softmax(-1).numpy()

    def predict(self, files: Sequence[str | Path], top: int = 5) -> list[Prediction]:
        """Return the `top` most probable classes of image files, and of all image files in folders.

        A file that cannot be read has an `error` instead.

        Raises:
            InputError: a file or folder does not exist, or a folder holds no image or a link to outside it.
        """
        return [*predict_images(self, find_images([*map(str, files)]), top)]

    def __repr__(self) -> str:
        """Return the network's type and the classes, on one line."""
        return f"Predictor({type(self.network).__name__}, {len(self.data_info['classes'])} classes)"


def load_predictor(
    run: str | Path, device: Device = "auto", checkpoint: Checkpoint = "last", allow_import: bool = False
) -> Predictor:
    """Load the deployed student of a run folder; the data set it was trained on is not needed.

    Args:
        run: The run folder.
        device: Where to run.
        checkpoint: The newest good one, or the best on validation.
        allow_import: Run the code that the folder names, where its network or method is one's own.

    Raises:
        InputError: there is no such run, its training has not begun, or it names code and `allow_import` is not given.

    >>> from PIL import Image
    >>> from codistill.config import Config
    >>> from codistill.training import train
    >>> options = {"data": "digits", "peers": 1, "train_per_class": 20, "epochs": 1, "out": "runs/tiny"}
    >>> _ = train(Config("independent", "resnet8", **options))
    >>> predictor = load_predictor("runs/tiny")
    >>> Image.new("L", (8, 8)).save("runs/blank.png")
    >>> [guess] = predictor.predict(["runs/blank.png"], top=1)
    >>> predictor, guess["file"], len(guess["top"])
    (Predictor(ResNet, 10 classes), 'runs/blank.png', 1)
    """
    path = Path(run)
    config = open_run(path, without_initial_weights=True, allow_import=allow_import)
    info = read_record(path / "data.json", DataInfo)
    if info is None:
        raise InputError(f"{path} has no data.json; continue the run with --resume auto, which writes it")
    if info["channels"] not in (1, 3):
        raise InputError(
            f"predict: {path} was trained on images of {info['channels']} channels, and image files have 1 or 3; "
            "predict from Python, on the network of codistill.load_run"
        )
    check_imports(config.network_names(), path, allow_import)
    state = load_run_checkpoint(path, checkpoint)
    network = load_student(config, state, len(info["classes"]), info["channels"], info["image_size"])
    torch_device = pick_device(device)
    return Predictor(network.to(torch_device), info, torch_device, read_temperature(info, checkpoint))


def find_images(names: Sequence[str]) -> list[Path]:
    """Return the named files, and for a named folder all image files under it, sorted.

    Raises:
        InputError: a file or folder does not exist, or a folder holds no image or a link to outside it.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            if (link := next(find_outside_links(path), None)) is not None:
                raise InputError(f"predict: {link} is a link to outside the folder {path}; name its target, or copy it")
            inside = _find_images_in(path)
            if not inside:
                raise InputError(f"predict: the folder {path} holds no image files ({', '.join(sorted(ENDINGS))})")
            files += inside
        elif not path.exists():
            raise InputError(f"predict: {path} does not exist; name image files or folders of them")
        else:
            files.append(path)
    return files


def _find_images_in(folder: Path) -> list[Path]:
    """Return the image files under a folder, sorted, and warn of what is left out."""
    found, left_out = [], LeftOut()
    for place, folders, names in os.walk(folder):
        left_out.hidden += filter(is_hidden, folders)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            if is_hidden(name):
                continue
            if (ending := os.path.splitext(name)[1].lower()) in ENDINGS:
                found.append(Path(place, name))
            else:
                left_out.endings[ending] += 1
    for message in left_out.messages():
        warnings.warn(f"{folder}: {message}", stacklevel=2)
    return sorted(found)


class Prediction(TypedDict):
    """The student's most probable classes for one file, or the error of a file that cannot be read."""

    file: str
    top: NotRequired[list[dict[str, Any]]]
    """`class` and `probability` of each guess, the most probable first."""
    error: NotRequired[str]


def predict_images(predictor: Predictor, files: Sequence[Path], top: int, batch_size: int = 64) -> Iterator[Prediction]:
    """Yield a prediction with `top` guesses for every file, in order."""
    info = predictor.data_info
    how = {"crop": info.get("fit") == "crop", "bits": info.get("bits", 16)}
    for first in range(0, len(files), batch_size):
        rows: list[Prediction] = []
        pixels = []
        for file in files[first : first + batch_size]:
            try:
                pixels.append(read_pixels(file, info["channels"], info["image_size"], **how))
                rows.append({"file": str(file)})
            except InputError as error:
                rows.append({"file": str(file), "error": str(error)})
        probs_BC = predictor.probabilities(np.stack(pixels)) if pixels else np.zeros((0, len(info["classes"])))
        good = (row for row in rows if "error" not in row)
        for row, probs_C in zip(good, probs_BC):
            if not np.isfinite(probs_C).all():
                row["error"] = "the network's outputs are not finite: its training diverged"
                continue
            best = np.argsort(-probs_C, kind="stable")[:top]
            row["top"] = [{"class": info["classes"][c], "probability": float(probs_C[c])} for c in best]
        yield from rows


def format_csv(rows: Sequence[Prediction], top: int) -> str:
    """Return predictions as CSV: file, class1, probability1, class2, ..., error; every name is escaped."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    pairs = [name for k in range(1, top + 1) for name in (f"class{k}", f"probability{k}")]
    writer.writerow(["file", *pairs, "error"])
    for row in rows:
        cells = [cell for guess in row.get("top", []) for cell in (guess["class"], f"{guess['probability']:.6f}")]
        padded = [row["file"], *cells, *[""] * (2 * top - len(cells)), row.get("error", "")]
        writer.writerow(map(escape_csv, padded))
    return stream.getvalue()
