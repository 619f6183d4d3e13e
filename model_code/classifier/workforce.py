"""Work spread over the processors: chunks out, results in as they end, a bounded number under way."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from classifier.dataset import cpu_count
from classifier.errors import DataError

T = TypeVar("T")

SMALL = 200
"""With fewer pictures than this, starting processes (about a second) takes longer than the work."""
CHUNK = 32
CHUNK_BYTES = 32 * 2**20
"""What one process is given at a time: bounds its memory, and keeps the others busy at the end."""
AHEAD = 3
"""Chunks for each process, waiting or at work."""


class Workforce:
    """Runs functions in one process for each CPU that this job may use, or at once in this one. To be used with ``with``."""

    def __init__(self, warm_up: Callable[[], object]) -> None:
        """``warm_up`` is what every process does first."""
        self._warm_up = warm_up
        self._pool: ProcessPoolExecutor | None = None
        self._limit = 0

    def expect(self, pictures: int) -> None:
        """Start the processes once so many pictures are known of; they get ready while the rest is listed."""
        if self._pool is not None or pictures < SMALL:
            return
        processes = cpu_count()
        # Spawned, not forked: threads of Arrow or boto3 may hold locks that a forked child would wait for in vain.
        self._pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
        self._limit = processes * AHEAD
        for _ in range(processes):
            self._pool.submit(self._warm_up)

    def __enter__(self) -> Workforce:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, calls: Iterable[tuple[Callable[..., T], tuple[Any, ...]]]) -> Iterator[T]:
        """Results in the order in which they end. Raises DataError when the system kills a process."""
        if self._pool is None:
            yield from (function(*arguments) for function, arguments in calls)
            return
        under_way: set[Future[T]] = set()
        try:
            for function, arguments in calls:
                under_way.add(self._pool.submit(function, *arguments))
                if len(under_way) >= self._limit:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while under_way:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, most likely for want of memory: choose an instance with more memory for a CPU"
            ) from None


class Rate:
    """Says how far the work is, every two seconds."""

    EVERY_S = 2.0

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said > self.EVERY_S or (self._done == self._total and self._done >= SMALL):
            self._said = now
            rate = self._done / max(now - self._started, 1e-3)
            print(f"progress pictures={self._done}/{self._total} pictures_per_s={rate:.0f}", flush=True)
