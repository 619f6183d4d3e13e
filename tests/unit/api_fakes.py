"""The API's Lambda over HTTP (WSGI), in front of the real serving application in this process."""

from __future__ import annotations

import base64
import io
import json
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx
import pytest
from botocore.exceptions import ClientError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lambdas" / "predict"))

import handler  # noqa: E402

TOKEN = "token-of-the-tests"
ENVIRONMENT = {
    "ENDPOINT_NAME": "dogs-dev",
    "DATA_BUCKET": "data",
    "STATE_MACHINE_NAME": "dogs-dev",
    "STATE_MACHINE_ARN": "arn:aws:states:us-east-1:000000000000:stateMachine:dogs-dev",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
}
CHAMPION = {
    "model_package": "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/3",
    "endpoint_config": "dogs-dev-0123456789abcdef",
    "labels_uri": "s3://data/models/r/labels.json",
    "run": "r",
}


def set_environment(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**ENVIRONMENT, **changes}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"):
        monkeypatch.delenv(name, raising=False)


class Stream(io.BytesIO):
    """What boto3 gives as Body."""


class Endpoint:
    """InvokeEndpoint, answered by the server at ``address``; ``problems`` are raised first, one a call."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=address)
        self.problems: list[ClientError] = []
        self.calls: list[dict[str, Any]] = []

    def close(self) -> None:
        self._client.close()

    def invoke_endpoint(self, **request: Any) -> dict[str, Any]:
        self.calls.append(request)
        if self.problems:
            raise self.problems.pop(0)
        headers = {"Content-Type": request["ContentType"], "Accept": request["Accept"]}
        headers["X-Amzn-SageMaker-Custom-Attributes"] = request["CustomAttributes"]
        answer = self._client.post("/invocations", content=request["Body"], headers=headers)
        if answer.status_code != 200:
            raise model_error(answer.status_code, answer.text)
        attributes = answer.headers.get("X-Amzn-SageMaker-Custom-Attributes", "")
        return {"Body": Stream(answer.content), "CustomAttributes": attributes}


def model_error(status: int, message: str) -> ClientError:
    answer = {"Error": {"Code": "ModelError", "Message": "x"}, "OriginalStatusCode": status, "OriginalMessage": message}
    return ClientError(answer, "InvokeEndpoint")  # type: ignore[arg-type]


def missing_endpoint() -> ClientError:
    problem = {"Code": "ValidationError", "Message": "Endpoint dogs-dev of account 000000000000 not found."}
    return ClientError({"Error": problem}, "InvokeEndpoint")


class Bucket:
    """The data bucket, as far as the API reads it."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = objects

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803 - AWS's names
        if Key not in self.objects:
            raise ClientError({"Error": {"Code": "NoSuchKey", "Message": Key}}, "GetObject")
        return {"Body": Stream(json.dumps(self.objects[Key]).encode())}


@contextmanager
def connected(endpoint: Endpoint, labels: list[str]) -> Iterator[Any]:
    """The Lambda's model with this endpoint and a champion."""
    handler.model.cache_clear()
    model = handler.model()
    model.runtime = endpoint
    model.s3 = Bucket({"champion.json": CHAMPION, "models/r/labels.json": labels})
    try:
        yield model
    finally:
        handler.model.cache_clear()


ROUTES = ("/predict/batch", "/predict", "/explain", "/labels", "/health", "/openapi.json", "/")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """WSGI: what API Gateway does, its token check and its 404 among it."""
    method, path = environ["REQUEST_METHOD"], posixpath.normpath("/" + environ.get("PATH_INFO", "").lstrip("/"))
    headers = {name[5:].replace("_", "-").title(): str(value) for name, value in environ.items() if name.startswith("HTTP_")}
    headers["Content-Type"] = environ.get("CONTENT_TYPE", "")
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    event = {
        "httpMethod": method,
        "resource": path,
        "path": path,
        "headers": headers,
        "queryStringParameters": dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True)) or None,
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": True,
        "requestContext": {"requestId": "r-1"},
    }
    closed = path in ("/predict", "/predict/batch", "/explain", "/labels")
    if closed and headers.get("Authorization") != f"Bearer {TOKEN}":
        answer = _gateway(401, "unauthorized", {"WWW-Authenticate": "Bearer"})
    else:
        answer = handler.handle(event, None)
    content = base64.b64decode(answer["body"]) if answer.get("isBase64Encoded") else answer["body"].encode()
    start_response(f"{answer['statusCode']} x", list(answer["headers"].items()))
    return [content]


def _gateway(status: int, code: str, headers: dict[str, str]) -> dict[str, Any]:
    body = json.dumps({"error": {"code": code, "message": code}, "request_id": "r-1"})
    return {"statusCode": status, "headers": {"Content-Type": "application/json", **headers}, "body": body}


def open_application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The same without the token, in what it asks and in what it says of itself: the gateway checks it, not the Lambda."""
    environ["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
    content = b"".join(application(environ, start_response))
    if not environ.get("PATH_INFO", "").endswith("openapi.json"):
        return [content]
    described = json.loads(content)
    for methods in described["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    return [json.dumps(described).encode()]
