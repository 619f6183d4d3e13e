"""What a verification finds."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One fault: which check saw it, in which state or resource, the value there, and what to do."""

    check: str
    where: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.value}; {self.remedy}"


def shown(value: object) -> str:
    """A value, short enough for one line."""
    text = str(value)
    return text if len(text) <= 160 else f"{text[:157]}…"
