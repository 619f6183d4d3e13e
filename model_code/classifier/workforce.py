"""Work spread over the processors: chunks out, results in as they end, a bounded number under way."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from classifier.errors import DataError

T = TypeVar("T")

CHUNK = 32
CHUNK_BYTES = 32 * 2**20
"""What one process is given at a time: bounds its memory, and keeps the others busy at the end."""
AHEAD = 3
"""Chunks for each process, waiting or at work."""


class Workforce:
    """Runs functions in processes of its own, or at once in this one. To be used with ``with``."""

    def __init__(self, processes: int = 0, warm_up: Callable[[], object] = int) -> None:
        """``processes`` (0: work in this one) are forked at once; ``warm_up`` is what each does first.

        To be made before anything starts threads (numpy, Arrow, boto3): a forked child would wait in vain for locks that these
        hold. Being early, they import what they need while this process does, and are half a second ahead of spawned ones.
        """
        self._limit = processes * AHEAD
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            self._pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
            for _ in range(processes):
                self._pool.submit(warm_up)

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
    MANY = 200
    """With fewer pictures than this the last line would be the only one, and says nothing."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said > self.EVERY_S or (self._done == self._total and self._done >= self.MANY):
            self._said = now
            rate = self._done / max(now - self._started, 1e-3)
            print(f"progress pictures={self._done}/{self._total} pictures_per_s={rate:.0f}", flush=True)
