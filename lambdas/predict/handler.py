"""The API's Lambda: parse the request, call the logic, answer. Logs say what happened, never what was in a picture or token."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from answers import HttpError, answer, error_answer, raw
from description import description
from model import Model
from page import page
from pictures import TYPES, NotAPictureError, read_header

MAX_BYTES = int(os.environ.get("MAX_BYTES", "4718592"))
"""4.5 MiB: with base64 and its envelope this is what a synchronous Lambda call carries (6 MB). Serverless endpoints take less."""

log = logging.getLogger("api")
log.setLevel(os.environ.get("LOG_LEVEL", "INFO"))


@functools.cache
def model() -> Model:
    """The model from the environment, made once."""
    return Model(
        endpoint=os.environ["ENDPOINT_NAME"],
        bucket=os.environ["DATA_BUCKET"],
        state_machine=os.environ["STATE_MACHINE_NAME"],
        on_demand=os.environ.get("ON_DEMAND") == "true",
    )


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """API Gateway's proxy event in, its proxy answer out. Never raises."""
    started = time.monotonic()
    request_id = str(event.get("requestContext", {}).get("requestId", ""))
    route = (str(event.get("httpMethod", "")), str(event.get("resource") or event.get("path", "")))
    failure = ""
    try:
        result = _route(route)(event, request_id)
    except HttpError as error:
        failure = error.code
        result = error_answer(error, request_id)
    except Exception:
        failure = "server_error"
        log.exception(json.dumps({"request_id": request_id, "route": " ".join(route)}))
        problem = HttpError(500, failure, "The service failed; its log names the reason under this request_id.", 5)
        result = error_answer(problem, request_id)
    took = round((time.monotonic() - started) * 1000)
    line = {"request_id": request_id, "route": " ".join(route), "status": result["statusCode"], "error": failure, "ms": took}
    log.info(json.dumps(line))
    return result


Handler = Callable[[dict[str, Any], str], dict[str, Any]]


def _route(route: tuple[str, str]) -> Handler:
    """The function for a method and a path."""
    routes: Mapping[tuple[str, str], Handler] = {
        ("POST", "/predict"): _predict,
        ("GET", "/labels"): lambda _, request_id: answer(200, model().labels(), request_id),
        ("GET", "/health"): lambda _, request_id: answer(200, {"status": "ok"}, request_id),
        ("GET", "/openapi.json"): _description,
        ("GET", "/"): _page,
    }
    if route not in routes:
        known = ", ".join(" ".join(pair) for pair in routes)
        raise HttpError(404, "not_found", f"There is no {' '.join(route)}; there are {known}.")
    return routes[route]


def _predict(event: dict[str, Any], request_id: str) -> dict[str, Any]:
    """POST /predict."""
    top_k = _top_k(event)
    content_type = _content_type(event)
    picture = _body(event)
    _check(picture)
    result = model().predict(picture, content_type, top_k)
    body = {"predictions": result["predictions"], "model": result.get("model", {}), "request_id": request_id}
    return answer(200, body, request_id)


def _description(_: dict[str, Any], request_id: str) -> dict[str, Any]:
    """GET /openapi.json."""
    return answer(200, description(os.environ.get("AUTH", "token")), request_id)


def _page(_: dict[str, Any], request_id: str) -> dict[str, Any]:
    """GET /."""
    text, policy = page()
    return raw(200, text, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}, request_id)


def _top_k(event: dict[str, Any]) -> int:
    """How many classes to name, 5 unless asked otherwise."""
    text = str((event.get("queryStringParameters") or {}).get("top_k", "5"))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise HttpError(400, "bad_parameter", f"top_k is {text[:20]!r}; expected an integer from 1 to 1000.")
    return int(text)


def _content_type(event: dict[str, Any]) -> str:
    """The declared type, if it is a picture's."""
    headers = {str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()}
    declared = headers.get("content-type", "").split(";")[0].strip().lower()
    if declared not in TYPES:
        kinds = "image/jpeg, image/png, image/webp, image/bmp or image/tiff"
        raise HttpError(415, "unsupported_media_type", f"Content-Type is {declared[:60]!r}; expected {kinds}.")
    return "application/x-image" if declared == "application/octet-stream" else declared


def _body(event: dict[str, Any]) -> bytes:
    """The picture's bytes."""
    text = event.get("body") or ""
    if not event.get("isBase64Encoded"):
        data = text.encode("utf-8", "surrogateescape")
    elif len(text) > MAX_BYTES * 4 // 3 + 4:
        raise _too_large(len(text) * 3 // 4)
    else:
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise HttpError(400, "bad_request", "The body arrived damaged; send the picture's bytes as they are.") from None
    if not data:
        raise HttpError(422, "not_a_picture", "The body is empty; send the bytes of one picture (curl: --data-binary @file).")
    if len(data) > MAX_BYTES:
        raise _too_large(len(data))
    return data


def _too_large(size: int) -> HttpError:
    """A picture that no Lambda call, or no call of the endpoint, can carry."""
    limit = MAX_BYTES / 2**20
    return HttpError(413, "too_large", f"The picture has {size / 2**20:.1f} MB; send at most {limit:.1f} MB: scale it down.")


def _check(picture: bytes) -> None:
    """Refuse from the header what the model would have to decode first."""
    try:
        header = read_header(picture)
    except NotAPictureError as error:
        raise HttpError(422, "not_a_picture", str(error)) from None
    limit = int(os.environ.get("MAX_MEGAPIXELS", "50"))
    if header.width * header.height > limit * 1_000_000:
        size = f"{header.width} x {header.height} pixels"
        raise HttpError(413, "too_many_pixels", f"The picture is {size}; send at most {limit} megapixels, scaled down.")
