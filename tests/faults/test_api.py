"""Row 10: an attacker at the API and at the container behind it. Documented answers only; others are served meanwhile."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_fakes
import httpx
import pytest
from fault_table import Landed
from model_fakes import MODEL_CODE
from serving_fakes import COLOURS, colour, serving, write_model

pytestmark = pytest.mark.fault(10)

DOCUMENTED = {200, 400, 401, 404, 406, 413, 415, 422, 429, 503, 504}
CLOSED_IN_S = 15
PICTURE = {"Content-Type": "application/x-image"}


# --- the container: sockets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory, free_port: int) -> Iterator[str]:
    """The container's own command, once it serves."""
    model = write_model(tmp_path_factory.mktemp("served"))
    env = {**os.environ, "SM_MODEL_DIR": str(model), "SAGEMAKER_BIND_TO_PORT": str(free_port), "BIND_HOST": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, str(MODEL_CODE / "server.py"), "serve"], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{free_port}/ping").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.05)
    yield f"http://127.0.0.1:{free_port}"
    assert process.poll() is None, "it did not survive"
    process.kill()
    process.wait()


HEAD = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
SLOW: dict[str, tuple[bytes, bytes]] = {
    "nothing at all": (b"", b""),
    "half a request line": (b"POST /invoc", b""),
    "headers without end": (HEAD, b"X-A: b\r\n"),
    "one letter at a time": (b"P", b"O"),
    "a body without end": (HEAD + b"Content-Length: 100000\r\n\r\n", b"x"),
    "chunks without end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
}
"""What is sent at first, and then again and again."""


QUICK = "headers without end"


@pytest.mark.parametrize("kind", [kind if kind == QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW])
def test_slow_clients_on_300_sockets_are_cut_off_while_others_are_served(container: str, landed: Landed, kind: str):
    first, more = SLOW[kind]
    port = int(container.rsplit(":", 1)[1])
    sockets = []
    for _ in range(300):
        sockets.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        sockets[-1].setblocking(False)
        if first:
            sockets[-1].send(first)
    landed(300)
    opened = time.monotonic()
    answers = 0
    open_ones = set(sockets)
    while open_ones and time.monotonic() < opened + CLOSED_IN_S + 5:
        answer = httpx.post(f"{container}/invocations", content=colour("green"), headers=PICTURE, timeout=10)
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["label"] == "green"
        answers += 1
        for one in list(open_ones):
            if closed(one, more):
                open_ones.discard(one)
        time.sleep(0.25)
    took = time.monotonic() - opened
    for one in sockets:
        one.close()
    assert not open_ones, f"{len(open_ones)} of 300 are open after {took:.0f} s"
    assert took < CLOSED_IN_S
    assert answers >= took


def closed(one: socket.socket, more: bytes) -> bool:
    """Send a little more; whether the other side has closed."""
    try:
        if more:
            one.send(more)
        while data := one.recv(65536):
            assert data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")) or b"HTTP" not in data
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def said(container: str, request: bytes) -> tuple[int, bytes]:
    """What is answered to raw bytes: (status, all of it); status 0 for a connection that was just closed."""
    with socket.create_connection(("127.0.0.1", int(container.rsplit(":", 1)[1])), timeout=20) as one:
        content = b""
        try:
            one.sendall(request)
            one.shutdown(socket.SHUT_WR)
            while data := one.recv(65536):
                content += data
        except OSError:
            pass
    return (int(content.split(b" ", 2)[1]) if content.startswith(b"HTTP/") else 0), content


RAW: dict[str, bytes] = {
    "1 MB in one header": HEAD + b"X-A: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "1 MB in many headers": HEAD + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 100) for n in range(9000)) + b"\r\n",
    "1 MB of path": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length that is no number": HEAD + b"Content-Length: 0x10\r\n\r\n",
    "an enormous length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    "a chunk of an enormous size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
    "a header with a line end": HEAD + b"X: a\nb\r\n\r\n",
    "a zero byte": b"GET /ping\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": os.urandom(5000),
    "HTTP/9.9": b"GET /ping HTTP/9.9\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
    "TRACE": b"TRACE /invocations HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "an absolute address": b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that climbs": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "a coded path that climbs": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade": HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\n\r\n",
}


