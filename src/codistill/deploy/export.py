"""The one deployed student as files that need no codistill: safetensors (with a Python file), torch.export, ONNX.

Every file has the class names, the normalization, the image size and the fitted temperature in its metadata. It is read
back in its own runtime and compared with the trained peers before the export is reported as done.

Shapes: B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codistill.deploy.student_template import LOADER
from codistill.models import MODELS, LogitsOnly, source_of, without_wrappers
from codistill.training import Run, deployed_index, deployed_network, deploys_average, test_loader
from codistill.utils import InputError, MachineError, first_line, write_atomically

SUFFIXES = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
METADATA_KEY = "codistill"
"""Key of a safetensors file's metadata that holds everything but `format`."""
MAX_DIFFERENCE = 1e-3
"""Largest accepted difference of outputs, relative to the largest output where that exceeds 1."""

Program = Callable[[Tensor], Tensor]


def student_metadata(run: Run, temperature: float = 1.0) -> dict[str, Any]:
    """Return the metadata of the exported file; outputs / `temperature` are calibrated."""
    of_member = len(run.config.model) > 1 and run.config.deploy != "ensemble"
    return {
        "format": "codistill student",
        "model": run.config.model[deployed_index(run) if of_member else 0],
        "outputs": "log-probabilities" if run.config.deploy == "ensemble" else "logits",
        "classes": list(run.data.classes),
        "channels": run.data.channels,
        "image_size": run.data.image_size,
        "fit": run.data.resize_mode,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "temperature": temperature,
    }


def check_targets(run: Run, path: Path, kind: str) -> list[Path]:
    """Return the files that an export writes: the student, its Python file where it gets one, and its model card.

    Raises:
        InputError: the suffix is wrong, a file exists, or the format cannot hold what the run deploys.
    """
    if path.suffix != SUFFIXES[kind]:
        raise InputError(f"--out {path} must end in {SUFFIXES[kind]} for --format {kind}")
    if kind == "safetensors" and run.config.deploy == "ensemble":
        raise InputError("--format safetensors holds one plain network, and this run deploys its ensemble; "
                         "use --format torch-export or onnx")  # fmt: skip
    has_source = kind == "safetensors" and student_metadata(run)["model"] in MODELS
    targets = [path, *([path.with_suffix(".py")] if has_source else [])]
    card = path.with_suffix(".md")
    targets.append(path.with_name(f"{path.name}.md") if os.path.lexists(card) else card)  # that of another format
    for target in targets:
        if os.path.lexists(target):
            raise InputError(f"--out {path}: {target} exists; remove it or name another file")
    return targets


def export_student(run: Run, path: Path, kind: str = "safetensors", temperature: float = 1.0) -> float:
    """Write the deployed student and check the file in its own runtime.

    Args:
        run: A run loaded with `load_run`.
        path: Where to write, with the suffix of the format (`SUFFIXES`).
        kind: safetensors, torch-export or onnx.
        temperature: Fitted by `evaluate --calibrate`; it is put into the file's metadata, not into its outputs.

    Returns:
        The largest absolute difference on test images between the outputs of the file, read back, and the peers'.

    Raises:
        InputError: the suffix is wrong, the file exists, or the format cannot hold what the run deploys.
        MachineError: the file's outputs differ from the trained student's.
    """
    *written, _ = check_targets(run, path, kind)
    images_BCHW, expected_BC = _trained_outputs(run)
    student = without_wrappers(deployed_network(run)).cpu().float()
    write = {"safetensors": _write_safetensors, "torch-export": _write_torch_export, "onnx": _write_onnx}[kind]
    try:
        program = write(student, images_BCHW, student_metadata(run, temperature), path)
        difference = _largest_difference(program, images_BCHW, expected_BC)
    except BaseException:
        _remove(written)
        raise
    if not difference <= MAX_DIFFERENCE * max(1.0, float(expected_BC.abs().max())):
        _remove(written)
        raise MachineError(f"{path}: its outputs differ from the trained student's by {difference:.3g}; it was removed")
    return difference


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


@torch.no_grad()
def _trained_outputs(run: Run) -> tuple[Tensor, Tensor]:
    """Return up to 64 test images, `B x C x H x W`, and the trained peers' outputs for them, `B x C`."""
    average = run.evaluated_average
    peers = average.peers if deploys_average(run) and average is not None else run.peers
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
def _largest_difference(program: Program, images_BCHW: Tensor, expected_BC: Tensor) -> float:
    """Compare on all images in one batch and on a single image, since the batch size must be free."""
    differences = [(program(images_BCHW[:n]) - expected_BC[:n]).abs().max() for n in (len(images_BCHW), 1)]
    return float(torch.stack(differences).max())


def _write_safetensors(student: nn.Module, _images: Tensor, metadata: dict[str, Any], path: Path) -> Program:
    from safetensors.torch import load, save

    plain = student.model if isinstance(student, LogitsOnly) else student  # as transformers names them
    plain = without_wrappers(plain)
    tensors = {name: value.contiguous().clone() for name, value in plain.state_dict().items()}
    data = _sort_header(save(tensors, {"format": "pt", METADATA_KEY: json.dumps(metadata)}))
    write_atomically(path, lambda stream: stream.write(data))
    model = metadata["model"]
    if model in MODELS:
        source = _replace_docstring(source_of(model))
        source += LOADER.format(weights=path.name, builder=MODELS[model].__name__)
        write_atomically(path.with_suffix(".py"), lambda stream: stream.write(source.encode()))
    plain.load_state_dict(load(path.read_bytes()))
    return student


def _sort_header(data: bytes) -> bytes:
    """Return a safetensors file whose metadata is in order, so that equal runs give equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _write_torch_export(student: nn.Module, images_BCHW: Tensor, metadata: dict[str, Any], path: Path) -> Program:
    with _export_errors_as_sentence("torch-export"):
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(student, (images_BCHW[:2],), dynamic_shapes=shapes, strict=False)
        stream = io.BytesIO()
        torch.export.save(program, stream, extra_files={"codistill.json": json.dumps(metadata)})
    write_atomically(path, lambda file: file.write(stream.getvalue()))
    loaded = torch.export.load(path)
    return loaded.module()


def _write_onnx(student: nn.Module, images_BCHW: Tensor, metadata: dict[str, Any], path: Path) -> Program:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--format onnx needs: pip install onnx onnxscript onnxruntime") from None
    with _export_errors_as_sentence("onnx"):
        program = torch.onnx.export(
            student,
            (images_BCHW[:2],),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=[metadata["outputs"].replace("-", "_")],
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
    del proto.graph.value_info[:]  # shapes of intermediate values, which quantizers change and then find contradicted
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    data = proto.SerializeToString()
    write_atomically(path, lambda stream: stream.write(data))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x_BCHW: torch.from_numpy(session.run(None, {"images": x_BCHW.numpy()})[0])


@contextmanager
def _export_errors_as_sentence(kind: str) -> Iterator[None]:
    """Turn any exception of an exporter into an InputError of one sentence, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # the exporters raise exceptions of any kind
        raise InputError(
            f"--format {kind}: PyTorch cannot write this network in that format ({_find_reason(error)}); "
            "use --format safetensors"
        ) from error


def _find_reason(error: BaseException) -> str:
    """Return the first line of the error that an exporter's own errors were raised from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return first_line(error)


def _replace_docstring(source: str) -> str:
    """Replace the docstring of the module's source by one for the exported file."""
    docstring = '"""A network trained by codistill; this file needs torch alone."""'
    return f"{docstring}\n\nimport json\n\nimport torch\n{source.split(chr(34) * 3, 2)[2].lstrip()}"
