"""The forms of one model: fp32, bf16 or int8, in ONNX Runtime or OpenVINO, and torch where it is installed (not needed here).

Every form is a file of the model artifact run by one of three engines. An engine answers logits, and where the file has it the
last feature map, from several threads at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from classifier.serving import Floats

FEATURES = "features"
"""Name of the ONNX model's second output, the feature map that a class activation map is made of; not every network has it."""


@dataclass(frozen=True)
class Form:
    """One way to run a model."""

    runtime: str
    precision: str
    file: str
    needs_any: tuple[str, ...] = ()
    """CPU flags of which one must be there: without them the form runs many times slower, or not at all."""

    @property
    def name(self) -> str:
        """For example ``openvino-int8``."""
        return f"{self.runtime}-{self.precision}"

    @property
    def fallback(self) -> str:
        """The form of the same runtime that every CPU runs."""
        return f"{self.runtime}-fp32"


_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
_BF16 = ("avx512_bf16", "amx_bf16")
FORMS = {
    form.name: form
    for form in (
        Form("onnxruntime", "fp32", "model.onnx"),
        Form("onnxruntime", "int8", "model.int8.onnx", _INT8),
        Form("openvino", "fp32", "model.onnx"),
        Form("openvino", "bf16", "model.onnx", _BF16),
        Form("openvino", "int8", "model.int8.onnx", _INT8),
        Form("torch", "fp32", "weights.safetensors"),
        Form("torch", "bf16", "weights.safetensors"),
    )
}
"""Those of torch need the image with torch (Dockerfile.gpu), which names one of them in MODEL_FORM."""


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; none where Linux lists none (ARM, other systems)."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def runs_here(form: Form, flags: frozenset[str]) -> bool:
    """Whether this CPU has what the form needs."""
    return not form.needs_any or not flags.isdisjoint(form.needs_any)


class Engine(Protocol):
    """A loaded form."""

    def run(self, batch: Floats, outputs: Sequence[str]) -> list[Floats]:
        """``(B, 3, S, S) float32`` to the named outputs (``logits``: ``(B, C)``; ``features``: ``(B, D, H, W)``)."""
        ...


class OnnxRuntimeEngine:
    """A session of ONNX Runtime; ``threads`` work on one batch."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A thread that spins while it waits takes the CPU from the threads that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def run(self, batch: Floats, outputs: Sequence[str]) -> list[Floats]:
        """See Engine. Safe to call from several threads."""
        return [np.asarray(output, dtype=np.float32) for output in self._session.run(list(outputs), {self._input: batch})]


class OpenVinoEngine:
    """A compiled model of OpenVINO with a stream for each of ``threads``, and a request for each thread that calls."""

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        # The converter, which OpenVINO takes along where it can, is a third of its import, and brings telemetry.
        sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
        import openvino

        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            # Left to itself OpenVINO takes bf16 for a file in fp32 wherever the CPU has it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        core = openvino.Core()
        self._model = core.compile_model(core.read_model(path), "CPU", properties)
        self._local = threading.local()

    def run(self, batch: Floats, outputs: Sequence[str]) -> list[Floats]:
        """See Engine. Safe to call from several threads."""
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._model.create_infer_request()
        request.infer({0: batch}, share_inputs=True)
        return [np.array(request.get_tensor(name).data, dtype=np.float32) for name in outputs]


def load(form: Form, folder: Path, threads: int) -> Engine:
    """The engine of a form whose file lies in ``folder``."""
    if form.runtime == "torch":
        from classifier.torch_engine import TorchEngine

        return TorchEngine(folder, form.precision)
    if form.runtime == "openvino":
        return OpenVinoEngine(folder / form.file, threads, form.precision)
    return OnnxRuntimeEngine(folder / form.file, threads)