@pytest.mark.parametrize("kind", RAW)
def test_requests_that_are_none_are_refused_and_do_no_harm(container: str, landed: Landed, kind: str):
    status, content = said(container, RAW[kind])
    assert status == 0 or 400 <= status < 500, content[:300]
    assert b"root:" not in content
    assert b"Traceback" not in content
    assert httpx.post(f"{container}/invocations", content=colour("red"), headers=PICTURE).status_code == 200
    landed()


# --- the Lambda ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(write_model(tmp_path_factory.mktemp("model"))) as served:
        yield served


@pytest.fixture
def client(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """The API's Lambda, as API Gateway calls it, in front of the real serving application."""
    api_fakes.set_environment(monkeypatch)
    endpoint = api_fakes.Endpoint(address)
    with api_fakes.connected(endpoint, list(COLOURS)):
        yield httpx.Client(transport=httpx.WSGITransport(app=api_fakes.application), base_url="https://api.example")
    endpoint.close()


TOKENS = [
    None, "", "Bearer", "Bearer ", "Bearer wrong", "bearer", f"Basic {api_fakes.TOKEN}", api_fakes.TOKEN,
    f"Bearer {api_fakes.TOKEN}x",
    f"Bearer {api_fakes.TOKEN[:-1]}", f"Bearer {api_fakes.TOKEN.upper()}", "Bearer " + "a" * 1_000_000, "Bearer ' OR 1=1 --",
    "Bearer null", "Bearer undefined", "Bearer *", f"Bearer {api_fakes.TOKEN},{api_fakes.TOKEN}",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: str(token)[:20])
def test_no_token_but_the_right_one_opens_anything(monkeypatch: pytest.MonkeyPatch, landed: Landed, token: str | None):
    import importlib.util

    path = Path(__file__).resolve().parents[2] / "lambdas" / "authorize" / "authorize.py"
    spec = importlib.util.spec_from_file_location("authorize_under_attack", path)
    assert spec is not None
    assert spec.loader is not None
    authorize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authorize)
    monkeypatch.setattr(authorize, "secret", lambda: type("Secret", (), {"value": lambda self: api_fakes.TOKEN})())
    arn = "arn:aws:execute-api:us-east-1:000000000000:api/dev/POST/predict"
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        authorize.handle({"authorizationToken": token, "methodArn": arn}, None)
    landed()
    assert authorize.handle({"authorizationToken": f"Bearer {api_fakes.TOKEN}", "methodArn": arn}, None)["principalId"] == "token"


