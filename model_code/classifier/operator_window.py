"""A few steps under ``torch.profiler``: which operators, and on a GPU which kernels, take the time.

https://docs.pytorch.org/docs/stable/profiler.html
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import profiler

from classifier.files import replace_text
from classifier.profile_layout import PHASES, node_id, worker_id

if TYPE_CHECKING:
    from torch import Tensor

    from classifier.engine import Position, Result, Trainer

FIRST_STEP = 10
"""Steps before the window: allocators, autotuning and caches have settled."""
TOP_OPERATORS = 40
MAX_TRACE_BYTES = 10 * 2**20


class OperatorWindow:
    """Profiles ``steps`` training steps after the first ten and leaves a table of operators and a Chrome trace.

    Implements ``engine.Observer``; 0 steps switch it off. The profiler looks on: weights come out the same. It runs in the
    window only, which is one step longer, because the first step under a profiler is slow and not counted. Should the epoch
    end inside the window, the window ends there with the steps it has, or begins again in the next epoch when it has none.
    Place it before the step timeline, so that its work falls into the window's own steps, which ``read_window_steps`` names.
    """

    def __init__(self, root: Path, steps: int, *, on_gpu: bool = False) -> None:
        self._folder, self._steps, self._on_gpu = root / "framework" / "operators", steps, on_gpu
        self._done = steps == 0
        self._step, self._began, self._train = 0, 0, False
        self._profiler: Any = None

    def watch(self, trainer: Trainer, position: Position) -> None:
        """Nothing: the profiler needs no hook."""

    def mode(self, name: str) -> None:
        """Evaluation is not profiled."""
        self._train = name == "train"
        if not self._train:
            self._leave()

    def mark(self, phase: str) -> None:
        """Count steps; begin and end the window between two of them."""
        if self._done or not self._train or phase != PHASES[-1]:
            return
        self._step += 1
        if self._profiler is None and self._step >= FIRST_STEP:
            self._enter()
        elif self._profiler is not None:
            self._profiler.step()
            if self._step - self._began > self._steps:
                self._leave()

    def stepped(self, sums: Tensor) -> None:
        """Nothing: the last mark of a step said so."""

    def evaluated(self, train: Result, valid: Result) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write what was profiled when training ends inside the window."""
        self._leave()

    def _enter(self) -> None:
        activities = [profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # on a CPU it would report the missing GPU as an error
        # One active step more than wanted: the profiler is stopped by hand, inside its recording.
        schedule = profiler.schedule(wait=0, warmup=1, active=self._steps + 1, repeat=1)
        self._profiler = profiler.profile(activities=activities, schedule=schedule)
        self._profiler.start()
        self._began = self._step

    def _leave(self) -> None:
        if self._profiler is None:
            return
        recorded = self._step - self._began - 1
        self._profiler.stop()
        if recorded > 0:
            self._save(self._profiler, recorded)
            self._done = True
        self._profiler = None

    def _save(self, recording: Any, recorded: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"{worker_id()}_trace.gz"
        recording.export_chrome_trace(str(trace))
        shorten_trace(trace, MAX_TRACE_BYTES)
        head = {
            "steps": recorded,
            # Timeline numbers of all steps that the profiler slowed: the one at whose end it began, and its warm-up, too.
            "slowed_steps": [self._began - 1, self._step - 1],
            "trace": trace.name,
            "trace_bytes": trace.stat().st_size,
        }
        rows = operator_table(recording.key_averages())
        replace_text(self._folder / f"{worker_id()}_operators.jsonl", "".join(json.dumps(row) + "\n" for row in [head, *rows]))


def operator_table(averages: Any) -> list[dict[str, Any]]:
    """Operators, then kernels, each by its own time (what it calls left out), as sums over the window in ms.

    ``share`` is of all operators' time where the work is done: on the device where there is one. A kernel's time is its
    operator's device time too: the two kinds are shares of the same whole and are not to be added.
    """
    found: dict[str, list[dict[str, Any]]] = {"operator": [], "kernel": []}
    for average in averages:
        if average.key.startswith("ProfilerStep"):
            continue
        kind = "operator" if average.device_type.name == "CPU" else "kernel"
        row = {"name": average.key, "calls": average.count, "cpu_ms": average.self_cpu_time_total / 1000}
        found[kind].append({"kind": kind, "node": node_id(), **row, "device_ms": average.self_device_time_total / 1000})
    clock = "device_ms" if any(row["device_ms"] > 0 for rows in found.values() for row in rows) else "cpu_ms"
    table: list[dict[str, Any]] = []
    for rows in found.values():
        whole = sum(row[clock] for row in rows) or 1.0
        rows.sort(key=lambda row: -row[clock])
        table += [{**row, "share": row[clock] / whole} for row in rows[:TOP_OPERATORS]]
    return table


def shorten_trace(path: Path, limit_bytes: int) -> None:
    """Where the trace is larger, keep its longest events only."""
    while (size := path.stat().st_size) > limit_bytes:
        with gzip.open(path, "rt", encoding="utf-8") as stored:
            trace = json.load(stored)
        timed = sorted((event for event in trace["traceEvents"] if event.get("ph") == "X"), key=lambda event: -event.get("dur", 0))
        kept = timed[: int(0.8 * len(timed) * limit_bytes / size)]
        trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("ph") == "M"] + kept
        with gzip.open(path, "wt", encoding="utf-8") as stored:
            json.dump(trace, stored)
