"""From file names to splits and classes, one name at a time: a source may hold millions.

A ``Survey`` sees every name once and ends in a ``Scheme``, which then places each name without knowing the others.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from classifier.errors import DataError

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
DRAWN_SHARES = {"valid": 0.15, "test": 0.15}
_PREFIX = re.compile(r"^(?:n\d{8}[-_]|\d{1,5}\.\s*)(?=\S)")


@dataclass(frozen=True)
class Place:
    """Where a file belongs: its split and its class folder."""

    split: str
    folder: str


def is_hidden(name: str) -> bool:
    """Files that tools leave behind and nobody means as pictures."""
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini") for part in name.split("/"))


def readable_labels(folders: Sequence[str]) -> list[str]:
    """Labels for class folders, by one rule.

    A leading WordNet id (``n02088094-``) or number with a dot (``001.``) is dropped and underscores become blanks, for all
    folders; when that would make two labels equal, all folders keep their names.
    """
    labels = [_PREFIX.sub("", folder).replace("_", " ").strip() or folder for folder in folders]
    return labels if len(set(labels)) == len(labels) else list(folders)


def _split_of(part: str) -> str | None:
    return _SPLIT_NAMES.get(part.lower())


@dataclass(frozen=True)
class Scheme:
    """How folders are to be read: ``depth`` folders that all names share, then splits (or not), then classes."""

    depth: int
    splits: bool

    def place(self, name: str) -> Place | None:
        """The name's split and class; None for a file outside the class folders. A name that ends in ``/`` is a folder."""
        parts = name.split("/")
        if self.splits:
            split = _split_of(parts[self.depth]) if len(parts) >= self.depth + 3 else None
            return Place(split, parts[self.depth + 1]) if split else None
        return Place("train", parts[self.depth]) if len(parts) >= self.depth + 2 else None


class Survey:
    """Sees every name once and keeps a few numbers."""

    _DEEPEST = 2
    """Split folders are looked for under at most this many common folders."""

    def __init__(self) -> None:
        self._common: list[str] | None = None
        self._shortest = 0
        self._split_at: set[int] = set()

    def add(self, name: str) -> None:
        """Take note of one name that is not hidden. A folder without files (a name ending in ``/``) may be a class too."""
        parts = name.split("/")
        if self._common is None:
            self._common, self._shortest = parts, len(parts)
        same = 0
        for ours, theirs in zip(self._common, parts, strict=False):
            if ours != theirs:
                break
            same += 1
        self._common, self._shortest = self._common[:same], min(self._shortest, len(parts))
        for depth in range(min(self._DEEPEST, len(parts) - 3) + 1):
            if _split_of(parts[depth]):
                self._split_at.add(depth)

    def scheme(self) -> Scheme:
        """Raises DataError when no name was seen."""
        if self._common is None:
            raise DataError(
                "the source holds no files: give class folders with pictures in them, such as train/<class>/<picture>.jpg"
            )
        # More than one folder at a level means that these are classes, so no split folders follow.
        depths = [depth for depth in sorted(self._split_at) if depth <= len(self._common)]
        if depths:
            return Scheme(depths[0], True)
        return Scheme(max(0, min(len(self._common), self._shortest - 2)), False)


def check_classes(classes: Sequence[str], splits: set[str]) -> None:
    """``classes``: all class folders; ``splits``: the splits that exist. Raises DataError when nothing can be trained on."""
    if not classes:
        raise DataError("no class folders with files were found: expected <class>/<picture>.jpg or train/<class>/<picture>.jpg")
    if "train" not in splits:
        raise DataError("there are split folders but none called train: add train/<class>/<picture>")
    spelled: dict[str, str] = {}
    for name in classes:
        other = spelled.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise DataError(f"the classes {other!r} and {name!r} differ in spelling only: make them one folder")
    if len(classes) == 1:
        raise DataError(f"only one class, {classes[0]!r}, was found: a classifier needs at least two class folders")


def missing_splits(splits: set[str]) -> list[str]:
    """The splits that must be drawn from train."""
    return [split for split in SPLITS if split not in splits]


def lot(seed: int, name: str) -> bytes:
    """The name's lot in the draw: 16 bytes that look random but depend on nothing else, on any machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]


def drawn_split(rank: int, count: int, missing: Sequence[str]) -> str:
    """The split of the ``rank``-th lot (from 0) among the ``count`` of its class.

    At least one picture stays for training and, where possible, one goes to each drawn split.
    """
    start = 0
    for split in missing:
        taken = min(max(1, round(count * DRAWN_SHARES[split])), max(0, count - start - 1))
        if start <= rank < start + taken:
            return split
        start += taken
    return "train"
