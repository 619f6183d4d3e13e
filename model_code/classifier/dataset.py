"""Reading a prepared data set: tar shards in, pictures by number out.

Legend: N pictures, R side of a decoded square. The decoded cache is ``(N, R, R, 3) uint8``, in memory or in a memory-mapped file.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from classifier.cpus import cpu_count
from classifier.errors import DataError
from classifier.serving import Pixels, decode, to_square

Labels = npt.NDArray[np.int64]


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
    """Raises DataError when ``root`` holds no prepared data set, or not all of it."""
    path = root / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path} is missing: the channel must be a folder that prepare.py wrote (datasets/<hash>/)")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    shards: dict[str, list[str]] = {}
    for shard in found["shards"]:
        file = root / "shards" / shard["name"]
        size = file.stat().st_size if file.is_file() else 0
        if size != shard.get("bytes", size) or not file.is_file():
            raise DataError(f"{file} has {size:,} bytes, dataset.json says {shard.get('bytes', 0):,}: prepare the data set again")
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
    return to_square(decode(data, resize_size), resize_size), label


class Pictures(Protocol):
    """The pictures of one split by number. Safe to read from several threads."""

    @property
    def labels(self) -> Labels:
        """Class of each picture, ``(N,)``."""

    @property
    def place(self) -> str:
        """Where they are kept: ``memory``, ``disk`` or ``shards``."""

    def __len__(self) -> int:
        """N."""

    def picture(self, number: int) -> Pixels:
        """``(H, W, 3) uint8``."""


@dataclass(frozen=True)
class DecodedSplit:
    """A split decoded once: ``pictures (N, R, R, 3) uint8``, in memory or in a memory-mapped file, and ``labels (N,) int64``."""

    pictures: Pixels
    labels: Labels
    place: str = "memory"

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, number: int) -> Pixels:
        pixels: Pixels = self.pictures[number]
        return pixels


class ShardSplit:
    """A split that stays as it is stored: pictures are read from the shards by position and decoded when they are asked for.

    Memory holds 24 bytes a picture. ``side`` is the short side that prepare.py gave the pictures.
    """

    place = "shards"

    def __init__(self, info: DatasetInfo, split: str) -> None:
        """Raises DataError when the shards do not hold what dataset.json says."""
        rows: list[tuple[int, int, int, int]] = []
        names = info.shards.get(split, [])
        for shard, name in enumerate(names):
            with tarfile.open(info.root / "shards" / name, "r:") as tar:
                rows += [(shard, member.offset_data, member.size, int(member.name.split("/")[0])) for member in tar]
        _require_count(split, len(rows), info)
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        self._shard, self._offset, self._size = table[:, 0].astype(np.int32), table[:, 1], table[:, 2].astype(np.int32)
        self.labels: Labels = table[:, 3].copy()
        self._files = [os.open(info.root / "shards" / name, os.O_RDONLY) for name in names]
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, number: int) -> bytes:
        """The picture's bytes; ``pread`` has no file position, so threads do not disturb each other."""
        return os.pread(self._files[self._shard[number]], int(self._size[number]), int(self._offset[number]))

    def picture(self, number: int) -> Pixels:
        return decode_stored(self.stored(number))


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def decode_stored(data: bytes) -> Pixels:
    """A picture as prepare.py stored it: upright, RGB or grey; ``(H, W, 3) uint8``.

    JPEGs go through simplejpeg, which is twice as fast as Pillow over the same libjpeg-turbo and gives the same pixels.
    """
    if data[:2] == b"\xff\xd8":
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    return np.array(decode(data))


def _require_count(split: str, found: int, info: DatasetInfo) -> None:
    if found != info.num_pictures.get(split, 0):
        said = info.num_pictures.get(split, 0)
        raise DataError(f"split {split!r} holds {found} pictures, dataset.json says {said}: prepare the data set again")


def available_memory() -> int:
    """Bytes that this process may still use: the machine's, or less in a container with a limit."""
    import psutil

    found = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        found = min(found, int(text) - int(used.read_text()))
    return found


def choose_place(num_bytes: int, wanted: str) -> str:
    """``memory``, ``disk`` or ``shards`` for a decoded cache of ``num_bytes``: the fastest that leaves most of the machine free."""
    if wanted in ("memory", "disk"):
        return wanted
    if wanted == "none":
        return "shards"
    if num_bytes <= available_memory() // 4:
        return "memory"
    return "disk" if num_bytes <= shutil.disk_usage(tempfile.gettempdir()).free // 2 else "shards"


def load_split(info: DatasetInfo, split: str, side: int, threads: int = 0, place: str = "memory") -> DecodedSplit:
    """Decode a whole split to squares of ``side``. Raises DataError when the shards do not hold what dataset.json says."""
    count = info.num_pictures.get(split, 0)
    shape = (count, side, side, 3)
    labels = np.zeros(count, dtype=np.int64)
    pictures: Pixels
    if place == "memory":
        pictures = np.empty(shape, dtype=np.uint8)
    else:
        # The file has no name once it is mapped, so nothing is left behind.
        with tempfile.TemporaryFile() as file:
            pictures = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    number = 0
    for pixels, label in decoded(info, split, side, threads or cpu_count()):
        if number < count:
            pictures[number], labels[number] = pixels, label
        number += 1
    _require_count(split, number, info)
    return DecodedSplit(pictures, labels, place)


def training_side(info: DatasetInfo, resize_size: int) -> int:
    """Side of the squares that training crops from: what is stored, but never less than evaluation sees.

    A crop is taken from all the pixels there are; small pictures are not blown up to no purpose.
    """
    sides = []
    for _, _, data in members(info, "train"):
        with Image.open(io.BytesIO(data)) as picture:
            sides.append(min(picture.size))
        if len(sides) == 64:
            break
    return max(resize_size, min(statistics.median_low(sides), 2 * resize_size)) if sides else resize_size
