"""One picture: from the file somebody gave us to the form that is stored, and what is remembered of it.

This runs in worker processes, so it imports little. Legend: a *spool* is one worker's file of stored bytes, end to end.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from classifier import serving
from classifier.errors import UserError

JPEG_QUALITY = 90
JPEG_SUBSAMPLING = "4:2:0"
"""Stored pictures are decoded again in every training. At quality 95 in full colour, 200 dogs of 224 pixels took half as many bytes
again and 1.8 times as long to decode; no eye tells the two apart at that size."""
MAX_LOSSLESS_BYTES = 64 * 2**10
"""A picture that came without loss (PNG, BMP, GIF, TIFF) and stays this small as PNG is stored as PNG."""
MAX_FILE_BYTES = 100 * 2**20
THUMBNAIL, THUMBNAIL_QUALITY = 160, 80
"""Longest side in pixels, and JPEG quality, of a picture shown in the report: some 5 KB."""
HASH_SIDE = 16
"""Perceptual hashes have 16 x 16 bits."""
PLAIN_BITS = 16
"""A difference hash with fewer bits set, or fewer clear, belongs to a picture too plain to be told from another."""
READERS = 8
"""Threads in which a worker reads from S3: one waits some 30 ms for each object."""


class Task(NamedTuple):
    """One file to look at. ``data`` is given when only the parent can read it (tar)."""

    ident: int
    name: str
    size: int
    locator: str
    data: bytes | None = None


class Found(NamedTuple):
    """What became of a Task: a ``reason`` to refuse it, or the stored picture, ``size`` bytes at ``start`` of ``spool``."""

    ident: int
    reason: str | None = None
    sha256: str = ""
    extension: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    spool: str = ""
    start: int = 0
    dhash: bytes | None = None
    phash: bytes | None = None


class Reader(Protocol):
    """Reads a file of the source from any process."""

    @property
    def slow(self) -> bool:
        """Whether a read waits for a network."""

    def read(self, name: str, size: int, locator: str) -> bytes:
        """The file's bytes. Raises UserError or OSError."""


class Stored(NamedTuple):
    """The form in which a picture is kept, and its pixels."""

    data: bytes
    extension: str
    picture: Image.Image


def _kept_as_it_is(picture: Image.Image, picture_size: int) -> bool:
    """Whether a file can be stored byte for byte: an upright, baseline JPEG in grey or RGB that is small enough.

    A progressive JPEG takes two and a half times as long to decode, in every epoch.
    """
    return (
        picture.format == "JPEG"
        and min(picture.size) <= picture_size
        and picture.mode in ("RGB", "L")
        and not picture.info.get("progressive")
        and picture.getexif().get(0x0112, 1) == 1
    )


def normalise(data: bytes, picture_size: int) -> Stored:
    """The stored form: upright, RGB or grey, short side at most ``picture_size`` pixels. Raises PictureError."""
    picture = serving.open_picture(data)
    source_format = picture.format
    try:
        keep = _kept_as_it_is(picture, picture_size)
        serving.draft(picture, picture_size)
        picture.load()  # also for a picture that is kept: damage shows only here
        if keep:
            return Stored(data, "jpg", picture)
        return _encoded(_upright(picture, picture_size), source_format not in ("JPEG", "MPO", "WEBP"))
    except Exception as problem:
        raise serving.PictureError(f"damaged picture ({type(problem).__name__}: {str(problem)[:100]})") from problem


def _upright(picture: Image.Image, picture_size: int) -> Image.Image:
    ImageOps.exif_transpose(picture, in_place=True)
    plain_grey = picture.mode == "L" and "transparency" not in picture.info
    flat: Image.Image = picture if plain_grey else serving.to_rgb(picture)
    return serving.resize_short_side(flat, picture_size) if min(flat.size) > picture_size else flat


def _encoded(picture: Image.Image, lossless: bool) -> Stored:
    if lossless:
        out = io.BytesIO()
        Image.fromarray(np.asarray(picture)).save(out, "PNG")  # from the pixels alone: no profile, no text comes along
        if out.tell() <= MAX_LOSSLESS_BYTES:
            return Stored(out.getvalue(), "png", picture)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=JPEG_SUBSAMPLING, progressive=False, exif=b"", icc_profile=None)
    return Stored(out.getvalue(), "jpg", picture)


def write_thumbnail(data: bytes, path: Path) -> None:
    """A stored picture, small, as JPEG. Raises PictureError."""
    picture = serving.decode(data)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=THUMBNAIL_QUALITY)


