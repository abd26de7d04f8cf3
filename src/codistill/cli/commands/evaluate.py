"""`codistill evaluate RUN`: figures of a run's members on one of its splits, or on another data set."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from codistill.cli.console import err, members_table, out, print_rows, show_figure, show_progress
from codistill.cli.option_types import EvaluateOptions
from codistill.cli.options import Parsed
from codistill.data import Loader, count_trained_images, load_external_test_set
from codistill.deploy import calibrate_student
from codistill.evaluation import (
    SHOWN_MISTAKES,
    calibration_figures,
    check_sheet_path,
    class_rows,
    confusion_matrix,
    write_confusion,
    write_contact_sheet,
)
from codistill.runs import read_trained_hashes
from codistill.training import (
    Run,
    curve_loader,
    deployed_name,
    deployed_scores,
    evaluate_run,
    find_mistakes,
    load_run,
    load_without_images,
    make_loader,
    test_loader,
)
from codistill.utils import InputError, escape_json, keep_freed_memory, set_progress_display


def run(parsed: Parsed) -> int:
    """Evaluate, and print a table or JSON."""
    options: EvaluateOptions = parsed.options
    folder = Path(parsed.positionals[0])
    if options.contact_sheet:
        check_sheet_path(Path(options.contact_sheet))  # before anything is loaded
    set_progress_display(show_progress)
    if options.data is not None and not options.calibrate:  # the run's own images are not needed
        trained = load_without_images(folder, options.device, checkpoint=options.checkpoint)
    else:
        trained = load_run(folder, options.data_dir, options.device, options.checkpoint)
    if trained.device.type == "cpu":
        keep_freed_memory()
    loader = _load_images(trained, options, folder)
    figures, name = evaluate_run(trained, loader), deployed_name(trained)
    extra = _extra_metrics(trained, loader, options, folder)
    if options.json:
        print(escape_json(figures | {"deployed": name} | extra))
        return 0
    title = f"{options.data or f'{trained.config.data} {options.split}'}, {figures['members']['samples']:,} images"
    out.print(members_table(figures["members"], name, title, figures[trained.config.average_key]))
    _print_extra_metrics(extra, name)
    return 0


def _load_images(trained: Run, options: EvaluateOptions, folder: Path) -> Loader:
    """Return the loader over the images that --data or --split names."""
    if options.data is not None:
        images, labels, notes = load_external_test_set(options.data, options.data_dir, trained.data.metadata())
        for note in notes:
            err.print(f"{options.data}: {note}", style="dim")
        known = count_trained_images(images, read_trained_hashes(folder))
        if known:
            warnings.warn(
                f"{known:,} of the {len(labels):,} images of {options.data} were trained on (they are the same), "
                "so the figures are too good; judge on other images",
                stacklevel=1,
            )
        config = dataclasses.replace(trained.config, skip_corrupt=True)  # unreadable files are left out and named
        return make_loader(config, trained.data, (images, labels), trained.device)
    loader = test_loader(trained)
    if options.split == "val":
        loader = curve_loader(trained) if len(trained.splits.val) else None
    if loader is None:
        raise InputError("--split val: this run kept no validation part (--val-fraction 0 or --protocol paper)")
    return loader


def _extra_metrics(trained: Run, loader: Loader, options: EvaluateOptions, folder: Path) -> dict[str, Any]:
    """Return what --per-class, --confusion, --contact-sheet and --calibrate ask for, and write the files they name."""
    if not (options.per_class or options.confusion or options.contact_sheet or options.calibrate):
        return {}
    logits_NC, labels_N = scores = deployed_scores(trained, loader)
    classes = trained.data.classes
    extra: dict[str, Any] = {}
    if options.per_class or options.confusion:
        confusion = confusion_matrix(logits_NC, labels_N)
        if options.per_class:
            extra["classes"] = class_rows(confusion, classes)
        if options.confusion:
            write_confusion(Path(options.confusion), confusion, classes)
            extra["confusion"] = options.confusion
    if options.contact_sheet:
        part = "other" if options.data is not None else options.split
        mistakes = find_mistakes(trained, loader, scores, part, SHOWN_MISTAKES)
        write_contact_sheet(Path(options.contact_sheet), mistakes)
        extra["contact_sheet"] = options.contact_sheet
        extra["mistakes"] = [
            {"image": m.name, "true": m.true, "predicted": m.predicted, "probability": m.probability} for m in mistakes
        ]
    if options.calibrate:
        temperature = calibrate_student(trained, folder, options.checkpoint)
        extra["calibration"] = [calibration_figures(logits_NC, labels_N, t) for t in (1.0, temperature)]
    return extra


def _print_extra_metrics(extra: dict[str, Any], name: str) -> None:
    if "classes" in extra:
        rows = [{key: _format_value(value) for key, value in row.items()} for row in extra["classes"]]
        print_rows(rows, f"{name}, class by class")
    if "calibration" in extra:
        rows = [
            {"temperature": f"{c['temperature']:.4f}", "ECE": show_figure(c["ece"], 4), "NLL": show_figure(c["nll"], 4)}
            for c in extra["calibration"]
        ]
        print_rows(rows, f"{name}, without and with the temperature fitted on validation (kept for predict)")
    if "contact_sheet" in extra:
        out.print(f"the {len(extra['mistakes'])} most confident mistakes of {name}: {extra['contact_sheet']}")
    if "confusion" in extra:
        out.print(f"confusion matrix: {extra['confusion']}")


def _format_value(value: str | float | None) -> str:
    return "-" if value is None else show_figure(value, 2) if isinstance(value, float) else str(value)
