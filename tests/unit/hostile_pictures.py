"""Pictures as nobody should send them, with the statuses that a server may answer."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

Made = tuple[bytes, set[int]]


def _encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (60, 40), seed: int = 0, **options: object) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def truncated(seed: int) -> Made:
    kind = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")[seed % 5]
    whole = _encoded(kind, seed=seed)
    return whole[: random.Random(seed).randrange(1, len(whole) * 3 // 4)], {422}


def bomb(seed: int) -> Made:
    side = 9_000 + 977 * (seed % 60)
    return png(side, side, b"\0" * 1000), {413}


def compressed_bomb(seed: int) -> Made:
    """A small file whose pixels fill the memory, just within what may be decoded."""
    side = 3_000 + seed % 7
    return png(side, side, b"\0" * (side * (side * 3 + 1))), {200}


def no_picture(seed: int) -> Made:
    heads = (
        b"%PDF-1.7\n",
        b"PK\x03\x04",
        b"\x7fELF",
        b"<svg xmlns=",
        b"<?xml",
        b"#!/bin/sh\n",
        b"GIF89a",
        b"\0\0\0\x20ftypheic",
        b"RIFF",
    )
    return heads[seed % len(heads)] + random.Random(seed).randbytes(200), {413, 422}  # random bytes may promise any size


def nothing(seed: int) -> Made:
    return b"\0" * (seed % 3) if seed % 3 else b"", {422}


def wrong_size(seed: int) -> Made:
    """The header promises more rows than there are, or has no size at all."""
    sizes = ((60, 4000), (0, 40), (60, 0), (60_000, 2))
    width, height = sizes[seed % 4]
    # Pillow leaves rows black that a complete stream does not hold.
    return png(width, height, b"\0" * (40 * 181)), {422} if 0 in (width, height) else {200, 422}


def cmyk(seed: int) -> Made:
    return _encoded("JPEG", "CMYK", seed=seed), {200}


def sixteen_bit(seed: int) -> Made:
    values = np.random.default_rng(seed).integers(0, 65535, (40, 60), dtype=np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, ("PNG", "TIFF")[seed % 2])
    return out.getvalue(), {200}


def palette(seed: int) -> Made:
    return _encoded("PNG", ("P", "L", "1", "LA", "RGBA")[seed % 5], seed=seed), {200}


def animated(seed: int) -> Made:
    frames = [Image.new("RGB", (40, 30), (20 * n, seed % 255, 0)) for n in range(3)]
    out = io.BytesIO()
    frames[0].save(out, ("GIF", "WEBP", "PNG", "TIFF")[seed % 4], save_all=True, append_images=frames[1:])
    return out.getvalue(), {422}


def polyglot(seed: int) -> Made:
    """A picture that is something else too: what follows it is not looked at, what precedes it makes it none."""
    whole = _encoded(("JPEG", "PNG")[seed % 2], seed=seed)
    other = (b"PK\x05\x06" + b"\0" * 18, b"<script>alert(1)</script>", b"%PDF-1.4", b"\x7fELF")[seed % 4]
    return (whole + other, {200}) if seed % 3 else (other + whole, {422})


def huge_metadata(seed: int) -> Made:
    picture = Image.new("RGB", (40, 30), (seed % 255, 0, 0))
    exif = picture.getexif()
    exif[0x010E] = "x" * 60_000
    out = io.BytesIO()
    picture.save(out, "JPEG", exif=exif)
    return out.getvalue(), {200}


def mutated(seed: int) -> Made:
    """Any bytes of a good picture changed."""
    numbers = random.Random(seed)
    whole = bytearray(_encoded(("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")[seed % 6], seed=seed))
    for _ in range(numbers.randrange(1, 30)):
        whole[numbers.randrange(len(whole))] = numbers.randrange(256)
    return bytes(whole), {200, 413, 422}


KINDS: tuple[Callable[[int], Made], ...] = (
    truncated, bomb, no_picture, nothing, wrong_size, cmyk, sixteen_bit, palette, animated, polyglot, huge_metadata,
    mutated, mutated,
)  # fmt: skip


def hostile(count: int) -> Iterator[tuple[str, bytes, set[int]]]:
    """``(kind, bytes, allowed statuses)``; a few that fill the memory among them."""
    for number in range(count):
        make = compressed_bomb if number % 97 == 0 else KINDS[number % len(KINDS)]
        content, allowed = make(number)
        yield make.__name__, content, allowed
