"""Tables as Markdown, CSV and LaTeX. Cells are text that a user may have chosen, so everything is escaped."""

from __future__ import annotations

import csv
import io
import re

Rows = list[dict[str, str]]

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "\n": " ",
}  # fmt: skip


def markdown(rows: Rows) -> str:
    """Write rows as a Markdown table."""
    head = "| " + " | ".join(map(escape_markdown, rows[0])) + " |"
    rule = "|" + "|".join("--:" if _is_number(cell) else "---" for cell in rows[0].values()) + "|"
    lines = ("| " + " | ".join(map(escape_markdown, row.values())) + " |" for row in rows)
    return "\n".join([head, rule, *lines]) + "\n"


def _is_number(cell: str) -> bool:
    return cell[:1] in "0123456789+-"


def escape_markdown(text: str) -> str:
    """Escape what Markdown or HTML would read as a sign."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def comma_separated(rows: Rows) -> str:
    """Write rows as CSV; a cell that a spreadsheet would run as a formula gets an apostrophe in front."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_harmless(name) for name in rows[0]])
    writer.writerows([_harmless(cell) for cell in row.values()] for row in rows)
    return stream.getvalue()


def _harmless(cell: str) -> str:
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
    """Escape every sign that LaTeX reads as its own."""
    return "".join(_LATEX.get(sign, sign) for sign in text)
