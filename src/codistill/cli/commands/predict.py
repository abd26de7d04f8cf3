"""`codistill predict RUN IMAGES ...`: the deployed student's most probable classes, as CSV or JSON."""

from __future__ import annotations

from codistill.cli.console import show_progress
from codistill.cli.option_types import PredictOptions
from codistill.cli.options import Parsed
from codistill.deploy import find_images, format_csv, load_predictor, predict_images
from codistill.utils import InputError, escape_json, set_progress_display, track


def run(parsed: Parsed) -> int:
    """Print one row per file; the row of a file that cannot be read holds the error."""
    options: PredictOptions = parsed.options
    for name, value in (("top", options.top), ("batch-size", options.batch_size)):
        if value < 1:
            raise InputError(f"--{name} is {value}; give at least 1")
    files = find_images(parsed.positionals[1:])
    predictor = load_predictor(parsed.positionals[0], options.device, options.checkpoint)
    top = min(options.top, len(predictor.data_info["classes"]))
    set_progress_display(show_progress)
    answers = predict_images(predictor, files, top, options.batch_size)
    rows = [row for _, row in zip(track(files, "reading images"), answers)]
    if options.json:
        print(escape_json(rows, indent=2))
    else:
        print(format_csv(rows, top), end="")
    errors = [row["error"] for row in rows if "error" in row]
    if len(errors) == len(rows):
        raise InputError(f"predict: none of the {len(rows)} files can be classified ({errors[0]})")
    return 0
