"""CPU, memory, disk, network and GPUs of a machine, twice a second, in the managed profiler's format.

Types, names and dimensions are those of the managed profiler's files:

| Type | Name | Dimension | Value |
|---|---|---|---|
| cpu | cpu0 … | CPUUtilization | percent of the time busy, waiting for disks left out |
| cpu | cpu0 … | I/OWaitPercentage | percent of the time idle with a disk request open |
| memory | MemoryUsedPercent | | percent |
| i/o | ReadThroughputInBytesPerSecond, WriteThroughputInBytesPerSecond, IOPS | | per second, all disks |
| network | ReceiveBytesPerSecond, TransmitBytesPerSecond | Algorithm | per second, all interfaces |
| gpu | gpu0 … | GPUUtilization, GPUMemoryUtilization | percent |
| process | JobCPUDemand | | percent of all cores that this job's threads ran on or waited for; over 100 when they want more |

The last is our own: it tells a job that is short of CPU from a machine that is busy with something else.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from classifier.gpu_metrics import Gpus
from classifier.profile_layout import hour, node_id, write_overhead

INTERVAL_S = 0.5
FILE_S = 60.0

Reading = tuple[str, str, str, float]
"""Type, name, dimension, value."""


class SystemSampler:
    """Samples the machine in a thread; use as a context manager, in one process of each machine.

    Rates are taken over the monotonic clock, so a wall clock that is set while it runs moves stamps only. A disk that is full
    ends the sampling with a note, not the training.
    """

    def __init__(self, root: Path, interval: float = INTERVAL_S) -> None:
        self._root, self._interval = root, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._file: BinaryIO | None = None
        self._opened = 0.0
        self._node = node_id()

    def __enter__(self) -> SystemSampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        gpus = Gpus()
        try:
            self._sample(gpus)
        except OSError as problem:
            print(f"note: system metrics end here ({type(problem).__name__}: {problem.strerror})", flush=True)
        finally:
            gpus.close()
            if self._file:
                self._file.close()

    def _sample(self, gpus: Gpus) -> None:
        import psutil

        cpus, demand, counters, started = _Cpus(psutil), _Demand(), _counters(psutil), time.monotonic()
        last, due = started, started + self._interval
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            now, after = time.monotonic(), _counters(psutil)
            readings = [*cpus.read(), *demand.read(), ("memory", "MemoryUsedPercent", "", psutil.virtual_memory().percent)]
            for (kind, name, dimension), value in after.items():
                # Counters start over when a device comes back: no rate below zero.
                rate = max(0.0, value - counters.get((kind, name, dimension), value)) / max(now - last, 1e-3)
                readings.append((kind, name, dimension, rate))
            readings += [("gpu", *reading) for reading in gpus.read()]
            counters, last = after, now
            if self._write(readings, now):
                self._report_cost(now - started)
            # After a sample that came late the next one waits: what a few milliseconds held is no rate.
            due = max(due + self._interval, time.monotonic() + self._interval / 2)
        self._report_cost(time.monotonic() - started)

    def _report_cost(self, elapsed: float) -> None:
        write_overhead(self._root, sampler_share=time.thread_time() / max(elapsed, 1e-9))

    def _write(self, readings: list[Reading], now: float) -> bool:
        """Append one sample; whether that began a new file."""
        stamp = time.time()
        begins = self._file is None or now - self._opened >= FILE_S
        if begins:
            if self._file:
                self._file.close()
            folder = self._root / "system" / "incremental" / hour(stamp)
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a sample is one write, so that a reader at any moment finds whole lines.
            self._file, self._opened = (folder / f"{int(stamp):010d}.{self._node}.json").open("ab", buffering=0), now
        if self._file:
            self._file.write("".join(self._line(reading, stamp) for reading in readings).encode())
        return begins

    def _line(self, reading: Reading, stamp: float) -> str:
        kind, name, dimension, value = reading
        event = {
            "Type": kind, "Name": name, "Dimension": dimension, "Value": round(value, 3), "NodeId": self._node, "Timestamp": stamp,
        }  # fmt: skip
        return json.dumps(event) + "\n"


class _Cpus:
    """Use of every core since the last reading. psutil's own percentages are wrong for intervals below a second: it divides by
    one second at least."""

    def __init__(self, psutil: Any) -> None:
        self._psutil, self._last = psutil, psutil.cpu_times(percpu=True)

    def read(self) -> list[Reading]:
        found: list[Reading] = []
        now = self._psutil.cpu_times(percpu=True)
        for index, (before, after) in enumerate(zip(self._last, now, strict=False)):
            # Time of guests is under user and nice already.
            spent = {name: max(0.0, getattr(after, name) - getattr(before, name)) for name in after._fields if "guest" not in name}
            whole, waiting = max(sum(spent.values()), 1e-9), spent.get("iowait", 0.0)
            busy = sum(spent.values()) - spent["idle"] - waiting
            found.append(("cpu", f"cpu{index}", "CPUUtilization", 100 * max(0.0, busy) / whole))
            found.append(("cpu", f"cpu{index}", "I/OWaitPercentage", 100 * waiting / whole))
        self._last = now
        return found


class _Demand:
    """Cores that this process's threads ran on or waited for, since the last reading, from Linux's scheduler statistics
    (https://docs.kernel.org/scheduler/sched-stats.html); nothing where there are none."""

    def __init__(self) -> None:
        self._before, self._at = self._threads(), time.monotonic()
        # The processes of one machine do the same work; this one speaks for all.
        self._share = 100 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / (os.cpu_count() or 1)

    @staticmethod
    def _threads() -> dict[str, int]:
        """Nanoseconds by thread."""
        found = {}
        for path in Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                running, waiting, _ = path.read_text(encoding="ascii").split()
                found[path.parent.name] = int(running) + int(waiting)
        return found

    def read(self) -> list[Reading]:
        threads, now = self._threads(), time.monotonic()
        wanted_s = sum(spent - self._before.get(thread, 0) for thread, spent in threads.items()) / 1e9
        cores = wanted_s / max(now - self._at, 1e-3)
        self._before, self._at = threads, now
        return [("process", "JobCPUDemand", "", self._share * cores)] if threads else []


def _counters(psutil: Any) -> dict[tuple[str, str, str], float]:
    """Counts since the machine started, whose differences are the rates."""
    found: dict[tuple[str, str, str], float] = {}
    if disk := psutil.disk_io_counters():
        found["i/o", "ReadThroughputInBytesPerSecond", ""] = float(disk.read_bytes)
        found["i/o", "WriteThroughputInBytesPerSecond", ""] = float(disk.write_bytes)
        found["i/o", "IOPS", ""] = float(disk.read_count + disk.write_count)
    if network := psutil.net_io_counters():
        found["network", "ReceiveBytesPerSecond", "Algorithm"] = float(network.bytes_recv)
        found["network", "TransmitBytesPerSecond", "Algorithm"] = float(network.bytes_sent)
    return found
