"""The serving container's program over real HTTP, and that it needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import torch
from classifier import export, serving, training
from classifier.served_model import ServedModel
from model_fakes import MODEL_CODE, config, picture, prepared


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    os.environ["SM_CHANNEL_DATASET"] = str(prepared(folder))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        setup = training.prepare_run(config(epochs=1))
    finally:
        del os.environ["SM_CHANNEL_DATASET"], os.environ["OMP_NUM_THREADS"]
    torch.manual_seed(0)
    export.export(setup, setup.network, [], folder / "model")
    return folder / "model"


def _start(model_dir: Path, port: int) -> subprocess.Popen[bytes]:
    env = {**os.environ, "SM_MODEL_DIR": str(model_dir), "SAGEMAKER_BIND_TO_PORT": str(port), "BIND_HOST": "127.0.0.1"}
    return subprocess.Popen([sys.executable, str(MODEL_CODE / "server.py"), "serve"], env=env, stderr=subprocess.PIPE)


def _ping(port: int, wanted: int) -> httpx.Response:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/ping")
            if answer.status_code == wanted:
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"/ping did not answer {wanted} within 30 s")


@pytest.fixture(scope="module")
def server(model_dir: Path, free_port: int) -> Iterator[str]:
    process = _start(model_dir, free_port)
    try:
        _ping(free_port, 200)
        yield f"http://127.0.0.1:{free_port}/invocations"
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_a_picture_gets_sorted_labels(server: str, model_dir: Path):
    body = picture(3)
    answer = httpx.post(
        server, content=body, headers={"Content-Type": "image/png", "X-Amzn-SageMaker-Custom-Attributes": "top_k=2"}
    )
    assert answer.status_code == 200
    predictions = answer.json()["predictions"]
    assert len(predictions) == 2
    assert predictions[0]["probability"] >= predictions[1]["probability"]
    model = ServedModel(model_dir)
    assert predictions == serving.top_k(model.predict(serving.decode(body)), model.labels, 2)
    assert set(answer.json()["model"]) == {"run", "dataset_hash", "top1", "form"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"hello", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"hello", {"Content-Type": "image/png"}, 422, "not_decodable"),
        (b"", {"Content-Type": "image/png"}, 422, "empty_body"),
        (b"\0" * (6 * 2**20 + 1), {"Content-Type": "image/png"}, 413, "body_too_large"),
        (picture(1)[:200], {"Content-Type": "application/x-image"}, 422, "not_decodable"),
        (picture(1), {"Content-Type": "image/png", "X-Amzn-SageMaker-Custom-Attributes": "top_k=0"}, 422, "bad_top_k"),
        (picture(1), {"Content-Type": "image/png", "Accept": "text/csv"}, 406, "not_acceptable"),
    ],
    ids=["type", "no picture", "empty", "too large", "cut off", "top_k", "accept"],
)
def test_errors_are_answered_in_one_form(server: str, body: bytes, headers: dict[str, str], status: int, code: str):
    answer = httpx.post(server, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"]


def test_without_a_model_ping_says_why(tmp_path: Path, own_port: int):
    process = _start(tmp_path, own_port)
    try:
        answer = _ping(own_port, 503)
        while "being loaded" in answer.text:
            answer = _ping(own_port, 503)
        assert answer.headers["Retry-After"] == "1"
        assert "model.json is missing" in answer.json()["error"]["message"]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_the_server_imports_no_torch():
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import server; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, str(MODEL_CODE)], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"torch", "torchvision", "boto3", "pandas", "plotly", "smdebug"}


BASE_MB = 125
"""python:3.12-slim on amd64, unpacked (https://hub.docker.com/_/python)."""


def test_the_image_is_small_by_its_parts():
    """The base, and what the locked packages unpack to, less what the Dockerfile deletes again."""
    text = (MODEL_CODE / "Dockerfile").read_text()
    deleted = next(line for line in text.splitlines() if "rm -f" in line).split()[3:]
    locked = (MODEL_CODE / "requirements-server.txt").read_text()
    names = [line.split("==")[0] for line in locked.splitlines() if "==" in line]
    assert {"onnxruntime", "openvino", "numpy", "pillow", "starlette", "uvicorn"} <= set(names)
    sizes = {}
    for name in names:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another Python or system than this one
        kept = [f for f in files if not ("openvino/libs/" in str(f) and any(fnmatch(f.name, rule) for rule in deleted))]
        sizes[name] = sum(Path(str(f.locate())).stat().st_size for f in kept if Path(str(f.locate())).is_file()) / 1e6
    assert sizes["openvino"] > 50
    assert BASE_MB + sum(sizes.values()) < 400, sizes
    assert not {"torch", "torchvision", "boto3", "onnx"} & set(names)
    assert "USER 1000" in text
    assert "--require-hashes" in text
