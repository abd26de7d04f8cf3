"""`codistill export RUN`: the deployed student as a file, checked against the run, with its model card."""

from __future__ import annotations

from pathlib import Path

from codistill.cli.console import err, out
from codistill.cli.option_types import ExportOptions
from codistill.cli.options import Parsed
from codistill.deploy import SUFFIXES, check_targets, export_student, make_model_card, read_card_records
from codistill.training import deployed_name, load_run, load_without_images
from codistill.utils import InputError, write_text


def run(parsed: Parsed) -> int:
    """Write the files, and print their names and the largest difference of outputs."""
    options: ExportOptions = parsed.options
    folder = Path(parsed.positionals[0])
    path = Path(options.out) if options.out else folder / f"student{SUFFIXES[options.format]}"
    try:
        trained = load_run(folder, options.data_dir, "cpu", options.checkpoint)
    except InputError as error:  # if only the images are missing, noise is enough to compare outputs
        trained = load_without_images(folder, "cpu", why=str(error), checkpoint=options.checkpoint)
        err.print(f"the file is checked on noise, since the run's images cannot be loaded ({error})")
    *_, card = targets = check_targets(trained, path, options.format)
    records = read_card_records(folder, options.checkpoint)  # before anything is written
    difference = export_student(trained, path, options.format, records.temperature)
    write_text(card, make_model_card(trained, records, path, difference, options.license, options.checkpoint))
    beside = [target.name for target in reversed(targets[1:])]
    out.print(f"wrote {path}, and {' and '.join(beside)} beside it")
    out.print(
        f"largest difference of its outputs, in its own runtime, from those of the trained {deployed_name(trained)}: "
        f"{difference:.3g}"
    )
    return 0
