"""What a job does with a CPU and its memory before it computes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from classifier import precision
from classifier.cpus import keep_freed_memory
from model_fakes import MODEL_CODE
from torch import nn

ROUNDS, MEBIBYTES = 20, 64
ASKS_AND_FREES = f"""
import ctypes, resource, sys
from classifier.cpus import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for round in range(1 + {ROUNDS}):
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc({MEBIBYTES} << 20)
    ctypes.memset(place, 1, {MEBIBYTES} << 20)
    libc.free(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*arguments: str) -> int:
    command = [sys.executable, "-c", ASKS_AND_FREES, *arguments]
    return int(subprocess.run(command, cwd=MODEL_CODE, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's own setting")
def test_memory_that_is_asked_for_again_costs_no_page_faults():
    assert page_faults() > ROUNDS * 16, "the system gives it anew each time"  # with huge pages too: 32 of 2 MiB
    assert page_faults("keep") < ROUNDS


def test_without_that_setting_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    keep_freed_memory()


def test_bf16_is_not_even_tried_where_the_cpu_would_imitate_it(monkeypatch: pytest.MonkeyPatch):
    """One pass of a batch took ten seconds where fp32 takes one."""
    tried: list[str] = []

    def seconds(model: nn.Module, sample: torch.Tensor, kind: str, steps: int, train: bool) -> float:
        tried.append(kind)
        return {"fp32": 2.0, "bf16": 1.0}[kind]

    monkeypatch.setattr(precision, "_seconds", seconds)
    network, sample = nn.Linear(2, 2), torch.zeros(1, 2)
    monkeypatch.setattr(precision, "knows_bf16", lambda where: False)
    assert (precision.faster_precision(network, sample), tried) == ("fp32", [])
    monkeypatch.setattr(precision, "knows_bf16", lambda where: True)
    assert (precision.faster_precision(network, sample), tried) == ("bf16", ["fp32", "bf16"])
