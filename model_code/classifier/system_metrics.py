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
"""

from __future__ import annotations

import json
import threading
import time
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

        psutil.cpu_times_percent(percpu=True)  # the next call tells what was since this one
        counters, started = _counters(psutil), time.monotonic()
        last = due = started
        while not self._stop.wait(max(0.0, (due := max(due + self._interval, time.monotonic())) - time.monotonic())):
            now, after = time.monotonic(), _counters(psutil)
            readings = [*_cpus(psutil), ("memory", "MemoryUsedPercent", "", psutil.virtual_memory().percent)]
            for (kind, name, dimension), value in after.items():
                # Counters start over when a device comes back: no rate below zero.
                rate = max(0.0, value - counters.get((kind, name, dimension), value)) / max(now - last, 1e-3)
                readings.append((kind, name, dimension, rate))
            readings += [("gpu", *reading) for reading in gpus.read()]
            counters, last = after, now
            if self._write(readings, now):
                self._report_cost(now - started)
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


def _cpus(psutil: Any) -> list[Reading]:
    """Use of every core since the last call."""
    found: list[Reading] = []
    for index, times in enumerate(psutil.cpu_times_percent(percpu=True)):
        waiting = getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted under user already
        found.append(("cpu", f"cpu{index}", "CPUUtilization", max(0.0, sum(times) - times.idle - waiting - guests)))
        found.append(("cpu", f"cpu{index}", "I/OWaitPercentage", waiting))
    return found


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
