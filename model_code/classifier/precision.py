"""fp32 or bf16, and how many threads, decided by the clock.

bf16 convolutions can be far slower on small pictures or without AVX-512 BF16; and when other processes share the CPUs, threads
that wait for each other are many times slower than one thread alone (50 times was seen with two trials on two CPUs).
"""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def autocast(precision: str, device: str = "cpu") -> AbstractContextManager[object]:
    """The context in which the forward pass runs; ``device`` is a type such as ``cuda``."""
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, kind, enabled=precision != "fp32")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


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


def knows_bf16(where: torch.device) -> bool:
    """Whether the device computes in bf16 itself. A CPU without AVX-512 imitates it, ten times slower than fp32 and more."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def faster_precision(model: nn.Module, sample: Tensor, *, train: bool = False) -> str:
    """``fp32`` or ``bf16``: whichever does a few steps sooner on a copy of the model; bf16 must win by a tenth.

    Timed only where there is something to find out: on a CPU that knows bf16. A GPU that knows it is faster with it.
    """
    if not knows_bf16(device_of(model)):
        return "fp32"
    if device_of(model).type == "cuda":
        return "bf16"
    trial = copy.deepcopy(model).train(train)
    fp32 = _seconds(trial, sample, "fp32", 2, train)
    bf16 = _seconds(trial, sample, "bf16", 2, train)
    return "bf16" if bf16 < 0.9 * fp32 else "fp32"


def faster_threads(model: nn.Module, sample: Tensor, precision: str, *, train: bool = False) -> int:
    """1 or the present number of threads, whichever does a step sooner; leaves torch set to it."""
    many = torch.get_num_threads()
    if many == 1:
        return 1
    trial = copy.deepcopy(model).train(train)
    torch.set_num_threads(1)
    alone = _seconds(trial, sample, precision, 2, train)
    torch.set_num_threads(many)
    together = _seconds(trial, sample, precision, 2, train)
    if alone < together:
        torch.set_num_threads(1)
    return torch.get_num_threads()
