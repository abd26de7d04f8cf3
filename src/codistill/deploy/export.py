"""The one deployed student as files that need no codistill: safetensors (with `student.py`), torch.export, ONNX.

Every file carries the classes' names, the normalising and the image size in its metadata, and is read back in its own
runtime and compared with the trained peers before anybody is told that it is done.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.deploy.student_template import LOADER
from codistill.models import MODELS, source_of
from codistill.models.external import LogitsOnly
from codistill.training.loaders import test_loader
from codistill.training.run import Run
from codistill.training.student import deployed_index, deployed_network
from codistill.utils.errors import InputError, MachineError
from codistill.utils.files import write_atomically

SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
MOST_DIFFERENCE = 1e-3
"""Largest difference of outputs, relative where they exceed 1, with which a file counts as the trained student."""

Runner = Callable[[Tensor], Tensor]


def about_student(run: Run) -> dict[str, Any]:
    """Return what a user of the weights must know."""
    return {
        "format": "codistill student",
        "model": run.config.model[
            deployed_index(run) if len(run.config.model) > 1 and run.config.deploy != "ensemble" else 0
        ],
        "outputs": "log-probabilities" if run.config.deploy == "ensemble" else "logits",
        "classes": list(run.data.classes),
        "channels": run.data.channels,
        "image_size": run.data.image_size,
        "fit": run.data.resize_mode,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
    }


def export_student(run: Run, path: Path, kind: str = "safetensors") -> float:
    """Write the deployed student and check the file in its own runtime.

    Args:
        run: A run loaded with `load_run`.
        path: Where to write; it ends in what the format's files end in.
        kind: safetensors, torch-export or onnx.

    Returns:
        The largest difference between the file's outputs, read back, and the peers' own on test images.

    Raises:
        InputError: the name has another ending, the file exists, or the format cannot hold what the run deploys.
        MachineError: the file does not give what was trained.
    """
    if path.suffix != SUFFIXES[kind]:
        raise InputError(f"--out {path} must end in {SUFFIXES[kind]} for --format {kind}")
    if path.exists():
        raise InputError(f"--out {path} exists; remove it or name another file")
    if kind == "safetensors" and run.config.deploy == "ensemble":
        raise InputError("--format safetensors holds one plain network, and this run deploys its ensemble; "
                         "use --format torch-export or onnx")  # fmt: skip
    images_BCHW, expected_BC = _trained_outputs(run)
    student = deployed_network(run).cpu().float()
    write = {"safetensors": _write_safetensors, "torch-export": _write_torch_export, "onnx": _write_onnx}[kind]
    try:
        program = write(student, images_BCHW, about_student(run), path)
        gap = _largest_difference(program, images_BCHW, expected_BC)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if not gap <= MOST_DIFFERENCE * max(1.0, float(expected_BC.abs().max())):
        path.unlink(missing_ok=True)
        raise MachineError(f"{path}: its outputs differ from the trained student's by {gap:.3g}; it was removed")
    return gap


@torch.no_grad()
def _trained_outputs(run: Run) -> tuple[Tensor, Tensor]:
    """Return test images and what the peers (not the exported copy) say about them."""
    peers = run.ema.peers if run.config.deploy == "ema" and run.ema is not None else run.peers
    peers.eval().cpu()
    run.method.eval().cpu()
    peers.autocast = None
    views, _ = next(test_loader(run).epoch())
    views = views[:, :64].cpu()
    outputs = peers(views)
    expected = (
        run.method.ensemble(outputs) if run.config.deploy == "ensemble" else outputs.logits_PBC[deployed_index(run)]
    )
    return views[0].float().contiguous(), expected.float()


@torch.no_grad()
def _largest_difference(run: Runner, images_BCHW: Tensor, expected_BC: Tensor) -> float:
    """Compare on all images at once, and on one alone: the batch size must be free."""
    gaps = [(run(images_BCHW[:n]) - expected_BC[:n]).abs().max() for n in (len(images_BCHW), 1)]
    return float(torch.stack(gaps).max())


def _write_safetensors(student: nn.Module, _images: Tensor, about: dict[str, Any], path: Path) -> Runner:
    from safetensors.torch import load, save

    plain = student.model if isinstance(student, LogitsOnly) else student  # as transformers names them
    tensors = {name: value.contiguous().clone() for name, value in plain.state_dict().items()}
    data = save(tensors, {key: json.dumps(value) for key, value in about.items()})
    write_atomically(path, lambda stream: stream.write(data))
    model = about["model"]
    if model in MODELS:
        source = _own_docstring(source_of(model))
        source += LOADER.format(weights=path.name, builder=MODELS[model].__name__)
        write_atomically(path.with_name("student.py"), lambda stream: stream.write(source.encode()))
    plain.load_state_dict(load(path.read_bytes()))
    return student


def _write_torch_export(student: nn.Module, images_BCHW: Tensor, about: dict[str, Any], path: Path) -> Runner:
    with _refused("torch-export"):
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(student, (images_BCHW[:2],), dynamic_shapes=shapes, strict=False)
        stream = io.BytesIO()
        torch.export.save(program, stream, extra_files={"codistill.json": json.dumps(about)})
    write_atomically(path, lambda file: file.write(stream.getvalue()))
    loaded = torch.export.load(path)
    return loaded.module()


def _write_onnx(student: nn.Module, images_BCHW: Tensor, about: dict[str, Any], path: Path) -> Runner:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--format onnx needs: pip install 'codistill[onnx]'") from None
    with _refused("onnx"):
        program = torch.onnx.export(
            student,
            (images_BCHW[:2],),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=[about["outputs"].replace("-", "_")],
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in about.items()})
    data = proto.SerializeToString()
    write_atomically(path, lambda stream: stream.write(data))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x_BCHW: torch.from_numpy(session.run(None, {"images": x_BCHW.numpy()})[0])


@contextmanager
def _refused(kind: str) -> Iterator[None]:
    """Turn what an exporter meets into one sentence, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # the exporters raise whatever they meet
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"--format {kind}: PyTorch cannot write this network in that format ({reason}); use --format safetensors"
        ) from error


def _own_docstring(source: str) -> str:
    """Replace the module's docstring, which speaks of codistill's own tree."""
    about = '"""A network trained by codistill; this file needs torch alone."""'
    return f"{about}\n\nimport json\n\nimport torch\n{source.split(chr(34) * 3, 2)[2].lstrip()}"
