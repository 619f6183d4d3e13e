"""fp32 or bf16, decided by the clock: bf16 convolutions can be far slower on small pictures or without AVX-512 BF16."""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def autocast(precision: str) -> AbstractContextManager[object]:
    """The context in which the forward pass runs."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _seconds(model: nn.Module, sample: Tensor, precision: str, steps: int, train: bool) -> float:
    """Seconds of ``steps`` passes after one that is not counted."""
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        with torch.set_grad_enabled(train), autocast(precision):
            output = model(sample)
        if train:
            output.float().square().mean().backward()
    return time.perf_counter() - started


def faster_precision(model: nn.Module, sample: Tensor, *, train: bool = False) -> str:
    """``fp32`` or ``bf16``: whichever does a few steps sooner on a copy of the model; bf16 must win by a tenth."""
    trial = copy.deepcopy(model).train(train)
    fp32 = _seconds(trial, sample, "fp32", 2, train)
    bf16 = _seconds(trial, sample, "bf16", 2, train)
    return "bf16" if bf16 < 0.9 * fp32 else "fp32"