_COSINES = np.cos(np.pi / (8 * HASH_SIDE) * np.outer(np.arange(HASH_SIDE), 2 * np.arange(4 * HASH_SIDE) + 1))
"""The lowest frequencies of the discrete cosine transform (type II) of 4 × HASH_SIDE values."""


def perceptual_hash(grey: Image.Image) -> np.ndarray[Any, Any]:
    """``imagehash.phash(grey, HASH_SIDE).hash``, bit for bit, in 40 % of its time.

    And without scipy, whose import costs every process 0.6 s.
    """
    side = 4 * HASH_SIDE
    pixels = np.asarray(grey.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    low = _COSINES @ pixels @ _COSINES.T
    return np.asarray(low > np.median(low))


def looks(picture: Image.Image) -> tuple[bytes, bytes] | tuple[None, None]:
    """Difference hash and perceptual hash, 32 bytes each; None for a picture too plain to be recognised."""
    import imagehash

    grey = picture.convert("L")
    difference = imagehash.dhash(grey, HASH_SIDE).hash
    if not PLAIN_BITS <= int(difference.sum()) <= HASH_SIDE**2 - PLAIN_BITS:
        return None, None
    return np.packbits(difference).tobytes(), np.packbits(perceptual_hash(grey)).tobytes()


def warm_up() -> None:
    """Import what looks at pictures."""
    import imagehash  # noqa: F401


@dataclass(frozen=True)
class Worker:
    """Everything a process must know; sent along with every chunk (a few hundred bytes)."""

    reader: Reader
    picture_size: int
    hashes: bool
    folder: str
    """Where spools are written."""

    def process(self, tasks: Sequence[Task]) -> list[Found]:
        """Look at a chunk of files; pictures go to this process's spool."""
        name = f"spool-{os.getpid()}"
        # Reads from a network run beside each other and ahead of the work; others are made as their turn comes.
        with (Path(self.folder) / name).open("ab") as spool, ThreadPoolExecutor(READERS) as pool:
            reads = [pool.submit(self._bytes, task).result if self.reader.slow else partial(self._bytes, task) for task in tasks]
            return [self._one(task, read, name, spool) for task, read in zip(tasks, reads, strict=True)]

    def _bytes(self, task: Task) -> bytes:
        if task.size > MAX_FILE_BYTES or task.size == 0:
            return b""
        return self.reader.read(task.name, task.size, task.locator) if task.data is None else task.data

    def _one(self, task: Task, read: Callable[[], bytes], name: str, spool: BinaryIO) -> Found:
        if task.size > MAX_FILE_BYTES:
            return Found(task.ident, f"too large ({task.size:,} bytes are more than {MAX_FILE_BYTES:,})")
        if task.size == 0:
            return Found(task.ident, "empty file")
        try:
            stored = normalise(read(), self.picture_size)
            dhash, phash = looks(stored.picture) if self.hashes else (None, None)
        except (serving.PictureError, UserError) as problem:
            return Found(task.ident, str(problem))
        except OSError as problem:  # a file that vanished or may not be read
            return Found(task.ident, f"unreadable ({type(problem).__name__}: {problem.strerror or str(problem)[:100]})")
        width, height = stored.picture.size
        found = Found(
            task.ident,
            None,
            hashlib.sha256(stored.data).hexdigest(),
            stored.extension,
            width,
            height,
            len(stored.data),
            name,
            spool.tell(),
            dhash,
            phash,
        )
        spool.write(stored.data)
        return found


class Member(NamedTuple):
    """A picture on its way from a spool into a shard."""

    name: str
    spool: str
    start: int
    size: int


def write_shard(target: Path, spools: Path, members: Sequence[Member]) -> None:
    """A tar of pictures whose bytes depend on the members alone; it gets its name only when it is complete."""
    files = {name: (spools / name).open("rb") for name in {member.spool for member in members}}
    partial = target.with_suffix(".partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member in members:
                files[member.spool].seek(member.start)
                info = tarfile.TarInfo(member.name)
                info.size, info.mode = member.size, 0o644
                tar.addfile(info, files[member.spool])
    finally:
        for file in files.values():
            file.close()
    partial.replace(target)


def shard_bytes(sizes: Sequence[int]) -> int:
    """The size of a shard that holds members of these sizes: headers and padding to 512, the end to 10,240 bytes."""
    content = sum(512 + -(-size // 512) * 512 for size in sizes) + 1024
    return -(-content // 10_240) * 10_240
