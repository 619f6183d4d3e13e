"""The serving container under attack, under too much load, and at its end; and the parsers of what it is sent."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import inference
import numpy as np
import psutil
import pytest
import server
from hostile_pictures import hostile
from hypothesis import given, settings
from hypothesis import strategies as st
from inference import Parameters, RequestError
from model_fakes import MODEL_CODE
from PIL import Image
from serving_fakes import COLOURS, colour, serving, write_model

PICTURE = {"Content-Type": "application/x-image"}


@contextlib.contextmanager
def container(model: Path, port: int, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The container's own command, and its address once /ping says yes."""
    env = {**os.environ, "SM_MODEL_DIR": str(model), "SAGEMAKER_BIND_TO_PORT": str(port), "BIND_HOST": "127.0.0.1", **environment}
    process = subprocess.Popen([sys.executable, str(MODEL_CODE / "server.py"), "serve"], env=env, stderr=subprocess.PIPE)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{address}/ping").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


def test_a_thousand_hostile_pictures_get_their_status_and_do_no_harm(model: Path, free_port: int):
    with container(model, free_port) as (process, address), httpx.Client(base_url=address) as client:
        for name in COLOURS:
            client.post("/invocations", content=colour(name), headers=PICTURE)
        measured = psutil.Process(process.pid)
        wrong, kinds, peak_mb = [], Counter[str](), 0.0
        for kind, content, allowed in hostile(1000):
            status = client.post("/invocations", content=content, headers=PICTURE, timeout=30).status_code
            kinds[kind] += 1
            peak_mb = max(peak_mb, measured.memory_info().rss / 2**20)
            if status not in allowed:
                wrong.append((kind, status, allowed))
        assert kinds.total() == 1000
        assert len(kinds) == 13
        assert wrong == []
        assert peak_mb < 600  # a picture of 9 megapixels is decoded in some copies; nothing piles up
        assert client.post("/invocations", content=colour("red"), headers=PICTURE).json()["predictions"][0]["label"] == "red"
        assert process.poll() is None


def test_a_refused_body_is_not_kept_while_its_connection_stays_open(model: Path, free_port: int):
    """400 idle connections with a picture each would be 16 MB."""
    body_kb, request = 120, b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"

    def refused() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", free_port), timeout=10)
        connection.sendall(request % (body_kb * 1024) + b"x" * body_kb * 1024)
        assert connection.recv(20).startswith(b"HTTP/1.1 415")
        return connection

    with container(model, free_port) as (process, _), contextlib.ExitStack() as kept:
        measured = psutil.Process(process.pid)
        for _ in range(20):
            kept.enter_context(refused())
        before_mb = measured.memory_info().rss / 2**20
        for _ in range(200):
            kept.enter_context(refused())
        grown_mb = measured.memory_info().rss / 2**20 - before_mb
    assert grown_mb < 200 * body_kb / 1024 / 3


