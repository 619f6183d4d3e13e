"""The API's Lambda: parse the request, call the logic, answer. Logs say what happened, never what was in a picture or token."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import bodies
from answers import HttpError, answer, error_answer, picture_answer, raw
from botocore.exceptions import ClientError, HTTPClientError
from description import description
from model import Model
from page import page

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
        wakes=os.environ["STATE_MACHINE_ARN"] if os.environ.get("WAKES") == "true" else "",
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
    except Exception as error:
        problem = _unforeseen(error, request_id, route)
        failure = problem.code
        result = error_answer(problem, request_id)
    result["headers"] |= _cross_origin(event)
    took = round((time.monotonic() - started) * 1000)
    line = {"request_id": request_id, "route": " ".join(route), "status": result["statusCode"], "error": failure, "ms": took}
    log.info(json.dumps(line))
    return result


_BUSY = {"ThrottlingException", "Throttling", "TooManyRequestsException", "SlowDown", "ServiceUnavailable", "InternalError"}


def _unforeseen(error: Exception, request_id: str, route: tuple[str, str]) -> HttpError:
    """A service behind the API that is slow or busy passes; anything else is our own fault, and its trace is in the log."""
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
    if isinstance(error, HTTPClientError) or code in _BUSY:
        log.warning(json.dumps({"request_id": request_id, "route": " ".join(route), "error": code or type(error).__name__}))
        return HttpError(503, "unavailable", "A service behind the API is busy; send the request again in some seconds.", 5)
    log.exception(json.dumps({"request_id": request_id, "route": " ".join(route)}))
    return HttpError(500, "server_error", "The service failed; its log names the reason under this request_id.", 5)


Handler = Callable[[dict[str, Any], str], dict[str, Any]]


def _route(route: tuple[str, str]) -> Handler:
    """The function for a method and a path."""
    routes: Mapping[tuple[str, str], Handler] = {
        ("POST", "/predict"): _predict,
        ("POST", "/predict/batch"): _predict_batch,
        ("POST", "/explain"): _explain,
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
    top_k, threshold = _named(event)
    result = model().predict(bodies.one_picture(event), top_k, threshold)
    # An artifact of an earlier version knows no novelty.
    found = {"predictions": result["predictions"], "novelty": result.get("novelty")}
    return answer(200, {**found, "model": result.get("model", {}), "request_id": request_id}, request_id)


def _predict_batch(event: dict[str, Any], request_id: str) -> dict[str, Any]:
    """POST /predict/batch."""
    top_k, threshold = _named(event)
    result = model().predict_batch(bodies.batch(event), top_k, threshold)
    return answer(200, {"results": result["results"], "model": result.get("model", {}), "request_id": request_id}, request_id)


def _explain(event: dict[str, Any], request_id: str) -> dict[str, Any]:
    """POST /explain."""
    if not _accepts_png(event):
        # API Gateway turns the answer into bytes only for who asks for a picture first.
        raise HttpError(406, "not_acceptable", "The answer is a picture; send the header 'Accept: image/png'.")
    content, label, probability = model().explain(bodies.one_picture(event), _query(event, "label").get("label", ""))
    return picture_answer(content, {"X-Label": quote(label), "X-Probability": f"{probability:.6f}"}, request_id)


def _description(_: dict[str, Any], request_id: str) -> dict[str, Any]:
    """GET /openapi.json."""
    return answer(200, description(os.environ.get("AUTH", "token")), request_id)


def _page(_: dict[str, Any], request_id: str) -> dict[str, Any]:
    """GET /."""
    text, policy = page()
    return raw(200, text, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}, request_id)


def _accepts_png(event: dict[str, Any]) -> bool:
    headers = {str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()}
    return headers.get("accept", "").split(",")[0].split(";")[0].strip().lower() in ("image/png", "image/*")


def _query(event: dict[str, Any], *known: str) -> dict[str, str]:
    """The query's parameters. Raises HttpError 400 for one that there is not: a misspelt one would have no effect."""
    given = {str(name): str(value) for name, value in (event.get("queryStringParameters") or {}).items()}
    for name in given:
        if name not in known:
            raise HttpError(400, "bad_parameter", f"There is no parameter {name[:20]!r}; there are {', '.join(known)}.")
    return given


def _named(event: dict[str, Any]) -> tuple[int, float]:
    """How many classes to name, 5 unless asked otherwise, and the smallest probability that is named."""
    given = _query(event, "top_k", "threshold")
    count, least = given.get("top_k", "5"), given.get("threshold", "0")
    if not (count.isascii() and count.isdigit() and len(count) <= 4 and 1 <= int(count) <= 1000):
        raise HttpError(400, "bad_parameter", f"top_k is {count[:20]!r}; expected an integer from 1 to 1000.")
    try:
        threshold = float(least)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise HttpError(400, "bad_parameter", f"threshold is {least[:20]!r}; expected a number from 0 to 1.")
    return int(count), threshold


def _cross_origin(event: dict[str, Any]) -> dict[str, str]:
    """Headers that let a page of a configured origin read the answer; none for others."""
    headers = {str(name).lower(): str(value) for name, value in (event.get("headers") or {}).items()}
    allowed = [origin for origin in os.environ.get("CORS_ORIGINS", "").split(",") if origin]
    if not allowed:
        return {}
    exposed = "X-Label, X-Probability, X-Request-Id, Retry-After"
    found = {"Vary": "Origin"}
    if headers.get("origin") in allowed:
        found |= {"Access-Control-Allow-Origin": headers["origin"], "Access-Control-Expose-Headers": exposed}
    return found
