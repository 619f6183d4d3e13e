"""The form that serves: all candidates are made, timed and checked on validation pictures; the fastest that keeps its word wins."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifier import forms
from classifier.cpus import cpu_count
from classifier.errors import one_line
from classifier.forms import FORMS, Engine, Form
from classifier.serving import Floats, Pixels, Preprocessing, normalise

MAX_LOSS = 0.005
"""Top1 on valid that a faster form may lose against fp32."""
REFERENCE = "onnxruntime-fp32"
SAMPLE_BYTES = 128 * 2**20
"""Pictures that forms are checked on are kept decoded; more are left out evenly."""
CALIBRATION = 128
"""Pictures from which the ranges of int8 are read."""
BATCH = 8
TIMED_S = 0.4
"""Seconds for which each form is timed, interleaved with the others."""


@dataclass
class Candidate:
    """A form with its figures; ``refused`` says why it cannot serve, and is empty for one that can."""

    form: str
    batch1_ms: float | None = None
    """Median for one picture on one thread."""
    batch8_ms: float | None = None
    valid_top1: float | None = None
    agreement: float | None = None
    """Share of pictures to which the reference gives the same class."""
    refused: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Sample:
    """Validation pictures for the check: ``(N, S, S, 3) uint8`` and their classes ``(N,)``."""

    squares: Pixels
    labels: np.ndarray[Any, np.dtype[np.int64]]

    def batches(self, preprocessing: Preprocessing, most: int | None = None) -> Iterator[Floats]:
        """Network inputs of up to BATCH pictures."""
        for start in range(0, len(self.squares[:most]), BATCH):
            yield normalise(self.squares[start : min(start + BATCH, most or len(self.squares))], preprocessing)


def stride(pictures: int, image_size: int) -> int:
    """Every how manyth picture goes into the sample."""
    return max(1, -(-pictures * 3 * image_size**2 // SAMPLE_BYTES))


def choose(folder: Path, sample: Sample, preprocessing: Preprocessing) -> list[dict[str, Any]]:
    """All forms with their figures, one of them chosen. Writes the int8 file beside model.onnx."""
    candidates = {name: Candidate(name) for name, form in FORMS.items() if form.runtime != "torch"}
    try:
        quantise(folder / "model.onnx", folder / "model.int8.onnx", sample, preprocessing)
    except Exception as problem:  # an operator that the quantiser does not know must not end a run: fp32 serves
        for candidate in candidates.values():
            if candidate.form.endswith("-int8"):
                candidate.refused = f"int8 could not be made: {one_line(problem)[:200]}"
    engines = dict(_loaded(folder, candidates, threads=1))
    _time(engines, candidates, preprocessing)
    del engines  # compiled models are large, and the checks load them again with all threads
    _check(folder, candidates, sample, preprocessing)
    able = [candidate for candidate in candidates.values() if not candidate.refused]
    best = min(able, key=lambda candidate: candidate.batch1_ms or float("inf"))
    best.chosen = True
    return [asdict(candidate) for candidate in candidates.values()]


def quantise(source: Path, target: Path, sample: Sample, preprocessing: Preprocessing) -> None:
    """int8 with quantise and dequantise nodes (QDQ), weights per channel, which both runtimes read."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(source, load_external_data=False).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            every = max(1, len(sample.squares) // CALIBRATION)
            some = Sample(sample.squares[::every], sample.labels[::every])
            self._batches = some.batches(preprocessing, CALIBRATION)

        def get_next(self) -> dict[str, Floats] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    # It warns on the root logger about choices that are made here on purpose.
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as work:
            ready = Path(work) / "ready.onnx"
            quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
            quantize_static(
                str(ready),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        logging.disable(logging.NOTSET)


def _loaded(folder: Path, candidates: dict[str, Candidate], threads: int) -> Iterator[tuple[str, Engine]]:
    """Engines of the candidates that load here; the others are refused."""
    flags = forms.cpu_flags()
    for name, candidate in candidates.items():
        form: Form = FORMS[name]
        if candidate.refused:
            continue
        if not forms.runs_here(form, flags):
            candidate.refused = f"this CPU has none of {', '.join(form.needs_any)}"
            continue
        try:
            yield name, forms.load(form, folder, threads)
        except Exception as problem:  # engines raise kinds of their own
            candidate.refused = f"could not be loaded: {one_line(problem)[:200]}"


def _time(engines: dict[str, Engine], candidates: dict[str, Candidate], preprocessing: Preprocessing) -> None:
    """Medians over rounds in which every form has its turn, so that a disturbance hits all alike."""
    generator = np.random.default_rng(0)
    size = preprocessing.image_size
    for rows, field in ((1, "batch1_ms"), (BATCH, "batch8_ms")):
        batch = generator.standard_normal((rows, 3, size, size), dtype=np.float32)
        times: dict[str, list[float]] = {name: [] for name in engines}
        deadline = time.perf_counter() + TIMED_S * len(engines)
        while time.perf_counter() < deadline or len(next(iter(times.values()))) < 4:
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.run(batch, ["logits"])
                times[name].append((time.perf_counter() - started) * 1000)
        for name, taken in times.items():
            setattr(candidates[name], field, round(statistics.median(taken[1:]), 3))


def _check(folder: Path, candidates: dict[str, Candidate], sample: Sample, preprocessing: Preprocessing) -> None:
    """Top1 and agreement on the sample; a form that loses too much is refused."""
    said: dict[str, Any] = {}
    for name, engine in _loaded(folder, candidates, threads=cpu_count()):
        logits = np.concatenate([engine.run(batch, ["logits"])[0] for batch in sample.batches(preprocessing)])
        said[name] = logits.argmax(axis=1)
        candidates[name].valid_top1 = round(float((said[name] == sample.labels).mean()), 5)
        if not np.isfinite(logits).all():
            candidates[name].refused = "its logits are no finite numbers"
    reference = candidates[REFERENCE].valid_top1 or 0.0
    for name, predicted in said.items():
        candidate = candidates[name]
        candidate.agreement = round(float((predicted == said[REFERENCE]).mean()), 5)
        if not candidate.refused and (candidate.valid_top1 or 0.0) < reference - MAX_LOSS:
            lost = 100 * (reference - (candidate.valid_top1 or 0.0))
            candidate.refused = f"loses {lost:.1f} points of top1 on valid; at most {100 * MAX_LOSS:.1f} are allowed"
