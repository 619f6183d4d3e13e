"""The shell of every page: one HTML file that needs no network, with plotly packed inside.

The content policy lets only the page's own two scripts run, by their hashes: markup that somebody smuggled in stays text. plotly.js
(4.8 MB) is stored as gzip in base64, about 2 MB, and unpacked when the first plot comes into view.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from classifier.markup import escape

FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Section:
    """A part of the page: the heading's text and the markup under it."""

    ident: str
    title: str
    content: str

    def to_html(self) -> str:
        """``data-state`` changes with the content: a page that refreshes itself replaces what changed."""
        state = hashlib.sha256(self.content.encode()).hexdigest()[:16]
        return (
            f'<section id="{self.ident}" data-state="{state}" aria-labelledby="{self.ident}-heading">'
            f'<h2 id="{self.ident}-heading">{escape(self.title)}</h2>{self.content}</section>\n'
        )


@functools.cache
def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> tuple[str, str]:
    """``(plotly.js as base64 of gzip, its hash for the policy)``."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode("ascii"), _hash(source)


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode('ascii')}'"


def _policy(*, live: bool) -> str:
    scripts = f"{_hash(_asset('page.js').encode())} {_plotly()[1]}"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; img-src data: blob:"
    return f"{policy}; base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")


_LIVE = (
    '<p class="live"><button type="button" id="pause" aria-pressed="false">Pause refreshing</button>'
    '<span id="live-status">Reads itself again every 5 s</span></p>'
)


def page(title: str, head: str, sections: Sequence[Section], *, live: bool = False) -> str:
    """The whole page: ``head`` is markup under the heading of the first level; ``live`` makes it read itself again every 5 s."""
    links = "".join(f'<li><a href="#{part.ident}">{escape(part.title)}</a></li>' for part in sections)
    state = hashlib.sha256(head.encode()).hexdigest()[:16]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(live=live)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_asset("page.css")}</style></head>\n'
        f'<body><a class="skip" href="#content">Skip to the content</a><header><h1>{escape(title)}</h1>{_LIVE if live else ""}'
        f'</header><nav aria-label="Sections" id="sections"><ul>{links}</ul></nav>\n<main id="content" tabindex="-1">'
        f'<div id="head" data-state="{state}">{head}</div>{"".join(part.to_html() for part in sections)}</main>\n'
        '<footer><p class="soft">Plots: press Tab to reach one, then + and − to zoom, the arrow keys to move, 0 to see all; '
        "the numbers are under each plot.</p></footer>\n"
        f'<script type="text/plain" id="plotly">{_plotly()[0]}</script>\n<script>{_asset("page.js")}</script></body></html>\n'
    )
