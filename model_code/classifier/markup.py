"""Text of others made harmless, and the few HTML elements that the pages are built of.

Class names, file names and messages come from outside. ``plain`` makes what they hide visible; ``escape`` makes them inert in HTML,
``in_plot`` in plotly's labels, which know a few HTML tags, ``in_json`` in a script element, ``in_csv`` in a spreadsheet.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TEXT = 500
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _visible(character: str) -> str:
    # Cc: controls and line ends; Cf: marks that turn the direction of text, or have no width; Cs, Co: nobody can see them.
    kind = unicodedata.category(character)
    return f"⟨U+{ord(character):04X}⟩" if kind in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else character


def plain(value: object, limit: int = MAX_TEXT) -> str:
    """One line in which nothing is hidden: control and direction characters are named, long texts are cut; numbers rounded."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    shown = "".join(_visible(character) for character in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def escape(value: object) -> str:
    """Text for HTML, between tags and in quoted attributes."""
    return html.escape(plain(value), quote=True)


def name(value: object) -> str:
    """A name given by somebody else: its direction stays its own."""
    return f"<bdi>{escape(value)}</bdi>"


def in_plot(value: object, limit: int = 28) -> str:
    """Text for a plotly label: no tags, no entities, no templates, no TeX."""
    text = plain(value)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    for character, other in (("&", "＆"), ("<", "‹"), (">", "›"), ("%{", "％{"), ("$", "＄")):
        text = text.replace(character, other)
    return text


def finite(value: Any) -> Any:
    """The same JSON value with null for what JSON cannot say (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


def in_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(finite(value), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cell(value: object) -> str:
    if value is None or isinstance(value, (int, float)):
        return "" if value is None or not math.isfinite(value) else str(value)
    text = "".join(_visible(character) if character not in "\t\r\n" else character for character in str(value))
    # OWASP, CSV injection: a spreadsheet takes such a cell for a formula. Numbers may keep their sign.
    if text.lstrip(" ").startswith(_FORMULA) and not _NUMBER.fullmatch(text):
        return "'" + text
    return text


def in_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file (RFC 4180) of which no cell is a formula."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_cell(column) for column in head])
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


@dataclass(frozen=True)
class Html:
    """Markup that is safe already; every other value in a table is escaped."""

    text: str
    sort: object = None
    """What a sortable table sorts the cell by."""


@dataclass(frozen=True)
class Chart:
    """A plot with what it says in words and in numbers."""

    ident: str
    title: str
    summary: str
    figure: dict[str, Any]
    """Plotly's JSON: ``data`` and ``layout`` with ``height`` in pixels."""
    head: list[str]
    rows: list[list[object]] = field(default_factory=list)


def setting(value: object) -> object:
    """A hyperparameter as it was passed, in text: a long number is rounded for the eye."""
    if isinstance(value, str) and len(value) > 7 and "." in value and _NUMBER.fullmatch(value):
        return f"{float(value):.4g}"
    return value


def _content(value: object) -> str:
    if isinstance(value, Html):
        return value.text
    return name(value) if isinstance(value, str) else escape(value)


def _table_cell(value: object, first: bool) -> str:
    kind = ' class="n"' if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
    sort = value.sort if isinstance(value, Html) else value
    order = f' data-sort="{escape(repr(float(sort)))}"' if isinstance(sort, (int, float)) and math.isfinite(sort) else ""
    return f'<th scope="row"{kind}{order}>{_content(value)}</th>' if first else f"<td{kind}{order}>{_content(value)}</td>"


def table(ident: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], *, sortable: bool = False) -> str:
    """A table in a region of its own that scrolls when it is wider or longer than its place; the first cell names the row."""
    button = '<button type="button" class="sort">{}</button>' if sortable else "{}"
    numeric = [
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in (rows[0] if rows else [None] * len(head))
    ]
    top = "".join(
        f'<th scope="col"{" class=n" if right else ""}>{button.format(escape(column))}</th>'
        for column, right in zip(head, numeric, strict=True)
    )
    body = "".join("<tr>" + "".join(_table_cell(value, n == 0) for n, value in enumerate(row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" id="{ident}" aria-label="{escape(caption)}">'
        f"<table{' class=sortable' if sortable else ''}><caption>{escape(caption)}</caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(ident: str, summary: str, content: str, *, opened: bool = False) -> str:
    """A part that opens on demand."""
    state = " open" if opened else ""
    return f'<details id="{ident}"{state}><summary id="{ident}-summary">{escape(summary)}</summary>{content}</details>'


def plot(chart: Chart) -> str:
    """The chart's place, drawn when it comes into view; in words above it, in numbers behind a summary."""
    height = int(chart.figure["layout"]["height"])
    numbers = table(f"{chart.ident}-table", f"{chart.title}: the numbers", chart.head, chart.rows)
    return (
        f'<figure class="plot"><figcaption><strong>{escape(chart.title)}</strong> '
        f'<span id="{chart.ident}-summary-text">{escape(chart.summary)}</span></figcaption>'
        f'<div class="canvas" id="{chart.ident}" tabindex="0" role="img" aria-label="{escape(chart.title)}" '
        f'aria-describedby="{chart.ident}-summary-text" style="height:{height}px"></div>'
        f'<script type="application/json" data-for="{chart.ident}">{in_json(chart.figure)}</script>'
        f"{details(f'{chart.ident}-numbers', f'{chart.title}: the numbers', numbers)}</figure>"
    )


def absent(sentence: str) -> str:
    """Why there is nothing to show."""
    return f'<p class="absent">{escape(sentence)}</p>'
