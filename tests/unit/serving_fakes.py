"""A model artifact that is made at once: its classes are the colours red, green and blue."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import server
import uvicorn
from classifier.serving import Preprocessing
from onnx import TensorProto, helper
from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue <&>": (20, 20, 220)}
SIZE = 32


def colour(name: str, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of one class."""
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[name]).save(out, kind)
    return out.getvalue()


def write_onnx(path: Path, *, weights: np.ndarray[Any, Any] | None = None, size: int = SIZE) -> None:
    """A network that ends in global average pooling and a linear layer, whose logits are the mean of each colour."""
    head = np.eye(3, dtype=np.float32) * 4 if weights is None else weights
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("AveragePool", ["input"], ["features"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [value("input", TensorProto.FLOAT, ["b", 3, size, size])],
        [value("logits", TensorProto.FLOAT, ["b", 3]), value("features", TensorProto.FLOAT, ["b", 3, size // 4, size // 4])],
        [onnx.numpy_helper.from_array(head.T.copy(), "head")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def write_model(folder: Path, **changes: Any) -> Path:
    """The artifact's folder; ``changes`` of model.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx(folder / "model.onnx")
    np.save(folder / "head.npy", np.eye(3, dtype=np.float32) * 4)
    (folder / "selftest").mkdir(exist_ok=True)
    (folder / "selftest" / "0.png").write_bytes(colour("green"))
    description = {
        "format": 2,
        "classes": ["r", "g", "b"],
        "labels": list(COLOURS),
        "preprocessing": Preprocessing.of(SIZE).to_json(),
        "temperature": 1.0,
        "run": "colours",
        "dataset_hash": "0" * 16,
        "top1": 1.0,
        "form": "onnxruntime-fp32",
        "explanation": "cam",
        "novelty": {"temperature": 1.0, "quantiles": [float(n) / 10 for n in range(101)]},
        "selftest": [{"file": "selftest/0.png", "label": "green", "probability": 0.9999}],
        **changes,
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The serving application on a port of this process; its address, once /ping says yes."""
    running = uvicorn.Server(uvicorn.Config(server.build_app(str(folder)), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    while httpx.get(f"{address}/ping").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield address
    finally:
        running.should_exit = True
        thread.join(20)
