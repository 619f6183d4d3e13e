"""When each phase of each training step began and ended.

On a GPU the host only queues work: a host clock would put the whole step into whichever phase waits for the device. There the
marks are CUDA events, which the device stamps in its own order without making anybody wait; they are read when a file is written.
``DataLoading`` is then the time in which the device had no work for want of a batch, and the copy of the batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier.files import replace_text
from classifier.profile_layout import PHASES, hour, worker_id, write_overhead

if TYPE_CHECKING:
    from torch import Tensor

    from classifier.engine import Position, Result, Trainer

_BEGIN = ""
"""The mark that a stretch of training begins with; its wall time in ns stands where others have their step."""


class StepTimeline:
    """Phases of every training step as Chrome-trace events; ``mark`` ends a phase that began at the previous mark.

    Implements ``engine.Observer``. In the loop a mark costs a clock reading and a tuple (under a microsecond); files are written
    every ``FLUSH_MARKS`` marks and when ``flush`` is called. Durations come from a monotonic clock; the wall clock is read once
    for every stretch of training.
    """

    FLUSH_MARKS = 2000

    def __init__(self, root: Path, *, on_gpu: bool = False) -> None:
        self._root, self._on_gpu, self._worker = root, on_gpu, worker_id()
        self._marks: list[tuple[str, int, Any]] = []
        self._at_ns, self._before, self._step, self._train = 0, None, 0, False
        self._began_ns = self._trained_ns = self._cost_ns = 0

    def watch(self, trainer: Trainer, position: Position) -> None:
        """Steps of a resumed run go on counting where it goes on."""
        self._step = position.epoch * trainer.steps_per_epoch + position.step

    def mode(self, name: str) -> None:
        """Phases are recorded in train mode only."""
        now = time.perf_counter_ns()
        self._count_training(now)
        self._train = name == "train"
        if self._train:
            self._began_ns = now
            self._marks.append((_BEGIN, time.time_ns(), self._idle_clock()))

    def stepped(self, sums: Tensor) -> None:
        """Nothing: the last mark of the step said so."""

    def evaluated(self, train: Result, valid: Result) -> None:
        """Nothing."""

    def mark(self, phase: str) -> None:
        """The phase ``phase`` of the current step ends now."""
        if not self._train:
            return
        now = time.perf_counter_ns()
        self._marks.append((phase, self._step, self._event() if self._on_gpu else now))
        self._step += phase == PHASES[-1]
        if len(self._marks) >= self.FLUSH_MARKS:
            self._write()
        self._cost_ns += time.perf_counter_ns() - now

    def flush(self) -> None:
        """Write what was recorded since the last flush as one file. On a GPU, wait until it has come to the last mark."""
        before = time.perf_counter_ns()
        self._write()
        self._cost_ns += time.perf_counter_ns() - before

    def _write(self) -> None:
        rows = list(self._rows())
        self._marks.clear()
        if not rows:
            return
        start_us, end_us = rows[0][2] // 1000, (rows[-1][2] + rows[-1][3]) // 1000
        head = [_process(number, phase, start_us) for number, phase in enumerate(PHASES)]
        body = [_event(phase, step, at // 1000 - start_us, length // 1000) for phase, step, at, length in rows]
        path = self._root / "framework" / "pevents" / hour(end_us / 1e6) / f"{end_us}_{self._worker}_pythontimeline.json"
        replace_text(path, "[\n" + ",\n".join(head + body) + "\n]\n")

    def close(self) -> None:
        """Write the rest, and what the marks cost."""
        self._count_training(time.perf_counter_ns())
        self._train = False
        self.flush()
        if self._trained_ns and os.environ.get("LOCAL_RANK", "0") == "0":
            write_overhead(self._root, phases_share=self._cost_ns / self._trained_ns)

    def _count_training(self, now: int) -> None:
        if self._train:
            self._trained_ns += now - self._began_ns

    def _rows(self) -> Iterator[tuple[str, int, int, int]]:
        """Phase, step, start and duration in ns. A stretch goes on over flushes."""
        if self._on_gpu and self._marks:
            self._marks[-1][2].synchronize()
        for phase, step, mark in self._marks:
            if phase == _BEGIN:
                self._at_ns = step
            else:
                length = self._between(self._before, mark)
                yield phase, step, self._at_ns, length
                self._at_ns += length
            self._before = mark

    def _between(self, first: Any, second: Any) -> int:
        return int(first.elapsed_time(second) * 1e6) if self._on_gpu else int(second - first)

    def _idle_clock(self) -> Any:
        """A mark at which host and device agree on the time; waits for the device, once for every stretch of training."""
        if not self._on_gpu:
            return time.perf_counter_ns()
        import torch

        torch.cuda.synchronize()
        return self._event()

    @staticmethod
    def _event() -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _process(number: int, phase: str, start_us: int) -> str:
    start = f', "start_time_since_epoch_in_micros": {start_us}' if number == 0 else ""
    name = f'{{"name": "process_name", "ph": "M", "pid": {number}, "args": {{"name": "{phase}"{start}}}}}'
    return f'{name},\n{{"name": "process_sort_index", "ph": "M", "pid": {number}, "args": {{"sort_index": {number}}}}}'


def _event(phase: str, step: int, start_us: int, length_us: int) -> str:
    """One line; a format string takes a quarter of json.dumps's time, and all its values are numbers and our own names."""
    return (
        f'{{"name": "{phase}", "pid": {PHASES.index(phase)}, "tid": 0, "ph": "X", "ts": {start_us}, "dur": {length_us}, '
        f'"args": {{"step_num": "{step}"}}}}'
    )
