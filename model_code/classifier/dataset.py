"""Reading a prepared data set: tar shards in, one array of decoded pictures out.

Legend: N pictures, R resize_size. The decoded cache is ``(N, R, R, 3) uint8``, in memory or in a memory-mapped file.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from classifier.errors import DataError
from classifier.serving import Pixels, decode, to_square

IN_MEMORY_BYTES = 2 * 2**30
"""A decoded cache up to this size stays in memory; a larger one is a memory-mapped temporary file."""


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json of a prepared data set."""

    root: Path
    hash: str
    classes: list[str]
    labels: list[str]
    num_pictures: dict[str, int]
    shards: dict[str, list[str]]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def read_info(root: Path) -> DatasetInfo:
    """Raises DataError when ``root`` holds no prepared data set."""
    path = root / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: the channel must be a folder that prepare.py wrote (datasets/<hash>/)")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shards: dict[str, list[str]] = {}
    for shard in found["shards"]:
        shards.setdefault(shard["split"], []).append(shard["name"])
    return DatasetInfo(root, found["hash"], found["classes"], found["labels"], found["num_pictures"], shards)


def members(info: DatasetInfo, split: str) -> Iterator[tuple[str, int, bytes]]:
    """``(member name, class index, stored bytes)`` of every picture, in shard order."""
    for name in info.shards.get(split, []):
        with tarfile.open(info.root / "shards" / name, "r|") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is None:
                    raise DataError(f"{name} holds {member.name!r}, which is not a file: prepare the data set again")
                yield member.name, int(member.name.split("/")[0]), stream.read()


def decoded(info: DatasetInfo, split: str, resize_size: int, threads: int) -> Iterator[tuple[Pixels, int]]:
    """``((R, R, 3) uint8, class index)`` in shard order, decoded by threads (Pillow releases the interpreter lock)."""
    waiting: deque[Future[tuple[Pixels, int]]] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _, label, data in members(info, split):
            waiting.append(pool.submit(_decode_one, data, label, resize_size))
            if len(waiting) >= threads * 16:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode_one(data: bytes, label: int, resize_size: int) -> tuple[Pixels, int]:
    return to_square(decode(data), resize_size), label


def cpu_count() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class DecodedSplit:
    """A split decoded once: ``pictures (N, R, R, 3) uint8`` and ``labels (N,) int64``."""

    pictures: Pixels
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def load_split(info: DatasetInfo, split: str, resize_size: int, threads: int = 0) -> DecodedSplit:
    """Decode a whole split. Raises DataError when the shards do not hold what dataset.json says."""
    count = info.num_pictures.get(split, 0)
    shape = (count, resize_size, resize_size, 3)
    labels = np.zeros(count, dtype=np.int64)
    pictures: Pixels
    if int(np.prod(shape)) <= IN_MEMORY_BYTES:
        pictures = np.empty(shape, dtype=np.uint8)
    else:
        # The file has no name once it is mapped, so nothing is left behind.
        with tempfile.TemporaryFile() as file:
            pictures = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    number = 0
    for pixels, label in decoded(info, split, resize_size, threads or cpu_count()):
        if number < count:
            pictures[number], labels[number] = pixels, label
        number += 1
    if number != count:
        raise DataError(f"split {split!r} holds {number} pictures, dataset.json says {count}: prepare the data set again")
    return DecodedSplit(pictures, labels)
