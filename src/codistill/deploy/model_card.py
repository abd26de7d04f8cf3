"""A model card in Markdown, with the front matter that the Hugging Face Hub reads, from what a run folder holds.

It states only what the folder holds. Names of classes, files and data are chosen by users, so they are escaped.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.config import Checkpoint
from codistill.deploy.calibrate import read_temperature
from codistill.deploy.card_code import usage_code
from codistill.deploy.export import SUFFIXES, student_metadata
from codistill.models import without_wrappers
from codistill.runs import DataInfo, Environment, RunResult, TableFile, read_record
from codistill.training import Run, count_trained_and_deployed, deployed_name
from codistill.utils import InputError, escape_markdown, markdown, on_one_line

MAX_CLASS_NAMES = 30


@dataclass
class CardRecords:
    """What a model card says of a run, as its folder holds it."""

    result: dict[str, Any]
    environment: Environment
    grid: TableFile | None
    """The table of the grid that the run belongs to."""
    temperature: float


def read_card_records(folder: Path, checkpoint: Checkpoint = "last") -> CardRecords:
    """Read what a model card needs of a run folder.

    Raises:
        InputError: a file of the run is damaged.
    """
    return CardRecords(
        {**(read_record(folder / "result.json", RunResult) or {})},
        read_record(folder / "environment.json", Environment) or {},
        _read_grid_table(folder.resolve().parent.parent),
        read_temperature(read_record(folder / "data.json", DataInfo), checkpoint),
    )


def make_model_card(
    run: Run,
    records: CardRecords,
    exported: Path,
    difference: float,
    license: str,
    checkpoint: Checkpoint = "last",
) -> str:
    """Return the model card of an exported student.

    Args:
        run: The run, loaded with the exported weights.
        records: What its run folder holds.
        exported: The exported file.
        difference: Largest difference of the file's outputs from the trained student's.
        license: The license of the weights, as the Hub spells it.
        checkpoint: The exported weights; for the best ones no test figures are given, which are the last epoch's.
    """
    result = records.result
    if checkpoint == "best":
        result = {name: value for name, value in result.items() if name != "student"}
    parts = [
        _front_matter(run, result, license),
        _describe_student(run, exported),
        _describe_use(run, exported, records.temperature),
        _describe_accuracy(run, result, records.grid),
        _describe_training(run, records.environment, result),
    ]
    return "\n\n".join([*parts, _describe_file(run, exported, difference, license, records.temperature)]) + "\n"


def _front_matter(run: Run, result: dict[str, Any], license: str) -> str:
    """Return the YAML front matter; names are JSON strings, which are YAML strings too, so none can end its quotes."""
    kinds = {name.partition(":")[0] for name in run.config.model if ":" in name}
    library = "timm" if kinds == {"timm"} else "transformers" if kinds == {"hf"} else "pytorch"
    lines = [
        "---",
        f"license: {json.dumps(license)}",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        f"tags: {json.dumps(['image-classification', 'knowledge-distillation', 'codistill', run.method.name])}",
    ]
    student = result.get("student")
    if student:
        data, name = json.dumps(run.data.name), json.dumps(f"{run.config.model[0]} trained with {run.method.name}")
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


def _describe_student(run: Run, exported: Path) -> str:
    models = " and ".join(escape_markdown(name) for name in dict.fromkeys(run.config.model))
    names = [escape_markdown(name) for name in run.data.classes[:MAX_CLASS_NAMES]]
    more = f", and {len(run.data.classes) - MAX_CLASS_NAMES} more" if len(run.data.classes) > MAX_CLASS_NAMES else ""
    size = run.data.image_size
    crop = (
        f" (the shorter side resized to {round(size * 8 / 7)}, center crop)"
        if run.data.resize_mode == "crop"
        else " (others stretched to that size)"
    )
    return (
        f"# {escape_markdown(exported.name)}\n\n"
        f"An image classifier ({models}) for {len(run.data.classes)} classes: {', '.join(names)}{more}. It takes "
        f"images of {size} x {size} pixels{crop} and {run.data.channels} channel(s), as (pixels / 255 - mean) "
        f"/ std with mean {list(run.data.mean)} and std {list(run.data.std)}. Deployed: {deployed_name(run)}."
    )


def _describe_use(run: Run, exported: Path, temperature: float) -> str:
    """Return the code that classifies one image; none for images of other channels than files have."""
    if run.data.channels not in (1, 3):
        return f"## Use\n\nIt takes images of {run.data.channels} channels, normalized as above."
    kind = next(kind for kind, suffix in SUFFIXES.items() if suffix == exported.suffix)
    student = run.student
    wrapped = without_wrappers(student) is not student
    code = usage_code(exported, kind, student_metadata(run, temperature), wrapped=wrapped)
    return f"## Use\n\n```python\n{code}```"


def _describe_accuracy(run: Run, result: dict[str, Any], grid: TableFile | None) -> str:
    student = result.get("student")
    if not student and result:
        best = run.progress.best_validation or {"epoch": "?", "top1": float("nan")}
        return (
            f"## Accuracy\n\nThese are the weights of epoch {best['epoch']} (counted from 0), the best on validation "
            f"({best['top1']:.4g} %). The test set was read for the last epoch's weights, not for these."
        )
    if not student:
        return "## Accuracy\n\nThe run is not complete, so its test set has not been read."
    labels = {"top1": "top-1 accuracy, %", "top5": "top-5 accuracy, %", "nll": "negative log-likelihood",
             "ece": "expected calibration error, 15 bins"}  # fmt: skip
    rows = [{"test set, last epoch": labels[k], "value": f"{v:.4g}"} for k, v in student.items() if k in labels]
    text = f"## Accuracy\n\n{result['test']['samples']:,} test images, one run (seed {run.config.seed}), protocol "
    text += f"{run.config.protocol}: "
    honest = "the run itself chose nothing on the test set, and read it once, at its end."
    text += honest if run.config.protocol == "honest" else "no validation part, the last epoch counts."
    text += f"\n\n{markdown(rows)}"
    if grid is None:
        return text + "\nNo baseline was trained beside this run; `codistill compare` trains one of equal cost."
    columns = ("peers", "n", "top-1 %", "vs equal cost", "parameters trained", "deployed", "s a run")
    table = [{k: row[k] for k in columns if k in row} for row in grid["rows"]]
    title = escape_markdown(grid["title"])
    return f"{text}\nThe grid that this run belongs to ({title}), with baselines of equal cost:\n\n{markdown(table)}"


def _read_grid_table(folder: Path) -> TableFile | None:
    """Return the table of the grid in a folder; None where it has none, or one of another program."""
    try:
        return read_record(folder / "table.json", TableFile)
    except InputError as error:
        warnings.warn(f"the model card leaves the grid's table out: {error}", stacklevel=2)
        return None


def _describe_training(run: Run, environment: Environment, result: dict[str, Any]) -> str:
    c = run.config
    trained, deployed = count_trained_and_deployed(run)
    start = (
        "the library's pretrained weights"
        if c.pretrained
        else f"the weights in {c.weights}"
        if c.weights
        else "scratch"
    )
    device = environment.get("gpu") or f"CPU ({environment.get('threads', '?')} threads)"
    seconds = result.get("seconds", run.progress.seconds)
    paper = getattr(run.method, "citation", None)
    members = c.topology if run.peers.num_peers > 1 else "network"
    cited = f" ({escape_markdown(paper)})" if paper else ""
    varied = result.get("augmentation") or run.data.describe_augmentation(**c.augmentation_options())
    lines = [
        f"- Data: {escape_markdown(c.data)}; {escape_markdown(result.get('split') or run.splits.describe(run.data))}",
        f"- Method: {run.method.name}, {run.peers.num_peers} {members}{cited}",
        f"- From {escape_markdown(start)}; {c.epochs} epochs, batch {c.batch_size}, learning rate {c.lr:g}, "
        f"weight decay {c.weight_decay:g}; {escape_markdown(varied)}; seed {c.seed}",
        f"- Cost: {trained:,} parameters trained, {deployed:,} deployed; {seconds:.0f} s on {escape_markdown(device)}",
        f"- codistill {escape_markdown(str(environment.get('codistill', '?')))}, "
        f"torch {escape_markdown(str(environment.get('torch', '?')))}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _describe_file(run: Run, exported: Path, difference: float, license: str, temperature: float) -> str:
    name = on_one_line(exported.name).replace("`", "")
    calibration = (
        f"Its outputs are to be divided by the temperature {temperature:.4f}, which was fitted on validation images, "
        "before the softmax; the file itself does not divide them. "
        if temperature != 1
        else "No temperature was fitted. "
    )
    on_noise = run.data.provenance.placeholder_reason
    images = "images of noise" if on_noise else f"{min(64, len(run.data.y_test))} test images"
    return (
        f"## File\n\nThe metadata of `{name}` holds the classes, mean, std, image size and temperature. {calibration}"
        f"Its outputs, read back in its own runtime, differ from the trained student's by at most {difference:.3g} on "
        f"{images}.\n\n"
        "## License\n\n"
        + (
            "Not stated. The licenses of the data and of pretrained weights may apply."
            if license == "unknown"
            else f"The weights are licensed under {escape_markdown(license)}."
        )
    )
