"""The Python code of a model card: it reads an image, resizes it as the run did, and loads the exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from codistill.models import MODELS, Source, accepted_kwargs, import_callable, parse_source

RESIZE = {
    "stretch": "image = image.resize(({size}, {size}), Image.Resampling.BILINEAR)\n",
    "crop": (
        "scale = {shorter} / min(image.size)\n"
        "image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)\n"
        "left, top = (round((side - {size}) / 2) for side in image.size)\n"
        "image = image.crop((left, top, left + {size}, top + {size}))\n"
    ),
}
IMAGE = """import numpy as np
{imports}from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{resize}pixels = np.array(image{gray}).reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2)
"""
NORMALIZED = """mean, std = (np.array(about[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
inputs = (pixels / np.float32(255) - mean) / std
"""
METADATA = """with safe_open({file}, "pt") as archive:
    about = json.loads(archive.metadata()["codistill"])
"""
PROGRAMS = {
    "torch-export": (
        "import torch\n",
        'extra = {{"codistill.json": ""}}\nprogram = torch.export.load({file}, extra_files=extra)\n'
        'about = json.loads(extra["codistill.json"])\n'
        f"{NORMALIZED}outputs = program.module()(torch.from_numpy(inputs)).detach()\n",
    ),
    "onnx": (
        "import onnxruntime\nimport torch\n",
        "session = onnxruntime.InferenceSession({file})\n"
        "about = {{name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}}\n"
        f'{NORMALIZED}outputs = torch.from_numpy(session.run(None, {{{{"images": inputs}}}})[0])\n',
    ),
}
ANSWER = """probabilities = torch.softmax(outputs / about["temperature"], -1)
print(about["classes"][probabilities.argmax()], probabilities.max())
"""


def usage_code(exported: Path, kind: str, metadata: dict[str, Any], *, wrapped: bool = False) -> str:
    """Return a program that classifies `photo.jpg` with an exported file, and needs no codistill.

    Args:
        exported: The file.
        kind: Its format.
        metadata: See `student_metadata`.
        wrapped: Whether one's own code returns the network inside DataParallel or torch.compile; the file has it alone.
    """
    file, size, channels = json.dumps(exported.name), metadata["image_size"], metadata["channels"]
    if kind != "safetensors":
        imports, program = PROGRAMS[kind]
        program = program.format(file=file)
    elif metadata["model"] in MODELS:
        imports, program = _load_beside(exported)
    else:
        imports, program = _load_into_library(metadata, file, wrapped=wrapped)
    gray = '.convert("L")' if channels == 1 else ""
    resize = RESIZE[metadata["fit"]].format(size=size, shorter=round(size * 8 / 7))
    image = IMAGE.format(imports=imports, gray=gray, resize=resize, size=size, channels=channels)
    return ("import json\n\n" if "json." in program else "") + image + program + ANSWER


def _load_beside(exported: Path) -> tuple[str, str]:
    """Return the imports and the code that load a built-in network with the Python file beside its weights."""
    if exported.stem.isidentifier():
        imports, start = f"import {exported.stem} as student\nimport torch\n", ""
    else:
        imports = "import importlib\nimport torch\n"
        start = f"student = importlib.import_module({json.dumps(exported.stem)})\n"
    return imports, (
        f"{start}model, about = student.load({json.dumps(exported.name)})\n"
        "outputs = model(student.normalize(torch.from_numpy(pixels), about)).detach()\n"
    )


def _load_into_library(metadata: dict[str, Any], file: str, *, wrapped: bool) -> tuple[str, str]:
    """Return the imports and the code that load weights into the network of another library, or of one's own code."""
    source = parse_source(metadata["model"])
    assert source is not None
    library, model = _building_code(source, len(metadata["classes"]), metadata["channels"], metadata["image_size"])
    if wrapped:
        model += 'model = getattr(model, "module", getattr(model, "_orig_mod", model))  # without its wrapper\n'
    program = METADATA.format(file=file) + model + f"model.load_state_dict(load_file({file}))\nmodel.eval()\n"
    logits = ".logits" if source.kind == "hf" else ""
    program += f"{NORMALIZED}outputs = model(torch.from_numpy(inputs)){logits}.detach()\n"
    return (
        f"import torch\n{library}from safetensors import safe_open\nfrom safetensors.torch import load_file\n",
        program,
    )


def _building_code(source: Source, classes: int, channels: int, size: int) -> tuple[str, str]:
    """Return the imports and the code that build a network without weights."""
    kwargs = {"num_classes": classes, "in_channels": channels, "image_size": size}
    if source.kind == "timm":
        kwargs = {"num_classes": classes, "in_chans": channels} | source.library_options(size)
        return "import timm\n", f"model = timm.create_model({source.path!r}{_format(kwargs)})\n"
    if source.kind == "torchvision":
        kwargs = {"num_classes": classes} | source.library_options(size)
        return "from torchvision import models\n", f"model = models.get_model({source.path!r}{_format(kwargs)})\n"
    if source.kind == "hf":
        return "from transformers import AutoConfig, AutoModelForImageClassification\n", (
            f"config = AutoConfig.from_pretrained({source.path!r}{_format({'num_labels': classes} | source.options)})\n"
            f"config.num_channels = {channels}\nmodel = AutoModelForImageClassification.from_config(config)\n"
        )
    kwargs = accepted_kwargs(import_callable(source), kwargs) | source.options
    return (
        f"from {source.kind} import {source.path}\n",
        f"model = {source.path}({_format(kwargs).removeprefix(', ')})\n",
    )


def _format(kwargs: dict[str, Any]) -> str:
    """Return keyword arguments as they follow a first argument.

    >>> _format({"num_classes": 2, "act": "relu"})
    ", num_classes=2, act='relu'"
    """
    return "".join(f", {name}={value!r}" for name, value in kwargs.items())
