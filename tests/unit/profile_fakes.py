"""Small real trainings with the profile's watchers around them, and a driver library for GPUs that are not there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from classifier import engine, profiling
from classifier.batches import Batch
from classifier.observers import Observers
from classifier.operator_window import OperatorWindow
from classifier.serving import Preprocessing
from model_fakes import config
from torch import Tensor, nn

INTERVAL_S = 0.02


class Loader:
    """Batches of noise; ``before`` runs before each of them is handed out."""

    num_examples = 0

    def __init__(self, steps: int, before: Callable[[int], object] = lambda step: None) -> None:
        self.steps, self.before = steps, before
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, 3, (16,), generator=generator)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.steps):
            self.before(step)
            yield Batch(self.inputs, self.labels, len(self.labels))


class Network(nn.Sequential):
    """A step of some milliseconds; ``inside`` runs in each forward pass."""

    def __init__(self, inside: Callable[[], object] = lambda: None) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip
        self.inside = inside

    def forward(self, inputs: Tensor) -> Tensor:
        self.inside()
        return super().forward(inputs)


def train(root: Path, loader: Loader, network: Network | None = None, *, window: int = 0, epochs: int = 1) -> nn.Module:
    """A training by the project's own loop, watched as ``train_model.py`` watches it, the hook aside; samples every 20 ms."""
    network = network or Network()
    trainer = engine.Trainer(
        network, config(epochs=epochs), Preprocessing(32, 32), "fp32", nn.CrossEntropyLoss(), 3, loader.steps
    )  # fmt: skip
    with profiling.SystemSampler(root, interval=INTERVAL_S):
        operators, timeline = OperatorWindow(root, window), profiling.StepTimeline(root)
        observer = Observers(operators, timeline)
        observer.watch(trainer, engine.Position())
        for epoch in range(epochs):
            engine.train_one_epoch(
                trainer, loader, engine.Position(epoch), observer=observer, after_step=lambda: None, say=lambda line: None
            )  # fmt: skip
            observer.mode("eval")
        operators.close()
        timeline.close()
    return network


class NvmlError(Exception):
    """Stands for ``pynvml.NVMLError``."""


GpuUse = Callable[[float], tuple[float, float]]
"""Percent of use and of memory at a time in s."""
LOOK_S = 0.01


def fake_nvml(monkeypatch: pytest.MonkeyPatch, *gpus: GpuUse | None) -> Counter[int]:
    """A ``pynvml`` with NVML's functions and units (percent as whole numbers, bytes); None is a GPU that tells nothing.

    Returns how often each GPU's use was asked for. Its time goes on by ``LOOK_S`` at every look, so that a machine that stalls
    sees the same course of events as a quick one.
    """
    module, total, looks = ModuleType("pynvml"), 16 * 2**30, Counter[int]()

    def told(handle: int) -> tuple[float, float]:
        use = gpus[handle]
        if use is None:
            raise NvmlError("Not Supported")
        return use(looks[handle] * LOOK_S)

    def rates(handle: int) -> SimpleNamespace:
        looks[handle] += 1
        return SimpleNamespace(gpu=int(told(handle)[0]), memory=0)

    functions = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(gpus),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": rates,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=int(total * told(handle)[1] / 100), total=total),
    }
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return looks
