"""The one deployed student as files that need no codistill: safetensors, and for built-in networks `student.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from codistill.config import InputError
from codistill.models import MODELS, source_of
from codistill.run import write_atomically
from codistill.setup import Training, deployed_index, deployed_network

LOADER = '''

# ----------------------------------------------------------------------------------------------------------------------
# The trained student: `model, about = load("{weights}")`, then
# `about["classes"][model(normalise(pixels, about)).argmax(-1)]`.


def load(path: str = "{weights}") -> tuple[nn.Module, dict]:
    """Return the trained network, in evaluation mode, and what its file says of it (classes, mean, std, size)."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        data = bytearray(stream.read())
    about = {{key: json.loads(value) for key, value in header.pop("__metadata__").items()}}
    kinds = {{"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}}
    tensors = {{}}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = kinds[entry["dtype"]]
        flat = torch.frombuffer(data[begin:end], dtype=kind) if end > begin else torch.empty(0, dtype=kind)
        tensors[name] = flat.reshape(entry["shape"])
    model = {builder}(num_classes=len(about["classes"]), in_channels=about["channels"])
    model.load_state_dict(tensors)
    return model.eval(), about


def normalise(pixels: Tensor, about: dict) -> Tensor:
    """Turn uint8 pixels, `B x C x H x W`, into what the network was trained on."""
    mean = torch.tensor(about["mean"]).view(-1, 1, 1)
    std = torch.tensor(about["std"]).view(-1, 1, 1)
    return (pixels.float() / 255 - mean) / std
'''


def about_student(t: Training) -> dict[str, Any]:
    """Return what a user of the weights must know."""
    return {
        "format": "codistill student",
        "model": t.config.model[deployed_index(t) if len(t.config.model) > 1 else 0],
        "classes": list(t.data.classes),
        "channels": t.data.channels,
        "image_size": t.data.image_size,
        "mean": list(t.data.mean),
        "std": list(t.data.std),
    }


def export_safetensors(t: Training, path: Path) -> float:
    """Write the deployed student, and `student.py` beside it for a built-in network.

    Args:
        t: A run loaded with `load_run`.
        path: Where to write; it ends in .safetensors.

    Returns:
        The largest difference between the exported student's outputs, read back, and the peers' own.

    Raises:
        InputError: the name does not end in .safetensors, or the file exists.
    """
    from safetensors.torch import load, save

    if t.config.deploy == "ensemble":
        raise InputError("this run deploys its ensemble, which is no plain network; export a run with --deploy member")
    if path.suffix != ".safetensors":
        raise InputError(f"--out {path} must end in .safetensors")
    if path.exists():
        raise InputError(f"--out {path} exists; remove it or name another file")
    student = deployed_network(t).cpu()
    tensors = {name: value.contiguous().clone() for name, value in student.state_dict().items()}
    about = about_student(t)
    data = save(tensors, {key: json.dumps(value) for key, value in about.items()})
    write_atomically(path, lambda stream: stream.write(data))
    model = about["model"]
    if model in MODELS:
        source = _own_docstring(source_of(model))
        source += LOADER.format(weights=path.name, builder=MODELS[model].__name__)
        write_atomically(path.with_name("student.py"), lambda stream: stream.write(source.encode()))
    student.load_state_dict(load(path.read_bytes()))
    return largest_difference(t, student)


def _own_docstring(source: str) -> str:
    """Replace the module's docstring, which speaks of codistill's own tree."""
    about = '"""A network trained by codistill; this file needs torch alone."""'
    return f"{about}\n\nimport json\n\nimport torch\n{source.split(chr(34) * 3, 2)[2].lstrip()}"


@torch.inference_mode()
def largest_difference(t: Training, student: torch.nn.Module) -> float:
    """Return the largest difference of logits between the student and the deployed member, on test images."""
    from codistill.setup import test_loader

    peers = t.ema.peers if t.config.deploy == "ema" and t.ema is not None else t.peers
    peers.eval().cpu()
    peers.autocast = None
    views, _ = next(test_loader(t).epoch())
    views = views[:, :64].cpu()
    return float((peers(views).logits_PBC[deployed_index(t)] - student(views[0])).abs().max())
