"""A trained network as the teacher of classic distillation: from a run folder, an exported student, or a state dict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from codistill.checkpoint import load_state
from codistill.config import Config, MethodConfig
from codistill.data import ImageSet
from codistill.errors import InputError, suggest
from codistill.imports import check_imports
from codistill.method_configs import KDConfig
from codistill.methods import build_method
from codistill.models import build, resolve
from codistill.peers import build_peers
from codistill.untrusted import load_tensors

WAYS = ("a run folder", "an exported .safetensors file", "a .pt or .pth state dict with --method.teacher-model")


def load_teacher(config: KDConfig, data: ImageSet, known: Iterable[str] = ()) -> nn.Module:
    """Load the teacher that `config` names, for the classes and channels of `data`.

    Args:
        config: Says where it lies.
        data: What it is to judge.
        known: Names of networks that the run has anyway; a file that names other code is refused.

    Raises:
        InputError: none is named, it is missing or damaged, or it does not fit the data.
    """
    if config.teacher is None:
        raise InputError(f"kd needs a teacher; give --method.teacher: {', '.join(WAYS)}")
    path = Path(config.teacher)
    if not path.exists():
        raise InputError(f"--method.teacher {path} does not exist; give {', '.join(WAYS)}")
    try:
        if path.is_dir():
            return _from_run(path, data, known)
        if path.suffix == ".safetensors":
            return _from_export(path, data, known)
        return _from_state_dict(path, config.teacher_model, data)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error)).strip()
        raise InputError(
            f"--method.teacher {path} does not fit this data ({len(data.classes)} classes, {data.channels} channels) "
            f"or network: {reason}"
        ) from None


def _from_run(path: Path, data: ImageSet, known: Iterable[str]) -> nn.Module:
    if not (path / "config.json").exists():
        raise InputError(f"--method.teacher {path} is no run folder (it has no config.json)")
    config = dataclasses.replace(Config.from_file(path), pretrained=False, weights=None).resolved()
    check_imports(config.model, f"--method.teacher {path}", known=known)
    assert isinstance(config.method, MethodConfig)
    peers = build_peers(config, len(data.classes), data.channels, data.image_size)
    method = build_method(config.method, peers, config.seed)
    state = load_state(path)
    peers.load_state_dict(state["peers"])
    method.load_state_dict(state["method"])
    if config.deploy == "ensemble":
        return method.deploy_ensemble(peers)
    return peers.export_member(int(config.deploy)) if config.deploy.isdigit() else method.deploy(peers)


def _from_export(path: Path, data: ImageSet, known: Iterable[str]) -> nn.Module:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as archive:
            about = {key: json.loads(value) for key, value in (archive.metadata() or {}).items()}
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise InputError(f"--method.teacher {path} is damaged or was not exported by codistill ({error})") from None
    if "model" not in about:
        raise InputError(f"--method.teacher {path} does not name its network; it was not exported by codistill")
    check_imports([str(about["model"])], f"--method.teacher {path}", known=known)
    teacher = _network(str(about["model"]), data)
    teacher.load_state_dict(tensors)
    return teacher


def _from_state_dict(path: Path, model: str | None, data: ImageSet) -> nn.Module:
    if model is None:
        from codistill.models import MODELS

        raise InputError(f"--method.teacher {path} is a bare state dict; name its network: --method.teacher-model NAME"
                         f"{suggest('', MODELS)}")  # fmt: skip
    try:
        state = load_tensors(path)
    except ValueError as error:
        raise InputError(f"--method.teacher {path} cannot be read ({error})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    teacher = _network(model, data)
    teacher.load_state_dict(state)
    return teacher


def _network(name: str, data: ImageSet) -> nn.Module:
    """Build a network for the classes, channels and size of `data`."""
    about = {"num_classes": len(data.classes), "in_channels": data.channels, "image_size": data.image_size}
    return build(resolve(name), **about)
