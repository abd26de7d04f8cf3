"""The contact sheets of a report: the worst mistakes of the first run of each row, as images within the page."""

from __future__ import annotations

import base64
import html

from codistill.evaluation import draw_contact_sheet, png_bytes
from codistill.reproduce.report.collect import RunData, Section
from codistill.training import find_test_mistakes, load_run
from codistill.utils import InputError

SHOWN = 12
COLORS = 64
"""Colors of a sheet in the page, so that it stays small."""


def mistakes_html(section: Section) -> str:
    """Return a section's sheets, each in a folded part of the page; a row whose images are missing says so."""
    parts = []
    for group in section.groups:
        run = next((run for run in group.runs if run.result is not None), None)
        if run is None:
            continue
        label = html.escape(group.label)
        summary = f"<summary>{label}, seed {run.config.seed}</summary>"
        parts.append(f"<details>{summary}{_sheet_html(run, label)}</details>")
    return "<h2>Most confident mistakes on test images</h2>" + "".join(parts) if parts else ""


def _sheet_html(run: RunData, label: str) -> str:
    """Return the sheet as an image, or why there is none."""
    try:
        mistakes = find_test_mistakes(load_run(run.path), SHOWN)
    except InputError as error:
        return f'<p class="soft">Not shown: {html.escape(str(error))}</p>'
    sheet = base64.b64encode(png_bytes(draw_contact_sheet(mistakes), COLORS)).decode()
    return f'<img class="sheet" alt="most confident mistakes of {label}" src="data:image/png;base64,{sheet}">'
