"""The web page with a content security policy that allows exactly its own inline script and style."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

# In the deployed folder the page lies beside this file; in the repository under web/.
_PLACES = (Path(__file__).parent / "index.html", Path(__file__).resolve().parents[2] / "web" / "index.html")


@functools.cache
def page() -> tuple[str, str]:
    """The page's text and its Content-Security-Policy."""
    text = next(path for path in _PLACES if path.is_file()).read_text(encoding="utf-8")
    return text, policy(text)


def policy(text: str) -> str:
    """A policy with the hashes of the page's ``<script>`` and ``<style>`` elements: nothing else may run."""
    scripts, styles = (
        " ".join(_hash(content) for content in re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL))
        for name in ("script", "style")
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(content: str) -> str:
    """A CSP source expression for inline content."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
