"""What a picture says about itself in its first bytes: kind and size. Nothing is decoded: a small file can hold a huge one."""

from __future__ import annotations

import struct
from dataclasses import dataclass

TYPES = {
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/png": "png",
    "image/webp": "webp",
    "image/bmp": "bmp",
    "image/x-ms-bmp": "bmp",
    "image/tiff": "tiff",
    "application/x-image": "",
    "application/octet-stream": "",
}
"""Accepted Content-Types; the bytes decide what the picture is."""


class NotAPictureError(ValueError):
    """The bytes are no picture of a supported kind, or its header is damaged."""


@dataclass(frozen=True)
class Header:
    """Kind and size in pixels."""

    kind: str
    width: int
    height: int


def read_header(data: bytes) -> Header:
    """Kind, width and height from the header. Raises NotAPictureError."""
    try:
        header = _read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise NotAPictureError("The picture's header is damaged; save it again as JPEG or PNG.") from error
    if header is None:
        raise NotAPictureError("These bytes are not a JPEG, PNG, WebP, BMP or TIFF picture; check the file.")
    if header.width < 1 or header.height < 1:
        raise NotAPictureError(f"The picture is {header.width} x {header.height} pixels; expected at least 1 x 1.")
    return header


def _read(data: bytes) -> Header | None:
    """The header, or None for an unknown kind; a damaged one raises struct.error, IndexError or ValueError."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if data[12:16] != b"IHDR":
            raise ValueError("no IHDR")
        return Header("png", *struct.unpack(">II", data[16:24]))
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith(b"BM"):
        width, height = struct.unpack("<ii", data[18:26])
        return Header("bmp", width, abs(height))
    if data[:4] in (b"II*\x00", b"MM\x00*"):
        return _tiff(data)
    return None


def _jpeg(data: bytes) -> Header:
    """Walks the segments to the frame header (ISO/IEC 10918-1, B.1.1.3)."""
    position = 2
    while position < len(data):
        if data[position] != 0xFF:
            raise ValueError("no marker")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return Header("jpeg", width, height)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    raise ValueError("no frame header")


def _webp(data: bytes) -> Header:
    """Lossy, lossless and extended form (RFC 9649)."""
    form = data[12:16]
    if form == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            raise ValueError("short")
        return Header("webp", width, height)
    if form == b"VP8L":
        bits = struct.unpack("<I", data[21:25])[0]
        return Header("webp", (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    if form == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    raise ValueError("unknown form")


def _tiff(data: bytes) -> Header:
    """The first directory's ImageWidth (256) and ImageLength (257), as SHORT or LONG (TIFF 6.0)."""
    order = "<" if data[:2] == b"II" else ">"
    offset = struct.unpack(f"{order}I", data[4:8])[0]
    count = struct.unpack(f"{order}H", data[offset : offset + 2])[0]
    sizes: dict[int, int] = {}
    for index in range(count):
        entry = data[offset + 2 + 12 * index : offset + 14 + 12 * index]
        tag, kind = struct.unpack(f"{order}HH", entry[:4])
        if tag in (256, 257):
            sizes[tag] = struct.unpack(f"{order}{'H' if kind == 3 else 'I'}", entry[8 : 10 if kind == 3 else 12])[0]
    if len(sizes) < 2:
        raise ValueError("no size")
    return Header("tiff", sizes[256], sizes[257])
