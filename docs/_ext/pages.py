"""What the pages need beyond Sphinx: tables of options, read from their dataclasses, and math that needs no network.

Equations become MathML, which browsers draw themselves; Sphinx's own way loads a program from another server.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, ClassVar

from docutils import nodes
from docutils.core import publish_doctree
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


class Options(SphinxDirective):
    """A table of the fields of one class of `codistill.config`: option, default, values, what it does."""

    required_arguments = 1
    optional_arguments = 1
    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        """Return the table; the second argument is the prefix of the flags."""
        import codistill.config

        config = getattr(codistill.config, self.arguments[0])
        prefix = self.arguments[1] if len(self.arguments) > 1 else "--"
        rows = [_row(config, field, prefix) for field in dataclasses.fields(config) if field.name != "method"]
        return [_table(("option", "default", "values", "what it does"), (24, 12, 18, 46), rows)]


def _row(config: type, field: dataclasses.Field, prefix: str) -> tuple[str, ...]:
    hint = typing.get_type_hints(config, include_extras=True)[field.name]
    flag = f"``{prefix}{field.name.replace('_', '-')}``"
    default = "" if field.default in (None, ()) else f"``{field.default}``"
    return flag, default, _values(hint), _docstring(config, field.name)


def _values(hint: Any) -> str:
    """Return an annotation in words: the range, the choices, or the type."""
    extras = [extra.words for extra in getattr(hint, "__metadata__", ()) if hasattr(extra, "words")]
    inner = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    parts = [part for part in (typing.get_args(inner) or (inner,)) if part is not type(None)]
    if typing.get_origin(inner) is typing.Literal:
        return ", ".join(map(str, parts))
    if extras:
        return ", ".join(extras)
    if inner is bool:
        return "on or off"
    words = {int: "a number", float: "a number", str: "text"}
    return ", ".join(_values(p) if typing.get_origin(p) else words.get(p, "") for p in parts if p is not Ellipsis)


def _docstring(config: type, name: str) -> str:
    for base in config.__mro__:
        if base.__module__.startswith("codistill"):
            docs = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            if (base.__qualname__, name) in docs:
                return " ".join(docs[base.__qualname__, name]).strip().replace("`", "``").replace("````", "``")
    raise ValueError(f"{config.__name__}.{name} has no docstring")


def _table(heads: tuple[str, ...], widths: tuple[int, ...], rows: list[tuple[str, ...]]) -> nodes.Node:
    group = nodes.tgroup(cols=len(heads))
    group += [nodes.colspec(colwidth=width) for width in widths]
    group += nodes.thead("", _cells(heads))
    group += nodes.tbody("", *[_cells(row) for row in rows])
    return nodes.table("", group)


def _cells(texts: tuple[str, ...]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", *publish_doctree(text).children) for text in texts])


def _draw_math(translator: Any, node: nodes.Element) -> None:
    block = isinstance(node, nodes.math_block)
    tree = latex2mathml.tex2mathml(node.astext().replace("\n", " "), as_block=block)
    translator.body.append(f'<div class="equation-block">{tree}</div>' if block else str(tree))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directive and the math."""
    app.add_directive("options", Options)
    app.add_html_math_renderer("mathml", inline_renderers=(_draw_math, None), block_renderers=(_draw_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
