"""From file names to splits and classes."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
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
_SEEDED_SHARES = {"valid": 0.15, "test": 0.15}
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


def _split_depth(names: Iterable[tuple[str, ...]]) -> int | None:
    """How many top folders stand before the split folders; None when there are no split folders."""
    names = list(names)
    for depth in range(3):
        if depth and len({parts[:depth] for parts in names}) > 1:
            return None  # more than one top folder: these are classes
        if any(len(parts) >= depth + 3 and parts[depth].lower() in _SPLIT_NAMES for parts in names):
            return depth
    return None


def place(names: Sequence[str], seed: int) -> tuple[dict[str, Place], str, list[str]]:
    """Give every visible file a split and a class.

    Returns ``(places by name, "given"|"seeded", notes)``. Files outside class folders get no place. Missing splits are
    drawn from train, stratified by class, with ``seed``. Raises DataError when there is nothing to train on.
    """
    parts = {name: tuple(name.split("/")) for name in names if not is_hidden(name)}
    if not parts:
        raise DataError("the source holds no files: give class folders with pictures in them, such as train/<class>/<picture>.jpg")
    depth = _split_depth(parts.values())
    if depth is not None:
        places = {
            name: Place(_SPLIT_NAMES[p[depth].lower()], p[depth + 1])
            for name, p in parts.items()
            if len(p) >= depth + 3 and p[depth].lower() in _SPLIT_NAMES
        }
    else:
        places = _places_without_splits(parts)
    _need_classes(places)
    missing = [split for split in SPLITS if not any(found.split == split for found in places.values())]
    if "train" in missing:
        raise DataError("there are split folders but none called train: add train/<class>/<picture>")
    if not missing:
        return places, "given", []
    shares = {split: _SEEDED_SHARES[split] for split in missing}
    note = f"no {' and no '.join(missing)} folder: drawn from train, stratified by class, seed {seed}"
    return _draw(places, shares, seed), "seeded", [note]


def _places_without_splits(parts: dict[str, tuple[str, ...]]) -> dict[str, Place]:
    """Class folders right at the top, or below folders that all files share."""
    depth = 0
    while len({p[: depth + 1] for p in parts.values()}) == 1 and all(len(p) >= depth + 3 for p in parts.values()):
        depth += 1
    return {name: Place("train", p[depth]) for name, p in parts.items() if len(p) >= depth + 2}


def _need_classes(places: dict[str, Place]) -> None:
    classes = sorted({found.folder for found in places.values() if found.split == "train"})
    if not classes:
        raise DataError("no class folders with files were found: expected <class>/<picture>.jpg or train/<class>/<picture>.jpg")
    if len(classes) == 1:
        raise DataError(f"only one class, {classes[0]!r}, was found: a classifier needs at least two class folders")


def _draw(places: dict[str, Place], shares: dict[str, float], seed: int) -> dict[str, Place]:
    by_class: dict[str, list[str]] = defaultdict(list)
    for name, found in places.items():
        if found.split == "train":
            by_class[found.folder].append(name)
    result = dict(places)
    for folder in sorted(by_class):
        names = sorted(by_class[folder])
        random.Random(f"{seed}:{folder}").shuffle(names)  # noqa: S311 - a reproducible split, not a secret
        start = 0
        for split, share in shares.items():
            # At least one picture stays for training and, where possible, one goes to each drawn split.
            count = min(max(1, round(len(names) * share)), max(0, len(names) - start - 1))
            for name in names[start : start + count]:
                result[name] = Place(split, folder)
            start += count
    return result


def balance(places: Iterable[Place]) -> dict[str, Counter[str]]:
    """Pictures per class, by split."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for found in places:
        counts[found.split][found.folder] += 1
    return counts
