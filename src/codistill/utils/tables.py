"""Tables as Markdown, CSV and LaTeX, and the escaping of text for each kind of output.

Users choose the names of classes, files and runs. Each kind of output has one function that makes any text harmless in
it: `on_one_line` (terminal; in errors.py), `escape_csv`, `escape_json`, `escape_markdown`, `escape_latex`, and
`html.escape`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from typing import Any

from codistill.utils.errors import on_one_line
from codistill.utils.files import finite_or_null

Rows = list[dict[str, str]]

_FORMULA = r"=+\-@\uff1d\uff0b\uff0d\uff20"
"""Characters that begin a formula, for the inside of a regular expression's brackets."""

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def markdown(rows: Rows) -> str:
    """Write rows as a Markdown table."""
    head = "| " + " | ".join(map(escape_markdown, rows[0])) + " |"
    rule = "|" + "|".join("--:" if looks_numeric(cell) else "---" for cell in rows[0].values()) + "|"
    lines = ("| " + " | ".join(map(escape_markdown, row.values())) + " |" for row in rows)
    return "\n".join([head, rule, *lines]) + "\n"


def looks_numeric(cell: str) -> bool:
    """Return whether a cell begins like a number, so that its column is aligned right."""
    return cell[:1] in "0123456789+-"


def escape_markdown(text: str) -> str:
    """Return text on one line that Markdown and HTML show unchanged anywhere but at the start of a line."""
    text = re.sub(r"([\\`*_{}\[\]|~#$])", r"\\\1", " ".join(on_one_line(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_page(paragraphs: Iterable[str], rows: Rows, notes: Iterable[str] = ()) -> str:
    """Write paragraphs of plain text, a table, and a list of notes as Markdown."""
    items = "".join(f"- {escape_markdown(note)}\n" for note in notes)
    return "\n\n".join([*map(_escape_paragraph, paragraphs), markdown(rows) + f"\n{items}" * bool(items)])


def _escape_paragraph(text: str) -> str:
    """Return text as `escape_markdown` does, that begins no list and no quotation either."""
    return re.sub(r"^(\d*)([-+>.)])", r"\1\\\2", escape_markdown(text))


def comma_separated(rows: Rows) -> str:
    """Write rows as CSV; cells that a spreadsheet would take for formulas are disarmed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([escape_csv(name) for name in rows[0]])
    writer.writerows([escape_csv(cell) for cell in row.values()] for row in rows)
    return stream.getvalue()


def escape_csv(cell: object) -> str:
    """Return a cell's text on one line, with an apostrophe before what a spreadsheet would take for a formula.

    >>> escape_csv("=HYPERLINK(1)"), escape_csv("a;=cmd()"), escape_csv("+1.25 ± 0.10 (n.s.)"), escape_csv("-")
    ("'=HYPERLINK(1)", "a;'=cmd()", '+1.25 ± 0.10 (n.s.)', '-')
    """
    text = on_one_line(cell)
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?( \([\w. =%-]*\))?", text, re.ASCII)
    # Where the decimal sign is a comma, spreadsheets begin a new cell at a semicolon.
    text = text if number else re.sub(rf"([;|]\s*)(?=[{_FORMULA}])", r"\1'", text)
    return f"'{text}" if re.match(rf"\s*[{_FORMULA}]", text) and text != "-" and not number else text


def escape_json(values: Any, indent: int | None = None) -> str:
    """Return JSON in which every character that a terminal might obey is escaped by its number."""
    text = json.dumps(finite_or_null(values), indent=indent, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def latex(rows: Rows, caption: str) -> str:
    """Write rows as a LaTeX table."""
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [" & ".join(map(escape_latex, cells)) + r" \\" for cells in (list(rows[0]), *(r.values() for r in rows))]
    body = "\n".join([lines[0], r"\hline", *lines[1:]])
    return (
        "\\begin{table}\n\\centering\n\\small\n"
        f"\\caption{{{escape_latex(caption)}}}\n\\begin{{tabular}}{{{columns}}}\n\\hline\n{body}\n\\hline\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def escape_latex(text: str) -> str:
    """Escape every special character of LaTeX."""
    return "".join(_LATEX.get(character, character) for character in on_one_line(text))
