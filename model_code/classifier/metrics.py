"""Accuracy, calibration and confusion, in numpy. N pictures, C classes; logits ``(N, C)``, labels ``(N,)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from classifier.serving import Floats, softmax

Ints = npt.NDArray[np.int64]


def top_k_accuracy(logits: Floats, labels: Ints, k: int) -> float:
    """Share of pictures whose class is among the ``k`` likeliest."""
    k = min(k, logits.shape[1])
    likeliest = np.argpartition(-logits, k - 1, axis=1)[:, :k] if k < logits.shape[1] else None
    return 1.0 if likeliest is None else float((likeliest == labels[:, None]).any(axis=1).mean())


def negative_log_likelihood(logits: Floats, labels: Ints, temperature: float = 1.0) -> float:
    """Mean cross-entropy in nats."""
    scaled = logits.astype(np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))
    return float((log_sum - scaled[np.arange(len(labels)), labels]).mean())


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Temperature in 0.05..20 with the least negative log likelihood (Guo et al., 2017), by golden section on its logarithm."""
    low, high, golden = np.log(0.05), np.log(20.0), (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if negative_log_likelihood(logits, labels, float(np.exp(left))) < negative_log_likelihood(
            logits, labels, float(np.exp(right))
        ):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def reliability(logits: Floats, labels: Ints, temperature: float = 1.0, bins: int = 15) -> list[dict[str, float]]:
    """Confidence bins with ``count``, mean ``confidence`` and ``accuracy``; empty bins are left out."""
    probabilities = softmax(logits, temperature)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "count": int((which == number).sum()),
            "confidence": float(confidence[which == number].mean()),
            "accuracy": float(right[which == number].mean()),
        }
        for number in range(bins)
        if (which == number).any()
    ]


def expected_calibration_error(logits: Floats, labels: Ints, temperature: float = 1.0) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins, weighted by count."""
    rows = reliability(logits, labels, temperature)
    return float(sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(labels))


def confusion(predicted: Ints, labels: Ints, num_classes: int) -> Ints:
    """``(C, C)`` counts; rows are true classes, columns predictions."""
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(table, (labels, predicted), 1)
    return table


def per_class(table: Ints, names: list[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every class from a confusion table; None where nothing was predicted or present."""
    rows = []
    for index, name in enumerate(names):
        hit, present, said = int(table[index, index]), int(table[index].sum()), int(table[:, index].sum())
        recall = hit / present if present else None
        precision = hit / said if said else None
        f1 = 2 * hit / (present + said) if present + said else None
        rows.append({"label": name, "num_pictures": present, "recall": recall, "precision": precision, "f1": f1})
    return rows
