"""Near-duplicates: pictures that look the same although their bytes differ (compressed again, resized, brightened).

Two hashes of 256 bits must agree within the same distance: the difference hash, which is compared first, and the perceptual
hash, since on simple pictures (handwriting, icons) the first alone gives false alarms. Distances are numbers of bits.

Not all pairs are compared. Cut a hash into ``distance + 1`` bands: two hashes that differ in at most ``distance`` bits agree
in at least one band, so only pictures that share a band are. Memory: some 100 bytes for a picture, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

BITS = 256
COMMON = 200
"""A band that more pictures share than this says nothing of them (a white border, an empty sky) and is skipped."""
COMPARED = 2**16
"""Pairs that are compared at a time."""

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


def near_pairs(pictures: Iterable[tuple[int, bytes, bytes]], distance: int) -> Iterator[tuple[int, int, int]]:
    """``(ident, ident, differing bits)`` of look-alikes among ``(ident, difference hash, perceptual hash)``.

    A pair may come more than once. Both hashes are 32 bytes.
    """
    idents, looks, checks = _arrays(pictures)
    for number in range(distance + 1):
        for left, right in _candidates(_band(looks, number, distance + 1)):
            apart = _distance(looks, left, right)
            near = (apart <= distance) & (_distance(checks, left, right) <= distance)
            for one, other, bits in zip(idents[left[near]], idents[right[near]], apart[near], strict=True):
                yield min(int(one), int(other)), max(int(one), int(other)), int(bits)


def _arrays(pictures: Iterable[tuple[int, bytes, bytes]]) -> tuple[Numbers, Words, Words]:
    kind = np.dtype([("ident", "<i8"), ("look", "<u8", (4,)), ("check", "<u8", (4,))])
    packed = bytearray()
    for ident, look, check in pictures:
        packed += ident.to_bytes(8, "little") + look + check
    table = np.frombuffer(packed, dtype=kind) if packed else np.zeros(0, dtype=kind)
    return table["ident"], table["look"], table["check"]


def _band(looks: Words, number: int, bands: int) -> Words:
    """Bits ``[number * BITS / bands, (number + 1) * BITS / bands)`` of each hash, as one number (its first 64 bits)."""
    start, end = number * BITS // bands, (number + 1) * BITS // bands
    length = min(end - start, 64)
    word, shift = divmod(start, 64)
    value = looks[:, word] >> np.uint64(shift)
    if shift and word < 3:
        value = value | (looks[:, word + 1] << np.uint64(64 - shift))
    return value & np.uint64((1 << length) - 1)


def _candidates(keys: Words) -> Iterator[tuple[Numbers, Numbers]]:
    """Positions of pairs with the same key, some thousands at a time; keys that are too common are left out."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    _, first, counts = np.unique(ordered, return_index=True, return_counts=True)
    size = np.repeat(counts, counts)
    place = np.arange(len(keys)) - np.repeat(first, counts)
    for step in range(1, int(min(counts.max(initial=0), COMMON))):
        # The picture ``step`` places further on has the same key when that many of the group are left.
        left = np.flatnonzero((size <= COMMON) & (place + step < size))
        for start in range(0, len(left), COMPARED):
            part = left[start : start + COMPARED]
            yield order[part], order[part + step]


def _distance(words: Words, left: Numbers, right: Numbers) -> Numbers:
    return np.asarray(np.bitwise_count(words[left] ^ words[right]).sum(axis=1, dtype=np.int64))
