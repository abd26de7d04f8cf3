"""Tables as Markdown, CSV and LaTeX; all cells are escaped, since users choose some of the names in them."""

from __future__ import annotations

import csv
import io
import re

from codistill.utils.errors import on_one_line

Rows = list[dict[str, str]]

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "\n": " ",
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


def comma_separated(rows: Rows) -> str:
    """Write rows as CSV; cells that a spreadsheet would take for formulas are disarmed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_disarm_formula(name) for name in rows[0]])
    writer.writerows([_disarm_formula(cell) for cell in row.values()] for row in rows)
    return stream.getvalue()


def _disarm_formula(cell: str) -> str:
    """Put an apostrophe before a cell that a spreadsheet would take for a formula."""
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?( \([^()]*\))?", cell)
    return f"'{cell}" if cell[:1] in "=+-@\t" and cell != "-" and not number else cell


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
    return "".join(_LATEX.get(character, character) for character in text)
