"""A model artifact that answers: the form that suits this CPU, with its labels, calibration, heat maps and self-test."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from classifier import explaining, forms, novelty
from classifier.forms import FEATURES, FORMS, Form
from classifier.serving import Floats, Pixels, Preprocessing, centre, decode, normalise, softmax, to_square

PROBABILITY_TOLERANCE = 0.2
"""How far the self-test's probabilities may be off: forms differ by a few points, a broken model by many."""
HEAD = "head.npy"
"""Weights of the last linear layer, ``(C, D) float32``, for class activation maps."""


class ModelError(RuntimeError):
    """A model artifact that cannot serve; the message says why."""


def describe_model(folder: Path) -> dict[str, Any]:
    """The content of model.json. Raises ModelError."""
    try:
        found: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder / 'model.json'} is missing: the model artifact must hold model.json and model.onnx") from None
    except ValueError as problem:
        raise ModelError(f"{folder / 'model.json'} is damaged ({problem}): deploy another model package") from None
    return found


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def choose_form(info: dict[str, Any], flags: frozenset[str], wanted: str = "") -> Form:
    """The form that ``model.json`` (or ``wanted``) names, or the fp32 form of its runtime where this CPU lacks what it needs.

    Raises ModelError for a name that is no form.
    """
    name = wanted or str(info.get("form") or "onnxruntime-fp32")
    if name not in FORMS:
        raise ModelError(f"the form {name!r} is not known: expected one of {', '.join(FORMS)}")
    form = FORMS[name]
    return form if forms.runs_here(form, flags) else FORMS[form.fallback]


class ServedModel:
    """model.json and a loaded form. Safe to call from several threads."""

    def __init__(self, folder: Path, threads: int = 1, form: str = "") -> None:
        """``threads`` that work at once; ``form`` overrides model.json's choice. Raises ModelError."""
        self.folder = folder
        self.info = describe_model(folder)
        self.preprocessing = Preprocessing.from_json(self.info["preprocessing"])
        self.labels: list[str] = [str(label) for label in self.info["labels"]]
        self.temperature = float(self.info.get("temperature", 1.0))
        self.form = choose_form(self.info, forms.cpu_flags(), form)
        if not (folder / self.form.file).is_file():
            raise ModelError(f"{folder / self.form.file} is missing: form {self.form.name} needs it")
        self._check_files()
        try:
            self._engine = forms.load(self.form, folder, threads)
        except Exception as problem:  # engines raise kinds of their own
            raise ModelError(f"{self.form.file} could not be loaded by {self.form.runtime}: {str(problem)[:300]}") from problem

    def _check_files(self) -> None:
        """Raises ModelError for a file that will be used and is not the one whose hash model.json holds."""
        known = self.info.get("sha256") or {}
        for name in (self.form.file, HEAD, *(example["file"] for example in self.info.get("selftest") or [])):
            path = self.folder / name
            if name in known and path.is_file() and sha256(path) != known[name]:
                raise ModelError(f"{path} is damaged: its hash is not the one in model.json: deploy another model package")

    def logits(self, batch: Floats) -> Floats:
        """``(B, 3, S, S) float32`` to ``(B, C) float32``."""
        return self._engine.run(batch, ["logits"])[0]

    def decode(self, data: bytes) -> Image.Image:
        """A picture for the other functions; of a large JPEG no more pixels than they need. Raises PictureError."""
        return decode(data, self.preprocessing.resize_size)

    def square(self, picture: Image.Image) -> Pixels:
        """What the network sees of a picture: ``(S, S, 3) uint8``."""
        return centre(to_square(picture, self.preprocessing.resize_size), self.preprocessing.image_size)

    def classify(self, picture: Image.Image) -> Floats:
        """Logits ``(1, C)`` of one decoded picture."""
        return self.logits(normalise(self.square(picture)[None], self.preprocessing))

    def probabilities(self, logits: Floats) -> Floats:
        """Calibrated, along the last axis."""
        return softmax(logits, self.temperature)

    def predict(self, picture: Image.Image) -> Floats:
        """Calibrated probabilities ``(C,)`` of one decoded picture."""
        return np.asarray(self.probabilities(self.classify(picture))[0])

    def novelty(self, logits: Floats) -> list[float] | None:
        """0 to 1 a picture, see ``novelty.novelty``; None for an artifact without the figures."""
        known = self.info.get("novelty")
        return novelty.novelty(logits, float(known["temperature"]), known["quantiles"]) if known else None

    def explain(self, picture: Image.Image, label: int | None = None) -> tuple[bytes, int, float]:
        """A PNG of where class ``label`` (the likeliest without) is seen, that class, and its probability."""
        square = self.square(picture)
        batch = normalise(square[None], self.preprocessing)
        mapped = self.info.get("explanation") == "cam"
        logits, *maps = self._engine.run(batch, ["logits", FEATURES] if mapped else ["logits"])
        chances = self.probabilities(logits)[0]
        chosen = int(chances.argmax()) if label is None else label
        if mapped:
            heat = explaining.activation_map(maps[0][0], np.load(self.folder / HEAD, mmap_mode="r", allow_pickle=False)[chosen])
        else:
            heat = explaining.occlusion_map(batch, chosen, lambda hidden: self.probabilities(self.logits(hidden)))
        return explaining.overlay(square, heat), chosen, float(chances[chosen])

    def describe(self) -> dict[str, Any]:
        """What an answer says about the model."""
        return {**{name: self.info.get(name) for name in ("run", "dataset_hash", "top1")}, "form": self.form.name}

    def self_test(self, max_ms: float) -> None:
        """Classify the pictures that the evaluation put into the artifact, or a grey one where there are none.

        Raises ModelError when a label differs, a probability is off by more than PROBABILITY_TOLERANCE or not finite, or the
        median time is above ``max_ms``: a model that is broken in any of these ways never gets a request.
        """
        examples = self.info.get("selftest") or []
        times = []
        for example in examples:
            picture = self.decode((self.folder / example["file"]).read_bytes())
            started = time.perf_counter()
            chances = self.predict(picture)
            times.append((time.perf_counter() - started) * 1000)
            self._check(example, chances)
        if not examples:
            started = time.perf_counter()
            chances = self.predict(Image.new("RGB", (64, 64), (127, 127, 127)))
            times.append((time.perf_counter() - started) * 1000)
            if not np.isfinite(chances).all():
                raise ModelError("the self-test gave probabilities that are no numbers: deploy another model package")
        if statistics.median(times) > max_ms:
            raise ModelError(
                f"the self-test took {statistics.median(times):.0f} ms a picture, more than {max_ms:.0f}: "
                "choose a smaller backbone, a faster instance, or raise SELF_TEST_MAX_MS"
            )

    def _check(self, example: dict[str, Any], chances: Floats) -> None:
        best = int(np.argmax(chances))
        found, wanted = float(chances[best]), float(example["probability"])
        if self.labels[best] != example["label"] or not abs(found - wanted) <= PROBABILITY_TOLERANCE:
            raise ModelError(
                f"the self-test's {example['file']} was classified as {self.labels[best]} ({found:.2f}), the evaluation said "
                f"{example['label']} ({wanted:.2f}): deploy another model package"
            )


def load_model(folder: Path, threads: int = 1) -> ServedModel:
    """The model in ``folder``, in the form that the variable MODEL_FORM or model.json names. Raises ModelError."""
    return ServedModel(folder, threads, os.environ.get("MODEL_FORM", ""))
