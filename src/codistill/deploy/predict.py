"""`codistill predict`: what the deployed student says about image files, by the run folder alone.

Shapes: B batch, C classes, K guesses.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from codistill.config.config import Checkpoint, Config, Device, names_of
from codistill.data.decode import read_pixels
from codistill.runs.checkpoint import load_state
from codistill.training.student import load_student
from codistill.utils.allow_import import check_imports
from codistill.utils.device import pick_device
from codistill.utils.errors import InputError
from codistill.utils.files import read_json
from codistill.utils.safe_load import links_out

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


@dataclass
class Predictor:
    """A run's deployed student and how images are put before it."""

    network: nn.Module
    about: dict[str, Any]
    """What data.json holds: classes, channels, image_size, fit, mean, std, and perhaps a fitted temperature."""
    device: torch.device
    temperature: float = 1.0
    """By which logits are divided: 1, or as `evaluate --calibrate` fitted it to these very weights."""

    @torch.inference_mode()
    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Return `B x C` probabilities of uint8 images `B x C x H x W`."""
        mean = torch.tensor(self.about["mean"], device=self.device).view(-1, 1, 1)
        std = torch.tensor(self.about["std"], device=self.device).view(-1, 1, 1)
        x = (torch.from_numpy(pixels).to(self.device) / 255 - mean) / std
        dtype = next(self.network.parameters()).dtype
        scores = self.network(x.to(dtype)).cpu().double() / self.temperature
        return scores.softmax(-1).numpy()


def load_predictor(
    run: str | Path, device: Device = "auto", checkpoint: Checkpoint = "last", allow_import: bool = False
) -> Predictor:
    """Load the deployed student of a run folder; the data set it was trained on is not needed.

    Raises:
        InputError: there is no such run, its training has not begun, or it names code and `allow_import` is not given.
    """
    path = Path(run)
    if not (path / "config.json").exists():
        raise InputError(f"{path} is no run folder (it has no config.json)")
    about = read_json(path / "data.json", "classes", "channels", "image_size", "mean", "std")
    if about is None:
        raise InputError(f"{path} has no data.json; continue the run with --resume auto, which writes it")
    config = dataclasses.replace(Config.from_file(path), pretrained=False, weights=None).resolved()
    check_imports(names_of(config), path, allow_import)
    state = load_state(path, checkpoint)
    network = load_student(config, state, len(about["classes"]), about["channels"], about["image_size"])
    where = pick_device(device)
    temperature = about.get("temperature" if checkpoint == "last" else f"temperature_{checkpoint}", 1.0)
    return Predictor(network.to(where), about, where, temperature)


def image_files(words: Sequence[str]) -> list[Path]:
    """Return the files named; a folder stands for all images in it.

    Raises:
        InputError: a name leads nowhere, or a folder holds no image.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            if (link := next(links_out(path), None)) is not None:
                raise InputError(f"predict: {link} is a link out of the folder {path}; name its target, or copy it")
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"predict: the folder {path} holds no image files")
            files += inside
        elif not path.exists():
            raise InputError(f"predict: {path} does not exist; name image files or folders of them")
        else:
            files.append(path)
    return files


def predict(predictor: Predictor, files: Sequence[Path], top: int, batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """Yield, for every file, its `file` and its `top` guesses (class and probability), or the `error` that it met."""
    about = predictor.about
    for first in range(0, len(files), batch_size):
        rows: list[dict[str, Any]] = []
        pixels = []
        for file in files[first : first + batch_size]:
            try:
                pixels.append(read_pixels(file, about["channels"], about["image_size"], about.get("fit") == "crop"))
                rows.append({"file": str(file)})
            except InputError as error:
                rows.append({"file": str(file), "error": str(error)})
        probs_BC = predictor.probabilities(np.stack(pixels)) if pixels else np.zeros((0, len(about["classes"])))
        good = (row for row in rows if "error" not in row)
        for row, probs_C in zip(good, probs_BC):
            best = np.argsort(-probs_C, kind="stable")[:top]
            row["top"] = [{"class": about["classes"][c], "probability": float(probs_C[c])} for c in best]
        yield from rows


def as_csv(rows: Sequence[dict[str, Any]], top: int) -> str:
    """Write guesses as CSV: file, class1, probability1, class2, ..., error."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    pairs = [name for k in range(1, top + 1) for name in (f"class{k}", f"probability{k}")]
    writer.writerow(["file", *pairs, "error"])
    for row in rows:
        cells = [cell for guess in row.get("top", []) for cell in (guess["class"], f"{guess['probability']:.6f}")]
        writer.writerow([row["file"], *cells, *[""] * (2 * top - len(cells)), row.get("error", "")])
    return stream.getvalue()