def test_a_token_that_was_replaced_expires(monkeypatch: pytest.MonkeyPatch, landed: Landed):
    """The Lambda keeps what it read for SECRET_TTL_S, and not longer."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lambdas" / "authorize"))
    import authorize

    class Manager:
        token = "old"

        def get_secret_value(self, SecretId: str) -> dict[str, str]:  # noqa: N803 - AWS's name
            return {"SecretString": self.token}

    manager, now = Manager(), [1000.0]
    monkeypatch.setattr(authorize.boto3, "client", lambda _: manager)
    monkeypatch.setattr(authorize.time, "monotonic", lambda: now[0])
    secret = authorize.Secret("arn")
    assert secret.value() == "old"
    manager.token = "new"
    now[0] += authorize.SECRET_TTL_S + 1
    assert secret.value() == "new"
    landed()


BODIES: list[tuple[str, Any]] = [
    ("image/png", "%%% not base64"), ("image/png", "A"), ("image/png", "QUJD="), ("image/png", "\u20ac\u20ac"), ("image/png", None),
    ("image/png", ""), ("application/json", base64.b64encode(b'{"image": "%%%"}').decode()),
    ("application/json", base64.b64encode(b"[" * 100_000).decode()), ("application/json", base64.b64encode(b"\xff\xfe").decode()),
    ("application/json", base64.b64encode(b'{"images": []}').decode()), ("application/json", base64.b64encode(b"null").decode()),
    ("application/json", base64.b64encode(json.dumps({"images": ["AAAA"] * 500}).encode()).decode()),
    ("multipart/form-data", base64.b64encode(b"--x").decode()), ("multipart/form-data; boundary=", base64.b64encode(b"x").decode()),
    ("multipart/form-data; boundary=" + "b" * 5000, base64.b64encode(b"x").decode()), ("text/html", "PGI+"), ("", "AAAA"),
    ("image/png; charset=\udcff", "AAAA"), ("IMAGE/PNG", "AAAA"), ("image/svg+xml", base64.b64encode(b"<svg/>").decode()),
]  # fmt: skip


@pytest.mark.parametrize("route", ["/predict", "/predict/batch", "/explain"])
def test_bodies_that_are_none_get_documented_answers(client: httpx.Client, landed: Landed, route: str):
    for kind, body in BODIES:
        event = {
            "httpMethod": "POST", "resource": route, "path": route, "headers": {"content-type": kind, "accept": "image/png"},
            "body": body, "isBase64Encoded": True, "requestContext": {"requestId": "r"},
        }  # fmt: skip
        answer = api_fakes.handler.handle(event, None)
        assert answer["statusCode"] in DOCUMENTED - {200}, (kind, str(body)[:40])
        assert json.loads(answer["body"])["error"]["message"]
        landed()


@pytest.mark.parametrize(
    "method", ["TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "HEAD", "CONNECT", "PROPFIND", "get", "G\u00cbT", ""]
)
def test_other_methods_are_not_found(client: httpx.Client, landed: Landed, method: str):
    for route in ("/predict", "/labels", "/health", "/"):
        event = {"httpMethod": method, "resource": route, "path": route, "headers": None, "body": None, "requestContext": {}}
        assert api_fakes.handler.handle(event, None)["statusCode"] == 404
        landed()


PATHS = [
    "/predict/", "//predict", "/predict//", "/PREDICT", "/predict/../labels", "/%2e%2e/labels", "/labels/../../etc/passwd",
    "/predict%00", "/predict;x=1", "/predict?x", "/health/../predict", "/..", "/.", "/%", "/predict/batch/x", "/\u202epredict",
    "/" + "a" * 8000, "/labels%2f", "\\labels",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:24])
def test_tricks_with_paths_open_nothing_without_a_token(client: httpx.Client, landed: Landed, path: str):
    event = {"httpMethod": "GET", "resource": path, "path": path, "headers": {}, "body": None, "requestContext": {}}
    assert api_fakes.handler.handle(event, None)["statusCode"] == 404
    answer = client.get("https://api.example" + (path if path.startswith("/") else "/" + path))
    assert answer.status_code in (401, 404, 200)
    if answer.status_code == 200:  # normalised by the gateway to an open route
        assert answer.url.path.rstrip("/.") in ("", "/%", "/health")
    landed()


def test_random_events_are_answered_with_documented_statuses(client: httpx.Client, landed: Landed):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    chance = random.Random(seed)
    junk: list[Any] = [None, "", "x", 5, [], {}, {"a": None}, True, "\0", "9" * 500, -1, 1e308]
    names = ["httpMethod", "resource", "path", "queryStringParameters", "headers", "body", "isBase64Encoded"]
    # The types of these two are API Gateway's promise.
    maps: list[Any] = [None, {}, {"x": "y"}, {"top_k": "\0"}, {"content-type": None}, {"Accept": "9" * 500}]
    good = {
        "httpMethod": "POST", "resource": "/predict", "path": "/predict", "headers": {"content-type": "image/png"},
        "queryStringParameters": {"top_k": "3"}, "body": base64.b64encode(colour("green")).decode(), "isBase64Encoded": True,
        "requestContext": {"requestId": "r"},
    }  # fmt: skip
    assert api_fakes.handler.handle(good, None)["statusCode"] == 200
    for _ in range(500):
        chosen = chance.sample(names, chance.randrange(1, 4))
        event = {**good, **{name: chance.choice(maps if name in ("queryStringParameters", "headers") else junk) for name in chosen}}
        assert api_fakes.handler.handle(event, None)["statusCode"] in DOCUMENTED, event
        landed()


def test_a_picture_of_the_right_kind_still_passes(client: httpx.Client, landed: Landed):
    out = io.BytesIO(colour("green"))
    answer = client.post("/predict", content=out.getvalue(), headers={"Authorization": f"Bearer {api_fakes.TOKEN}", **PICTURE})
    assert answer.status_code == 200
    landed()
