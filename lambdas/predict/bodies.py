"""The bodies of requests: one picture, or a batch as JSON or as a multipart form. Bounded, and never decoded here."""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from typing import Any

from answers import HttpError
from pictures import TYPES, NotAPictureError, read_header

MAX_BYTES = int(os.environ.get("MAX_BYTES", "4718592"))
"""4.5 MiB: with base64 and its envelope this is what a synchronous Lambda call carries (6 MB). Serverless endpoints take less."""
MAX_PICTURES = 16
"""Pictures of one batch; the serving container's own limit."""
_KINDS = "image/jpeg, image/png, image/webp, image/bmp or image/tiff"


@dataclass(frozen=True)
class Body:
    """What goes on to the endpoint."""

    content: bytes
    content_type: str
    pictures: int = 1


def one_picture(event: dict[str, Any]) -> Body:
    """A picture's bytes, or JSON ``{"image": "<base64>"}``. Raises HttpError 400, 413, 415 or 422."""
    declared = _declared(event)
    kind = _kind(declared)
    if kind == "application/json":
        picture = _decoded(_json(_content(event)).get("image"), "image")
        kind = "application/x-image"
    elif kind in TYPES:
        picture = _content(event)
    else:
        raise HttpError(415, "unsupported_media_type", f"Content-Type is {kind[:60]!r}; expected {_KINDS}, or application/json.")
    check(picture)
    return Body(picture, "application/x-image" if kind == "application/octet-stream" else kind)


def batch(event: dict[str, Any]) -> Body:
    """Up to MAX_PICTURES pictures: JSON ``{"images": ["<base64>", …]}`` or the files of a multipart form.

    Their headers are left to the endpoint, whose answer names the fault of each picture alone.
    """
    declared = _declared(event)
    kind = _kind(declared)
    content = _content(event)
    if kind == "application/json":
        found = _json(content).get("images")
        if not isinstance(found, list):
            raise HttpError(400, "bad_request", 'The JSON has no list images; send {"images": ["<base64>", …]}.')
        count = len(found)
    elif kind == "multipart/form-data":
        count = len(files_of_form(content, declared))
    else:
        raise HttpError(
            415, "unsupported_media_type", f"Content-Type is {kind[:60]!r}; expected multipart/form-data or application/json."
        )
    if count == 0:
        raise HttpError(422, "no_pictures", "The request holds no picture; send at least one.")
    if count > MAX_PICTURES:
        raise HttpError(422, "too_many_pictures", f"The request holds {count} pictures; send at most {MAX_PICTURES} at a time.")
    return Body(content, declared, count)


def check(picture: bytes) -> None:
    """Refuse from the header what the model would have to decode first. Raises HttpError 413 or 422."""
    try:
        header = read_header(picture)
    except NotAPictureError as error:
        raise HttpError(422, "not_a_picture", str(error)) from None
    limit = int(os.environ.get("MAX_MEGAPIXELS", "50"))
    if header.width * header.height > limit * 1_000_000:
        size = f"{header.width} x {header.height} pixels"
        raise HttpError(413, "too_many_pixels", f"The picture is {size}; send at most {limit} megapixels, scaled down.")


def files_of_form(content: bytes, content_type: str) -> list[bytes]:
    """The parts of a multipart form that are files (RFC 7578). Raises HttpError 400 for a damaged form."""
    boundary = _boundary(content_type)
    # The first delimiter may stand at the very start, all others begin with a line end (RFC 2046, 5.1.1).
    parts = (b"\r\n" + content).split(b"\r\n--" + boundary)
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise HttpError(400, "bad_request", "The multipart form is damaged or cut off; send it again.")
    found = []
    for part in parts[1:-1]:
        headers, gap, data = part.partition(b"\r\n\r\n")
        if not gap:
            raise HttpError(400, "bad_request", "A part of the multipart form has no headers; send it again.")
        if any(line.lower().startswith(b"content-disposition:") and b"filename" in line.lower() for line in headers.split(b"\r\n")):
            found.append(data)
    return found


def _boundary(content_type: str) -> bytes:
    for option in content_type.split(";")[1:]:
        name, _, value = option.partition("=")
        value = value.strip().strip('"')
        if name.strip().lower() == "boundary" and 1 <= len(value) <= 70 and value.isascii():
            return value.encode()
    raise HttpError(400, "bad_request", "Content-Type names no boundary of 1 to 70 characters; let your client set it.")


def _declared(event: dict[str, Any]) -> str:
    headers = {str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()}
    return headers.get("content-type", "").strip()


def _kind(declared: str) -> str:
    return declared.split(";")[0].strip().lower()


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise HttpError(
            400, "bad_request", 'The body is no JSON object; send {"image": "<base64>"} or {"images": ["<base64>", …]}.'
        )
    return found


def _decoded(text: object, name: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise HttpError(400, "bad_request", f"{name} is not base64 text; encode the picture's bytes.") from None


def _content(event: dict[str, Any]) -> bytes:
    """The body's bytes. Raises HttpError 400, 413 or 422."""
    text = str(event.get("body") or "")
    if not event.get("isBase64Encoded"):
        data = text.encode("utf-8", "surrogateescape")
    elif len(text) > MAX_BYTES * 4 // 3 + 4:
        raise _too_large(len(text) * 3 // 4)
    else:
        try:
            data = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            raise HttpError(400, "bad_request", "The body arrived damaged; send the picture's bytes as they are.") from None
    if not data:
        raise HttpError(422, "not_a_picture", "The body is empty; send the bytes of one picture (curl: --data-binary @file).")
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    return data


def _too_large(size: int) -> HttpError:
    """A body that no Lambda call, or no call of the endpoint, can carry."""
    limit = MAX_BYTES / 2**20
    return HttpError(413, "too_large", f"The body has {size / 2**20:.1f} MB; send at most {limit:.1f} MB: scale the picture down.")
