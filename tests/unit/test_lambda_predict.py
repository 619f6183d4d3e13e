"""The API's Lambda: what it refuses and how, and what it passes on. Given an event, when handled, then an answer."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ReadTimeoutError
from botocore.response import StreamingBody
from botocore.stub import Stubber
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lambdas" / "predict"))

import bodies  # noqa: E402
import handler  # noqa: E402
import model as model_module  # noqa: E402
import page as page_module  # noqa: E402
import pictures  # noqa: E402


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    values = {
        "ENDPOINT_NAME": "dogs-dev",
        "DATA_BUCKET": "data",
        "STATE_MACHINE_NAME": "dogs-dev",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    handler.model.cache_clear()
    yield
    handler.model.cache_clear()


def picture(kind: str = "PNG", size: tuple[int, int] = (20, 10)) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(target, kind)
    return target.getvalue()


def event(body: bytes | None = None, *, content_type: str = "image/png", query: Any = None, **changes: Any) -> dict[str, Any]:
    return {
        "httpMethod": "POST",
        "resource": "/predict",
        "headers": {"content-type": content_type},
        "queryStringParameters": query,
        "body": base64.b64encode(picture() if body is None else body).decode(),
        "isBase64Encoded": True,
        "requestContext": {"requestId": "r-1"},
    } | changes


def call(given: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    answer = handler.handle(given, None)
    return answer["statusCode"], json.loads(answer["body"]), answer["headers"]


def runtime() -> Stubber:
    return Stubber(handler.model().runtime)


def body_of(value: Any) -> StreamingBody:
    content = json.dumps(value).encode()
    return StreamingBody(io.BytesIO(content), len(content))


GOOD = {"predictions": [{"label": "cat", "probability": 0.9}], "model": {"run": "r", "dataset_hash": "h", "top1": 0.9}}


def test_a_picture_is_answered_with_predictions():
    with runtime() as stub:
        expected = {
            "EndpointName": "dogs-dev",
            "Body": picture(),
            "ContentType": "image/png",
            "Accept": "application/json",
            "CustomAttributes": "top_k=3,threshold=0",
        }
        stub.add_response("invoke_endpoint", {"Body": body_of(GOOD)}, expected)
        status, body, headers = call(event(query={"top_k": "3"}))
    assert status == 200
    assert body == {**GOOD, "novelty": None, "request_id": "r-1"}
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        (event(content_type="text/plain"), 415, "unsupported_media_type"),
        (event(content_type=""), 415, "unsupported_media_type"),
        (event(b""), 422, "not_a_picture"),
        (event(b"hello"), 422, "not_a_picture"),
        (event(b"\x89PNG\r\n\x1a\n"), 422, "not_a_picture"),
        (event(b"\xff\xd8\xff\xe0\x00"), 422, "not_a_picture"),
        (event(b"\0" * (bodies.MAX_BYTES + 1)), 413, "too_large"),
        (event(b"\0" * 6_000_000), 413, "too_large"),
        (event(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 20000, 20000)), 413, "too_many_pixels"),
        (event(query={"top_k": "0"}), 400, "bad_parameter"),
        (event(query={"top_k": "many"}), 400, "bad_parameter"),
        (event(query={"top_k": "²"}), 400, "bad_parameter"),
        (event() | {"body": "%%%"}, 400, "bad_request"),
        (event(resource="/nothing"), 404, "not_found"),
        (event(httpMethod="GET"), 404, "not_found"),
    ],
)
def test_what_no_model_should_see_is_refused_before_it_is_asked(given: dict[str, Any], status: int, code: str):
    answered, body, _ = call(given)
    assert answered == status
    assert body["error"]["code"] == code
    assert body["error"]["message"]


@pytest.mark.parametrize(
    ("error", "message", "status", "code", "waits"),
    [
        ("ValidationError", "Endpoint dogs-dev of account 0 not found.", 503, "no_model", True),
        ("ValidationError", "Endpoint is not in service", 503, "model_starting", True),
        ("ThrottlingException", "slow", 429, "throttled", True),
        ("ServiceUnavailable", "", 503, "unavailable", True),
        ("ModelNotReadyException", "", 503, "model_starting", True),
        ("AccessDeniedException", "", 502, "endpoint_refused", False),
    ],
)
def test_sagemakers_errors_become_http(error: str, message: str, status: int, code: str, waits: bool):
    with runtime() as stub:
        stub.add_client_error("invoke_endpoint", error, message)
        answered, body, headers = call(event())
    assert (answered, body["error"]["code"]) == (status, code)
    assert ("Retry-After" in headers) is waits
    if code == "no_model":
        assert "Start the state machine dogs-dev" in body["error"]["message"]


@pytest.mark.parametrize(("inner", "status"), [(422, 422), (413, 413), (503, 503), (500, 502)])
def test_the_servers_own_errors_pass_through(inner: int, status: int):
    message = json.dumps({"error": {"code": "why", "message": "because"}})
    with runtime() as stub:
        fields = {"OriginalStatusCode": inner, "OriginalMessage": message}
        for _ in range(model_module.TRIES if status == 502 else 1):
            stub.add_client_error("invoke_endpoint", "ModelError", modeled_fields=fields)
        answered, body, _ = call(event())
        stub.assert_no_pending_responses()
    assert answered == status
    assert body["error"]["message"] == "because"


def test_a_slow_model_is_a_504(monkeypatch: pytest.MonkeyPatch):
    def slow(**_: Any) -> Any:
        raise ReadTimeoutError(endpoint_url="x")

    monkeypatch.setattr(handler.model().runtime, "invoke_endpoint", slow)
    assert call(event())[0] == 504


def test_a_serverless_model_that_is_starting_is_a_503(monkeypatch: pytest.MonkeyPatch):
    def starting(**_: Any) -> Any:
        raise ReadTimeoutError(endpoint_url="x")

    monkeypatch.setattr(handler.model(), "on_demand", True)
    monkeypatch.setattr(handler.model().runtime, "invoke_endpoint", starting)
    status, body, headers = call(event())
    assert (status, body["error"]["code"]) == (503, "model_starting")
    assert int(headers["Retry-After"]) > 0


def test_the_limit_of_a_serverless_endpoint_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "MAX_BYTES", 4_000_000)
    status, body, _ = call(event(b"\0" * 4_100_000))
    assert (status, body["error"]["message"]) == (413, "The body has 3.9 MB; send at most 3.8 MB: scale the picture down.")


def test_an_unforeseen_fault_is_a_500_without_details(monkeypatch: pytest.MonkeyPatch):
    def broken(**_: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(handler.model().runtime, "invoke_endpoint", broken)
    status, body, _ = call(event())
    assert status == 500
    assert "secret detail" not in json.dumps(body)


def test_labels_come_from_the_champion():
    get = {"httpMethod": "GET", "resource": "/labels", "requestContext": {"requestId": "r"}}
    with Stubber(handler.model().s3) as stub:
        champion = {"labels_uri": "s3://data/runs/r/evaluation/labels.json", "run": "r", "top1": 0.9, "dataset_hash": "h"}
        stub.add_response("get_object", {"Body": body_of(champion)}, {"Bucket": "data", "Key": "champion.json"})
        expected = {"Bucket": "data", "Key": "runs/r/evaluation/labels.json"}
        stub.add_response("get_object", {"Body": body_of(["cat", "dog"])}, expected)
        status, body, _ = call(get)
        again, _, _ = call(get)
    assert (status, again) == (200, 200)
    assert body["labels"] == ["cat", "dog"]


@pytest.mark.parametrize("code", ["NoSuchKey", "AccessDenied"])
def test_labels_before_any_model(code: str):
    """S3 denies what does not exist to a role that may list some prefixes only."""
    with Stubber(handler.model().s3) as stub:
        stub.add_client_error("get_object", code)
        status, body, headers = call({"httpMethod": "GET", "resource": "/labels"})
    assert (status, body["error"]["code"]) == (503, "no_model")
    assert headers["Retry-After"]


def test_health_and_description():
    assert call({"httpMethod": "GET", "resource": "/health"})[0] == 200
    status, body, _ = call({"httpMethod": "GET", "resource": "/openapi.json"})
    assert status == 200
    assert set(body["paths"]) == {"/predict", "/predict/batch", "/explain", "/labels", "/health", "/openapi.json", "/"}


def test_the_page_may_run_its_own_script_and_nothing_else():
    answer = handler.handle({"httpMethod": "GET", "resource": "/"}, None)
    assert answer["statusCode"] == 200
    policy = answer["headers"]["Content-Security-Policy"]
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    text = answer["body"]
    assert text.count("<script") == text.count("<script>") == 1
    assert text.count("<style") == text.count("<style>") == 1
    for forbidden in (" onclick=", " onload=", " style=", "http://", "https://"):
        assert forbidden not in text
    assert page_module.policy(text) == policy


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_headers_are_read_without_decoding(kind: str):
    header = pictures.read_header(picture(kind, (123, 45)))
    assert (header.kind, header.width, header.height) == (kind.lower(), 123, 45)


def test_lossless_and_extended_webp():
    for options in ({"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}):
        target = io.BytesIO()
        Image.new("RGB", (300, 7)).save(target, "WEBP", **options)
        header = pictures.read_header(target.getvalue())
        assert (header.width, header.height) == (300, 7)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_truncated_headers_are_refused_not_crashed_on(kind: str):
    whole = picture(kind)
    for length in range(min(len(whole), 64)):
        try:
            pictures.read_header(whole[:length])
        except pictures.NotAPictureError:
            continue


def test_nothing_of_a_picture_or_token_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("DEBUG"), runtime() as stub:
        stub.add_response("invoke_endpoint", {"Body": body_of(GOOD)})
        given = event()
        given["headers"]["Authorization"] = "Bearer very-secret"
        call(given)
    assert "very-secret" not in caplog.text
    assert given["body"][:20] not in caplog.text
    assert '"status": 200' in caplog.text


def test_clients_have_time_limits_below_api_gateways():
    client = boto3.client("sagemaker-runtime", config=model_module._RUNTIME)
    longest = client.meta.config.read_timeout + client.meta.config.connect_timeout
    assert model_module.RETRY_WITHIN_S + longest < 27
    others = model_module._OTHERS
    assert 3 * (others.connect_timeout + others.read_timeout) < 27
