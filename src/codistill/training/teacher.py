"""Loading the trained teacher of classic distillation: a run folder, an exported student, or a state dict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import TeacherConfig
from codistill.data import ImageSet
from codistill.models import build, resolve, without_prefix, without_wrappers
from codistill.runs import DataInfo, StudentMetadata, check_record, load_run_checkpoint, open_run, read_record
from codistill.training.student import load_student
from codistill.utils import InputError, check_imports, check_regular, load_tensors, suggest

TEACHER_KINDS = (
    "a run folder",
    "an exported .safetensors file",
    "a .pt or .pth state dict with --method.teacher-model",
)


def load_teacher(config: TeacherConfig, data: ImageSet, known: Iterable[str] = ()) -> nn.Module:
    """Load the teacher that `config` names, for the classes and channels of `data`.

    Args:
        config: Names its file or folder.
        data: The images that it will get.
        known: Names of networks that the run uses anyway; a file that names other code is refused.

    Raises:
        InputError: none is named, it is missing or damaged, or it does not fit the data.
    """
    if config.teacher is None:
        raise InputError(f"{config.name} needs a teacher; give --method.teacher: {', '.join(TEACHER_KINDS)}")
    path = Path(config.teacher).expanduser()  # config files have no shell
    if not path.is_dir() and not check_regular(path):
        raise InputError(f"--method.teacher {path} does not exist; give {', '.join(TEACHER_KINDS)}")
    try:
        if path.is_dir():
            return _load_from_run(path, data, known)
        if path.suffix == ".safetensors":
            return _load_from_export(path, data, known)
        return _load_from_state_dict(path, config.teacher_model, data)
    except (RuntimeError, TypeError, AttributeError) as error:  # load_state_dict raises all of them
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
        raise InputError(
            f"--method.teacher {path} does not fit this data ({len(data.classes)} classes, {data.channels} channels) "
            f"or network: {reason}"
        ) from None


def _load_from_run(path: Path, data: ImageSet, known: Iterable[str]) -> nn.Module:
    config = open_run(path, "--method.teacher", without_initial_weights=True)
    check_imports(config.model, f"--method.teacher {path}", known=known)
    metadata: dict[str, Any] = {**(read_record(path / "data.json", DataInfo) or {})}
    # Where the run's own shapes are known, a checkpoint that does not fit them is damaged, not for other data.
    own = (len(metadata["classes"]), metadata["channels"]) if metadata else (len(data.classes), data.channels)
    if own != (len(data.classes), data.channels):
        raise InputError(
            f"--method.teacher {path} does not fit this data ({len(data.classes)} classes, {data.channels} channels); "
            f"it was trained for {own[0]} classes and {own[1]} channels"
        )
    student = load_student(config, load_run_checkpoint(path), len(data.classes), data.channels, data.image_size)
    return _with_input_statistics(student, metadata, data, path)


def _load_from_export(path: Path, data: ImageSet, known: Iterable[str]) -> nn.Module:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as archive:
            values = read_export_metadata(archive.metadata() or {})
            metadata: dict[str, Any] = {**check_record(values, StudentMetadata)}
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"--method.teacher {path} is damaged or was not exported by codistill ({error})") from None
    if "model" not in metadata:
        raise InputError(f"--method.teacher {path} does not name its network; it was not exported by codistill")
    check_imports([str(metadata["model"])], f"--method.teacher {path}", known=known)
    teacher = _build_network(str(metadata["model"]), data)
    without_wrappers(teacher).load_state_dict(tensors)
    return _with_input_statistics(teacher, metadata, data, path)


def read_export_metadata(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata of an exported student; {} where another program wrote the file.

    Args:
        texts: The file's metadata: `format` and `codistill`, or one text for each value in an early export.

    Raises:
        ValueError: it is damaged.
    """
    if "codistill" in texts:
        metadata = json.loads(texts["codistill"])
    elif "model" in texts:
        metadata = {key: json.loads(value) for key, value in texts.items()}
    else:
        metadata = {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no object")
    return metadata


def _with_input_statistics(teacher: nn.Module, metadata: dict[str, Any], data: ImageSet, path: Path) -> nn.Module:
    """Return the teacher for images normalized as `data` normalizes them, whatever statistics it was trained with.

    Args:
        teacher: The network.
        metadata: Stored beside its weights: `classes`, `mean`, `std`, as far as they are known.
        data: The images that it will get.
        path: Its file or folder, for the error message.

    Raises:
        InputError: it was trained on other classes, or the same in another order.
    """
    classes = tuple(metadata.get("classes", data.classes))
    if classes != tuple(data.classes) and len(classes) == len(data.classes):
        odd = next((ours, theirs) for ours, theirs in zip(data.classes, classes) if ours != theirs)
        raise InputError(
            f'--method.teacher {path} knows other classes, or another order ("{odd[1]}" in place of "{odd[0]}"); '
            "give its weights as a bare state dict, with --method.teacher-model, if they mean the same"
        )
    mean, std = metadata.get("mean") or data.mean, metadata.get("std") or data.std
    if len(mean) != data.channels or (tuple(mean), tuple(std)) == (tuple(data.mean), tuple(data.std)):
        return teacher
    return nn.Sequential(Renormalize(data.mean, data.std, mean, std), teacher)


class Renormalize(nn.Module):
    """Changes images from one normalization (mean and deviation per channel) to another."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], other_mean: Sequence[float], other_std: Sequence[float]
    ):
        super().__init__()
        ours, theirs = torch.tensor([mean, std]).double(), torch.tensor([other_mean, other_std]).double()
        self.scale_C11: Tensor
        self.shift_C11: Tensor
        self.register_buffer("scale_C11", (ours[1] / theirs[1]).float().view(-1, 1, 1))
        self.register_buffer("shift_C11", ((ours[0] - theirs[0]) / theirs[1]).float().view(-1, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the images `B x C x H x W` under the other statistics."""
        return x_BCHW * self.scale_C11 + self.shift_C11


def _load_from_state_dict(path: Path, model: str | None, data: ImageSet) -> nn.Module:
    if model is None:
        from codistill.models import MODELS

        raise InputError(f"--method.teacher {path} is a bare state dict; name its network: --method.teacher-model NAME"
                         f"{suggest('', MODELS)}")  # fmt: skip
    try:
        state = load_tensors(path)
    except (ValueError, OSError) as error:
        raise InputError(f"--method.teacher {path} cannot be read ({error})") from None
    for key in ("state_dict", "model_state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    teacher = _build_network(model, data)
    plain = without_wrappers(teacher)
    plain.load_state_dict(without_prefix(state, plain.state_dict()))
    return teacher


def _build_network(name: str, data: ImageSet) -> nn.Module:
    """Build a network for the classes, channels and size of `data`."""
    kwargs = {"num_classes": len(data.classes), "in_channels": data.channels, "image_size": data.image_size}
    return build(resolve(name), **kwargs)
