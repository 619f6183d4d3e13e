"""Accuracy, calibration and confusion, in numpy. N pictures, C classes; logits ``(N, C)``, labels ``(N,)``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from classifier.serving import Floats, softmax

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ROWS = 8192
"""Pictures that are worked on at once, so that the logits are the only thing of size N x C in memory."""
RESAMPLES = 10_000
LEVEL = 0.95


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, count, ROWS))


def in_top_k(logits: Floats, labels: Ints, k: int) -> Bools:
    """``(N,)``: whether a picture's class is among its ``k`` likeliest; k=1 agrees with ``argmax``."""
    if k >= logits.shape[1]:
        return np.ones(len(labels), dtype=np.bool_)
    if k == 1:
        return np.asarray(logits.argmax(axis=1) == labels)
    right = np.empty(len(labels), dtype=np.bool_)
    for rows in _chunks(len(labels)):
        right[rows] = (np.argpartition(-logits[rows], k - 1, axis=1)[:, :k] == labels[rows, None]).any(axis=1)
    return right


def top_k_accuracy(logits: Floats, labels: Ints, k: int) -> float:
    """Share of pictures whose class is among the ``k`` likeliest."""
    return float(in_top_k(logits, labels, k).mean())


def bootstrap_interval(right: Bools, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """``(low, high)`` of the share of True in ``right (N,)``: percentile bootstrap (Efron, 1979), the same on every call.

    The number of hits among N pictures drawn with replacement is binomial, so it is drawn as one number a resample: 10,000
    resamples of 100,000 pictures take milliseconds and no memory. Where all or none are right there is nothing to resample,
    and a bootstrap would claim certainty: the open side is then Clopper and Pearson's (0.03 wide at N = 120). Raises ValueError
    without pictures.
    """
    if not len(right):
        raise ValueError("an interval needs at least one picture, got none")
    count, share, tail = len(right), float(right.mean()), (1 - level) / 2
    width = tail ** (1 / count)
    if share in (0.0, 1.0):
        return (width, 1.0) if share else (0.0, 1.0 - width)
    drawn = np.random.default_rng(seed).binomial(count, share, resamples) / count
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return float(low), float(high)


def negative_log_likelihood(logits: Floats, labels: Ints, temperature: float = 1.0) -> float:
    """Mean cross-entropy in nats."""
    total = 0.0
    for rows in _chunks(len(labels)):
        scaled, chosen = logits[rows].astype(np.float64) / temperature, labels[rows]
        top = scaled.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))
        total += float((log_sum - scaled[np.arange(len(chosen)), chosen]).sum())
    return total / len(labels)


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


def confidences(logits: Floats, temperature: float = 1.0) -> Floats:
    """``(N,)``: the probability of each picture's likeliest class."""
    return np.concatenate([softmax(logits[rows], temperature).max(axis=1) for rows in _chunks(len(logits))])


def reliability(logits: Floats, labels: Ints, temperature: float = 1.0, bins: int = 15) -> list[dict[str, float]]:
    """Confidence bins with ``count``, mean ``confidence`` and ``accuracy``; empty bins are left out."""
    confidence, right = confidences(logits, temperature), in_top_k(logits, labels, 1)
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


def macro(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Unweighted means of ``per_class`` over the classes that have pictures; one that was never predicted has precision 0."""
    present = [row for row in rows if row["num_pictures"]]
    means = {name: float(np.mean([row[name] or 0.0 for row in present])) for name in ("precision", "recall", "f1")}
    return {**means, "num_classes": len(present)}


def confused_pairs(table: Ints, limit: int) -> list[tuple[int, int, int, float]]:
    """The most confused ``(true, predicted, count, share of the true class)``, by count, then share, then index."""
    errors = table - np.diag(np.diag(table))
    true, predicted = np.nonzero(errors)
    counts = errors[true, predicted]
    shares = counts / table.sum(axis=1)[true]
    order = np.lexsort((predicted, true, -shares, -counts))[:limit]
    return [(int(true[i]), int(predicted[i]), int(counts[i]), float(shares[i])) for i in order]
