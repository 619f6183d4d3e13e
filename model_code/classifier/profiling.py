"""The profile of a training: what writes it, under one name, and what reads it. Its layout is in ``profile_layout``."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from classifier.profile_layout import PHASES, node_id, read_overhead, worker_id, write_overhead
from classifier.step_timeline import StepTimeline
from classifier.system_metrics import INTERVAL_S, SystemSampler
from classifier.uploader import Uploader

__all__ = [
    "INTERVAL_S",
    "PHASES",
    "StepTimeline",
    "SystemSampler",
    "Uploader",
    "cpu_series",
    "node_id",
    "read_kernels",
    "read_operators",
    "read_overhead",
    "read_steps",
    "read_system",
    "read_window_steps",
    "series",
    "worker_id",
    "write_overhead",
]


def read_system(root: Path) -> list[dict[str, Any]]:
    """All system events, by time; see system_metrics.py for their types, names and dimensions. Broken lines are left out."""
    return sorted(_lines(root / "system", "*.json"), key=lambda event: event["Timestamp"])


def _lines(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob(pattern)):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def read_steps(root: Path) -> list[dict[str, Any]]:
    """``{"node", "rank", "phase", "start", "duration", "step"}`` of every recorded phase, in seconds, by time."""
    rows = []
    for path in sorted((root / "framework").rglob("*_pythontimeline.json")):
        events = json.loads(path.read_text(encoding="utf-8"))
        base = next(
            e["args"]["start_time_since_epoch_in_micros"] for e in events if "start_time_since_epoch_in_micros" in e.get("args", {})
        )
        rank, _, node = path.name.split("_")[1].partition("-")
        for e in events:
            if e["ph"] == "X":
                start, duration = (base + e["ts"]) / 1e6, e["dur"] / 1e6
                step = int(e["args"]["step_num"])
                rows.append(
                    {"node": node, "rank": int(rank), "phase": e["name"], "start": start, "duration": duration, "step": step}
                )
    return sorted(rows, key=lambda row: row["start"])


def read_operators(root: Path) -> list[dict[str, Any]]:
    """``{"node", "name", "calls", "cpu_ms", "device_ms", "share"}`` of the profiled window, by own time, largest first."""
    return [row for row in _lines(root / "framework" / "operators", "*.jsonl") if row.get("kind") == "operator"]


def read_kernels(root: Path) -> list[dict[str, Any]]:
    """The GPU's kernels in the profiled window, in the same form; none on a CPU."""
    return [row for row in _lines(root / "framework" / "operators", "*.jsonl") if row.get("kind") == "kernel"]


def read_window_steps(root: Path) -> set[int]:
    """Timeline numbers of the steps that ran under ``torch.profiler``, which slows them."""
    spans = [row["slowed_steps"] for row in _lines(root / "framework" / "operators", "*.jsonl") if "slowed_steps" in row]
    return {step for first, last in spans for step in range(first, last + 1)}


def series(events: list[dict[str, Any]], dimension: str, node: str | None = None) -> list[tuple[float, float]]:
    """``(time, mean over cores or GPUs)`` of a dimension or, where that is empty, a name such as ``MemoryUsedPercent``."""
    by_time: dict[float, list[float]] = defaultdict(list)
    for event in events:
        if dimension in (event["Dimension"], event["Name"]) and node in (None, event["NodeId"]):
            by_time[event["Timestamp"]].append(event["Value"])
    return [(moment, statistics.fmean(values)) for moment, values in sorted(by_time.items())]


def cpu_series(events: list[dict[str, Any]], kind: str = "cpu") -> list[tuple[float, float]]:
    """``(time, percent)`` of the CPU, the memory or the GPUs (kinds ``cpu``, ``memory``, ``gpu``), a mean over cores or GPUs."""
    return series(events, {"cpu": "CPUUtilization", "memory": "MemoryUsedPercent", "gpu": "GPUUtilization"}[kind])
