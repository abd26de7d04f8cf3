"""A model card in Markdown, with the front matter that the Hugging Face Hub reads, from what a run folder holds.

Nothing is claimed that the folder does not say. Names of classes, files and data are the user's own words and may hold
anything, so they are escaped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from codistill.config.config import Checkpoint
from codistill.config.methods import MethodConfig
from codistill.methods import CLASSES
from codistill.training.run import Run
from codistill.training.student import deployed_name, numbers_trained_and_deployed
from codistill.utils.errors import on_one_line
from codistill.utils.files import read_json
from codistill.utils.tables import markdown

MOST_NAMES = 30


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", r"\\\1", on_one_line(text))


def model_card(
    run: Run, folder: Path, exported: Path, difference: float, licence: str, checkpoint: Checkpoint = "last"
) -> str:
    """Return the card of a run's student that was exported to a file; test figures are those of the last epoch only."""
    result = read_json(folder / "result.json") or {}
    if checkpoint == "best":
        result = {name: value for name, value in result.items() if name != "student"}
    parts = [
        _front(run, result, licence),
        _title(run, exported),
        _accuracy(run, result, folder),
        _training(run, folder, result),
    ]
    return "\n\n".join([*parts, _use(run, exported, difference, licence)]) + "\n"


def _method(run: Run) -> str:
    assert isinstance(run.config.method, MethodConfig)
    return run.config.method.name


def _front(run: Run, result: dict[str, Any], licence: str) -> str:
    """Return the YAML front matter; JSON's strings are YAML's, so nothing in a name can leave its quotes."""
    kinds = {name.partition(":")[0] for name in run.config.model if ":" in name}
    library = "timm" if kinds == {"timm"} else "transformers" if kinds == {"hf"} else "pytorch"
    lines = [
        "---",
        f"license: {json.dumps(licence)}",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        f"tags: {json.dumps(['image-classification', 'knowledge-distillation', 'codistill', _method(run)])}",
    ]
    student = result.get("student")
    if student:
        data, name = json.dumps(run.data.name), json.dumps(f"{run.config.model[0]} trained with {_method(run)}")
        lines += [
            "model-index:",
            f"- name: {name}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {data}",
            f"      type: {data}",
            "      split: test",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {student['top1'] / 100:.6f}",
        ]
    return "\n".join([*lines, "---"])


def _title(run: Run, exported: Path) -> str:
    models = " and ".join(escape(name) for name in dict.fromkeys(run.config.model))
    names = [escape(name) for name in run.data.classes[:MOST_NAMES]]
    more = f", and {len(run.data.classes) - MOST_NAMES} more" if len(run.data.classes) > MOST_NAMES else ""
    size = run.data.image_size
    cut = (
        f" (the shorter side resized to {round(size * 8 / 7)}, the centre cut out)"
        if run.data.resize_mode == "crop"
        else ""
    )
    return (
        f"# {escape(exported.name)}\n\n"
        f"An image classifier ({models}) for {len(run.data.classes)} classes: {', '.join(names)}{more}. It takes "
        f"images of {size} x {size} pixels{cut} and {run.data.channels} channel(s), as (pixels / 255 - mean) "
        f"/ std with mean {list(run.data.mean)} and std {list(run.data.std)}. Deployed: {deployed_name(run)}."
    )


def _accuracy(run: Run, result: dict[str, Any], folder: Path) -> str:
    student = result.get("student")
    if not student and result:
        best = run.best_validation or {"epoch": "?", "top1": float("nan")}
        return (
            f"## Accuracy\n\nThese are the weights of epoch {best['epoch']} (counted from 0), the best on validation "
            f"({best['top1']:.4g} %). The test set was read for the last epoch's weights, not for these."
        )
    if not student:
        return "## Accuracy\n\nThe run is not complete, so its test set has not been read."
    words = {"top1": "top-1 accuracy, %", "top5": "top-5 accuracy, %", "nll": "negative log-likelihood",
             "ece": "expected calibration error, 15 bins"}  # fmt: skip
    rows = [{"test set, last epoch": words[k], "value": f"{v:.4g}"} for k, v in student.items() if k in words]
    text = f"## Accuracy\n\n{result['test']['samples']:,} test images, one run (seed {run.config.seed}), protocol "
    text += f"{run.config.protocol}: "
    honest = "what was chosen was chosen on validation images, the test set was read once."
    text += honest if run.config.protocol == "honest" else "no validation part, the last epoch counts."
    text += f"\n\n{markdown(rows)}"
    grid = read_json(folder.parent.parent / "table.json")
    if grid is None:
        return text + "\nNo baseline was trained beside this run; `codistill compare` trains one of equal cost."
    kept = ("peers", "n", "top-1 %", "vs equal cost", "parameters trained", "deployed", "s a run")
    table = [{k: escape(row[k]) if k == "peers" else row[k] for k in kept if k in row} for row in grid["rows"]]
    title = escape(grid["title"])
    return f"{text}\nThe grid that this run belongs to ({title}), with baselines of equal cost:\n\n{markdown(table)}"


def _training(run: Run, folder: Path, result: dict[str, Any]) -> str:
    c = run.config
    trained, deployed = numbers_trained_and_deployed(run)
    environment = read_json(folder / "environment.json") or {}
    start = (
        "the library's pretrained weights"
        if c.pretrained
        else f"the weights in {c.weights}"
        if c.weights
        else "scratch"
    )
    device = environment.get("gpu") or f"CPU ({environment.get('threads', '?')} threads)"
    seconds = result.get("seconds", run.seconds)
    paper = getattr(CLASSES[_method(run)], "citation", None)
    cited = f" ({escape(paper)})" if paper else ""
    varied = result.get("augmentation") or run.data.describe_augmentation(augment=c.augment, cutout=c.cutout)
    lines = [
        f"- Data: {escape(c.data)}; {result.get('split') or run.splits.describe(run.data)}",
        f"- Method: {_method(run)}, {run.peers.num_peers} {c.topology}{cited}",
        f"- From {escape(start)}; {c.epochs} epochs, batch {c.batch_size}, learning rate {c.lr:g}, "
        f"weight decay {c.weight_decay:g}; {varied}; seed {c.seed}",
        f"- Cost: {trained:,} parameters trained, {deployed:,} deployed; {seconds:.0f} s on {escape(device)}",
        f"- codistill {environment.get('codistill', '?')}, torch {environment.get('torch', '?')}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _use(run: Run, exported: Path, difference: float, licence: str) -> str:
    name = on_one_line(exported.name).replace("`", "")
    on_noise = run.data.provenance.placeholder_reason
    images = "images of noise" if on_noise else f"{min(64, len(run.data.y_test))} test images"
    return (
        f"## File\n\nThe metadata of `{name}` hold the classes, mean, std and image size. "
        f"Its outputs, read back in its own runtime, differ from the trained student's by at most {difference:.3g} on "
        f"{images}.\n\n"
        "## Licence\n\n"
        + (
            "Not stated. The licence of the data, and of pretrained weights, may bind it."
            if licence == "unknown"
            else escape(licence)
        )
    )
