"""How strange a picture is to the model: whether it may show none of the classes.

The energy score of Liu et al. (2020, arXiv:2010.03759), ``T * logsumexp(logits / T)``, is high for pictures like those the model
was trained on. Its scale differs from model to model, so it is told as a rank among the validation pictures.
"""

from __future__ import annotations

import numpy as np

from classifier.serving import Floats

STEPS = 101


def energy(logits: Floats, temperature: float) -> Floats:
    """``(N, C)`` logits to ``(N,)``, high for familiar pictures."""
    scaled = logits.astype(np.float64) / temperature
    top = scaled.max(axis=1, keepdims=True)
    return np.asarray(temperature * (top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1))), dtype=np.float32)


def quantiles(valid_logits: Floats, temperature: float) -> list[float]:
    """The energies that 0, 1, … 100 % of the validation pictures stay below: what ``model.json`` keeps."""
    found = np.quantile(energy(valid_logits, temperature), np.linspace(0, 1, STEPS))
    return [round(float(value), 5) for value in found]


def novelty(logits: Floats, temperature: float, known: list[float]) -> list[float]:
    """0 to 1 for each picture: the share of validation pictures that look more familiar than this one."""
    shares = np.interp(energy(logits, temperature), known, np.linspace(0, 1, len(known)))
    return [round(1.0 - float(share), 4) for share in shares]