def test_too_much_is_refused_and_everything_is_accounted_for(model: Path, free_port: int):
    large = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)).save(large, "JPEG", quality=95)
    picture = large.getvalue()
    seen: Counter[int] = Counter()
    sent = Counter[str]()
    slowest_ping = 0.0
    lock, stopped = threading.Lock(), threading.Event()

    def post(address: str) -> None:
        with httpx.Client(base_url=address, timeout=30) as client:
            while not stopped.is_set():
                with lock:
                    sent["requests"] += 1
                answer = client.post("/invocations", content=picture, headers=PICTURE)
                if answer.status_code == 429:
                    assert int(answer.headers["Retry-After"]) > 0
                with lock:
                    seen[answer.status_code] += 1

    with container(model, free_port, INFERENCE_WORKERS="1", MAX_WAIT_S="0.05") as (_, address):
        threads = [threading.Thread(target=post, args=(address,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            started = time.monotonic()
            assert httpx.get(f"{address}/ping", timeout=10).status_code == 200
            slowest_ping = max(slowest_ping, time.monotonic() - started)
            time.sleep(0.1)
        stopped.set()
        for thread in threads:
            thread.join()
        assert seen.total() == sent["requests"]
        assert set(seen) == {200, 429}
        assert slowest_ping < 5  # how fast it is, the benchmark says
        assert httpx.post(f"{address}/invocations", content=colour("red"), headers=PICTURE).status_code == 200


def test_a_ping_waits_for_no_picture(model: Path, monkeypatch: pytest.MonkeyPatch):
    """It is answered while every worker is held by one."""
    busy, free, predict = threading.Semaphore(0), threading.Event(), server.predict_fn

    def held(*given: Any) -> dict[str, Any]:
        busy.release()
        free.wait(60)
        return predict(*given)

    answers: list[int] = []

    def post(address: str) -> None:
        answers.append(httpx.post(f"{address}/invocations", content=colour("red"), headers=PICTURE, timeout=60).status_code)

    with serving(model) as address:
        monkeypatch.setattr(server, "predict_fn", held)
        threads = [threading.Thread(target=post, args=(address,)) for _ in range(server.WORKERS + 3)]
        for thread in threads:
            thread.start()
        for _ in range(server.WORKERS):
            assert busy.acquire(timeout=30)
        assert httpx.get(f"{address}/ping", timeout=30).status_code == 200
        assert answers == []
        free.set()
        for thread in threads:
            thread.join()
    assert answers == [200] * len(threads)


def test_what_is_under_way_is_answered_before_the_end(model: Path, free_port: int):
    slow = io.BytesIO()
    Image.effect_noise((4500, 4500), 90).quantize(4).save(slow, "PNG")
    with container(model, free_port) as (process, address):
        answers: list[int] = []
        body = slow.getvalue()
        assert len(body) < server.MAX_BODY

        def post() -> None:
            answers.append(httpx.post(f"{address}/invocations", content=body, headers=PICTURE, timeout=30).status_code)

        thread, measured = threading.Thread(target=post), psutil.Process(process.pid)
        idle_s = measured.cpu_times().user
        thread.start()
        while measured.cpu_times().user < idle_s + 0.1:  # until it decodes
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers == [200]
        assert process.wait(timeout=15) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was given
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/ping")


# --- parsers ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(text=st.text(max_size=200) | st.from_regex(r"(top_k|threshold|explain|label)=[^,]{0,10}(,[a-z_]+=.{0,5})*", fullmatch=True))
def test_custom_attributes_are_parameters_or_refused(text: str):
    status, found = 200, Parameters()
    try:
        found = Parameters.of(text)
    except RequestError as problem:
        status = problem.status
    assert status in (200, 422)
    assert 1 <= found.top_k <= 1000
    assert 0 <= found.threshold <= 1


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: f'{{"images": ["{text}"]}}'.encode()))
def test_json_is_pictures_or_refused(body: bytes):
    status, pictures = 200, [b""]
    try:
        pictures, _ = inference.pictures_in_json(body)
    except RequestError as problem:
        status = problem.status
    assert status in (200, 400, 413, 422)
    assert 1 <= len(pictures) <= inference.MAX_PICTURES


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=inference.MAX_PICTURES))
def test_a_forms_pictures_come_out_as_they_went_in(parts: list[bytes]):
    line = b"--" + b"b" * 60
    head = b'\r\nContent-Disposition: form-data; name="f"; filename="x"\r\nContent-Type: image/png\r\n\r\n'
    body = b"".join(line + head + part + b"\r\n" for part in parts) + line + b"--\r\n"
    assert server.pictures_in_form(body, f"multipart/form-data; boundary={'b' * 60}") == parts


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=400), boundary=st.text(max_size=10))
def test_a_damaged_form_is_refused(body: bytes, boundary: str):
    with pytest.raises(RequestError) as refused:
        server.pictures_in_form(body, f"multipart/form-data; boundary={boundary}")
    assert refused.value.status in (400, 413, 422)
