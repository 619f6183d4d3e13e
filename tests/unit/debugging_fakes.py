"""Trainings that the hook watches, with networks small enough to do wrong what real ones do wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from classifier import profiling, training
from classifier.config import TrainingConfig
from classifier.debugging import HookObserver
from classifier.findings import Finding
from classifier.rules import training_findings
from torch import nn


def small(hidden: int = 8) -> nn.Sequential:
    """Two convolutions with ReLUs and a linear layer, for pictures of 32 px and 3 classes."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, hidden, 3, stride=2), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, stride=2), nn.ReLU6()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, 3))


def watched(
    settings: TrainingConfig,
    folder: Path,
    network: nn.Module | None = None,
    change: Callable[[training.Setup], None] | None = None,
    **fit: Any,
) -> tuple[training.Setup, list[dict[str, Any]]]:
    """A training on the channels of the environment, watched: tensors in ``folder``/tensors, profile in ``folder``/profiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # smdebug is unmaintained and says so in many ways
        setup = training.prepare_run(settings)
        if network is not None:
            setup.network = network
        if change:
            change(setup)
        timeline = profiling.StepTimeline(folder / "profiler")
        with HookObserver(folder / "tensors", setup.config, timeline, folder / "profiler") as observer:
            return setup, training.fit(setup, observer=observer, say=lambda _: None, **fit)


def judged(folder: Path, history: list[dict[str, Any]], class_counts: list[int]) -> dict[str, Finding]:
    """Every rule's finding on the tensors under ``folder``, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, notes = training_findings(folder / "tensors", history, class_counts)
    assert notes == []
    return {finding.rule: finding for finding in found}


def fired(found: dict[str, Finding]) -> set[str]:
    """Names of the rules that fired."""
    return {name for name, finding in found.items() if finding.triggered}
