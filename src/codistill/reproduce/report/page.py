"""`codistill report`: one self-contained page about runs, grids and tables. It needs no network and no server."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from pathlib import Path

from codistill.reproduce.report.charts import make_charts
from codistill.reproduce.report.collect import Section, collect_sections
from codistill.runs import Environment
from codistill.utils import InputError, Rows, finite_or_null, on_one_line, write_text

_NAME_COLUMNS = ("network", "method", "peers", "run")
_COST_PREFIXES = ("trained", "training", "deployed", "parameters", "s per run")

# The page may not load anything: the browser enforces it, even if a name in the page were not escaped.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header><div><h1>{title}</h1><p class="soft">Written by codistill {version}</p></div>
<button id="theme" type="button" title="light or dark">light / dark</button></header>
{body}
<script>{plotly}</script>
<script type="application/json" id="data">{data}</script>
<script>{js}</script>
</body>
</html>
"""


def write_report(paths: list[Path], out: Path, title: str | None = None, contact_sheets: bool = False) -> str:
    """Write the page and return a summary: its sections, runs and size.

    Args:
        paths: Run folders, and folders of grids or tables.
        out: The file.
        title: The page's heading.
        contact_sheets: Show the worst mistakes of the first run of each row, as images in the page.

    Raises:
        InputError: a folder contains no runs, or plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("report needs: pip install plotly") from None
    from codistill import __version__

    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file, as in --out report.html")
    sections = collect_sections(paths)
    data = [{"groups": [group.label for group in s.groups], "charts": make_charts(s)} for s in sections]
    page = _PAGE.format(
        policy=_POLICY,
        title=_escape(title or (sections[0].name if len(sections) == 1 else "Runs and tables")),
        version=__version__,
        css=_read_asset("page.css"),
        js=_read_asset("page.js"),
        plotly=get_plotlyjs(),
        data=json.dumps(finite_or_null(data), allow_nan=False).replace("<", "\\u003c"),  # no name can end the script
        body="\n".join(
            _section_html(section, number, _mistakes_html(section) if contact_sheets else "")
            for number, section in enumerate(sections)
        ),
    )
    write_text(out, page)
    runs = sum(len(group.runs) for section in sections for group in section.groups)
    return f"{len(sections)} section{'s' if len(sections) > 1 else ''}, {runs} runs, {len(page) / 2**20:.1f} MB"


def _escape(text: str) -> str:
    """Return text on one line, without control characters, that is no markup."""
    return html.escape(on_one_line(text))


def _read_asset(name: str) -> str:
    return resources.files("codistill.reproduce.report").joinpath(name).read_text()


def _mistakes_html(section: Section) -> str:
    from codistill.reproduce.report.mistakes import mistakes_html  # which imports torch

    return mistakes_html(section)


def _section_html(section: Section, number: int, mistakes: str) -> str:
    """Return a section's HTML: results, group buttons, charts, mistakes (given as HTML), costs, commands."""
    names = [column for column in section.rows[0] if column in _NAME_COLUMNS]
    networks = {row.get("network", "") for row in section.rows}
    if len(networks) == 1 and len(names) > 1:
        names.remove("network")
    costs = [column for column in section.rows[0] if column.startswith(_COST_PREFIXES) and column not in names]
    results = [column for column in section.rows[0] if column not in (*_NAME_COLUMNS, *costs)]
    rows = [{" ".join(names): " ".join(row[name] for name in names)} | row for row in section.rows]
    head = " ".join(names)
    notes = "".join(f"<li>{_escape(note)}</li>" for note in section.notes)
    return "\n".join(
        [
            f"<section><h2>{_escape(section.title)}</h2>",
            f"<p>Network: {_escape(min(networks))}</p>" if len(networks) == 1 and min(networks) else "",
            *(f"<p>{_escape(sentence)}</p>" for sentence in section.summary),
            _table_html([{name: row[name] for name in (head, *results)} for row in rows], section.lower_is_better),
            _failures_html(section.failures),
            f'<div class="chips" id="chips-{number}"></div><div class="charts" id="charts-{number}"></div>',
            mistakes,
            "<h2>Costs of training and deployment</h2>",
            _table_html(_unique_costs([{name: row[name] for name in (head, *costs)} for row in rows]), False),
            f'<details open><summary>Notes</summary><ul class="soft">{notes}</ul></details>',
            _commands_html(section),
            "</section>",
        ]
    )


def _unique_costs(rows: Rows) -> Rows:
    """Keep one row per run: several figures of a run have the same costs."""
    kept: dict[str, dict[str, str]] = {}
    for row in rows:
        name, *rest = row.values()
        kept.setdefault(name.split(", ")[0] + "|" + "|".join(rest), row)
    return [*kept.values()]


def _table_html(rows: Rows, lower_is_better: bool) -> str:
    head = "".join(f'<th class="{"words" if name == "evaluated" else ""}">{_escape(name)}</th>' for name in rows[0])
    lines = []
    for row in rows:
        classes = [
            "words" if name == "evaluated" else difference_class(name, text, lower_is_better)
            for name, text in row.items()
        ]
        cells = [f'<td class="{css_class}">{_escape(text)}</td>' for css_class, text in zip(classes, row.values())]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def difference_class(column: str, text: str, lower_is_better: bool) -> str:
    """Return the CSS class of a difference: good or bad if it is significant (to the paper: above 0.1), else `''`."""
    number = re.match(r"[+-]\d+(\.\d+)?", text)
    if number is None or "n.s." in text or not ("equal cost" in column or "- paper" in column):
        return ""
    value = float(number[0])
    if "- paper" in column and abs(value) <= 0.1:
        return ""
    return "good" if (value < 0) == lower_is_better else "bad"


def _failures_html(failures: list[str]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li>{_escape(line)}</li>" for line in failures)
    return f"<details open><summary>Without a result: {len(failures)}</summary><ul>{items}</ul></details>"


def _commands_html(section: Section) -> str:
    """Return the commands that train each group again, and the machines it ran on."""
    parts = []
    for group in section.groups:
        lines = html.escape("\n".join(run.command for run in group.runs))
        own = sorted({name for run in group.runs for name in run.imported_names})
        warning = f"<p>Runs code that is not codistill's: {_escape(', '.join(own))}</p>" if own else ""
        parts.append(
            f"<details><summary>Train again: {_escape(group.label)}</summary>{warning}"
            f'<pre>{lines}</pre><button type="button" data-copy>copy</button></details>'
        )
    environments = [run.environment for group in section.groups for run in group.runs if run.environment]
    machines = sorted(set(map(_describe_environment, environments)))
    items = "".join(f"<li>{_escape(line)}</li>" for line in machines)
    return f'<h2>Commands</h2>{"".join(parts)}<ul class="soft">{items}</ul>'


def _describe_environment(environment: Environment) -> str:
    e = environment
    where = e.get("gpu") or f"{e.get('machine')} with {e.get('cpus')} CPUs, {e.get('threads')} threads"
    commit = str(e.get("git_commit") or "an installed package")[:12]
    return f"codistill {e.get('codistill')} ({commit}), torch {e.get('torch')}, Python {e.get('python')}, on {where}"
