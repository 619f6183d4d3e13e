"""System metrics and step phases in the layout of SageMaker's profiler.

Layout under the root: ``system/incremental/YYYYMMDDHH/<10-digit s>.algo-N.json`` (JSON lines) and
``framework/pevents/YYYYMMDDHH/<µs>_<node>_pythontimeline.json`` (Chrome trace). Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from classifier import storage

INTERVAL_S = 0.5
FILE_S = 60
PHASES = ("DataLoading", "Forward", "Backward", "Optimizer")


def node_id() -> str:
    """``algo-1`` …, as SageMaker names hosts; elsewhere ``algo-1``."""
    host = os.environ.get("SM_CURRENT_HOST", "algo-1")
    return host if host.startswith("algo-") else "algo-1"


def _hour(seconds: float) -> str:
    return time.strftime("%Y%m%d%H", time.gmtime(seconds))


class SystemSampler:
    """Samples CPU, memory, disk and network twice a second in a thread; use as a context manager."""

    def __init__(self, root: Path, interval: float = INTERVAL_S) -> None:
        self._root, self._interval = root / "system" / "incremental", interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._file: IO[str] | None = None
        self._opened = 0.0
        self._node = node_id()

    def __enter__(self) -> SystemSampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        import psutil

        psutil.cpu_percent(percpu=True)
        before, last = self._counters(psutil), time.time()
        while not self._stop.wait(self._interval):
            now = time.time()
            after = self._counters(psutil)
            lines = [self._event("cpu", f"cpu{i}", "CPUUtilization", v, now) for i, v in enumerate(psutil.cpu_percent(percpu=True))]
            lines.append(self._event("memory", "MemoryUsedPercent", "MemoryUsedPercent", psutil.virtual_memory().percent, now))
            for (kind, name, dimension), value in after.items():
                pace = max(0.0, value - before.get((kind, name, dimension), value)) / max(now - last, 1e-3)
                lines.append(self._event(kind, name, dimension, pace, now))
            before, last = after, now
            self._write(lines, now)
        if self._file:
            self._file.close()

    @staticmethod
    def _counters(psutil: Any) -> dict[tuple[str, str, str], float]:
        found: dict[tuple[str, str, str], float] = {}
        if disk := psutil.disk_io_counters():
            found["disk", "disk", "ReadThroughputInBytesPerSecond"] = float(disk.read_bytes)
            found["disk", "disk", "WriteThroughputInBytesPerSecond"] = float(disk.write_bytes)
        if network := psutil.net_io_counters():
            found["network", "network", "ReceiveBytesPerSecond"] = float(network.bytes_recv)
            found["network", "network", "TransmitBytesPerSecond"] = float(network.bytes_sent)
        return found

    def _event(self, kind: str, name: str, dimension: str, value: float, now: float) -> str:
        event = {
            "Type": kind,
            "Name": name,
            "Dimension": dimension,
            "Value": round(value, 3),
            "NodeId": self._node,
            "Timestamp": now,
        }
        return json.dumps(event)

    def _write(self, lines: list[str], now: float) -> None:
        if self._file is None or now - self._opened >= FILE_S:
            if self._file:
                self._file.close()
            folder = self._root / _hour(now)
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self._opened = (folder / f"{int(now):010d}.{self._node}.json").open("a", encoding="utf-8"), now
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()


class StepTimeline:
    """Phases of every training step as Chrome-trace events; ``mark`` ends a phase that began at the previous mark."""

    FLUSH_EVENTS = 2000

    def __init__(self, root: Path) -> None:
        self._root = root / "framework" / "pevents"
        self._node = node_id()
        self._events: list[tuple[str, int, int, int]] = []
        self._last, self._step, self._train = time.time_ns() // 1000, 0, False

    def mode(self, name: str) -> None:
        """Phases are recorded in train mode only."""
        self._train, self._last = name == "train", time.time_ns() // 1000

    def mark(self, phase: str) -> None:
        """The phase ``phase`` of the current step ends now."""
        now = time.time_ns() // 1000
        if self._train:
            self._events.append((phase, self._last, now, self._step))
            self._step += phase == PHASES[-1]
        self._last = now
        if len(self._events) >= self.FLUSH_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write what was recorded since the last flush as one file."""
        if not self._events:
            return
        start, end = self._events[0][1], self._events[-1][2]
        folder = self._root / _hour(end / 1e6)
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, Any]] = []
        for number, phase in enumerate(PHASES):
            lines.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": phase}})
            lines.append({"name": "process_sort_index", "ph": "M", "pid": number, "args": {"sort_index": number}})
        lines.insert(
            0, {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": PHASES[0], "start_time_since_epoch_in_micros": start}}
        )
        for phase, begin, finish, step in self._events:
            event = {"name": phase, "pid": PHASES.index(phase), "tid": 0, "ph": "X", "ts": begin - start, "dur": finish - begin}
            lines.append({**event, "args": {"step_num": str(step)}})
        temporary = folder / f".{end}.part"
        temporary.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n", encoding="utf-8")
        temporary.replace(folder / f"{end}_{self._node}_pythontimeline.json")
        self._events.clear()

    def close(self) -> None:
        """Write the rest."""
        self.flush()


class Uploader:
    """Copies new and grown files of local folders to S3 in a thread, and all that is left when it ends.

    A failed upload is reported once and does not stop the training.
    """

    def __init__(self, folders: dict[Path, str], every_s: float = 5.0) -> None:
        self._folders, self._every = folders, every_s
        self._sent: dict[Path, tuple[int, int]] = {}
        self._stop, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def __enter__(self) -> Uploader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        self.sync()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.sync()

    def sync(self) -> None:
        """Upload every file that changed since it was last sent."""
        for folder, uri in self._folders.items():
            for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
                if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                    self._send(path, f"{uri}/{path.relative_to(folder).as_posix()}")

    def _send(self, path: Path, uri: str) -> None:
        try:
            stat = path.stat()
            if self._sent.get(path) == (stat.st_size, stat.st_mtime_ns):
                return
            storage.upload(path, uri)
            self._sent[path] = (stat.st_size, stat.st_mtime_ns)
        except Exception as problem:
            if not self._warned and path.exists():  # smdebug renames temporary files while we look
                self._warned = True
                print(f"note: {uri} was not uploaded ({type(problem).__name__}: {problem})", flush=True)


def read_system(root: Path) -> list[dict[str, Any]]:
    """All system events, by time. A half-written last line is left out."""
    return sorted(_lines(root / "system"), key=lambda event: event["Timestamp"])


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob("*.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def read_steps(root: Path) -> list[dict[str, Any]]:
    """``{"phase", "start", "duration", "step"}`` of every recorded phase, in seconds, by time."""
    rows = []
    for path in sorted((root / "framework").rglob("*_pythontimeline.json")):
        events = json.loads(path.read_text(encoding="utf-8"))
        base = next(
            e["args"]["start_time_since_epoch_in_micros"] for e in events if "start_time_since_epoch_in_micros" in e.get("args", {})
        )
        for e in events:
            if e["ph"] == "X":
                start, duration = (base + e["ts"]) / 1e6, e["dur"] / 1e6
                rows.append({"phase": e["name"], "start": start, "duration": duration, "step": int(e["args"]["step_num"])})
    return sorted(rows, key=lambda row: row["start"])


def cpu_series(events: list[dict[str, Any]], kind: str = "cpu") -> list[tuple[float, float]]:
    """``(time, mean value)`` of a metric type over its names."""
    by_time: dict[float, list[float]] = defaultdict(list)
    for event in events:
        if event["Type"] == kind:
            by_time[event["Timestamp"]].append(event["Value"])
    return [(moment, statistics.fmean(values)) for moment, values in sorted(by_time.items())]


def write_overhead(root: Path, **shares: float) -> None:
    """Merge shares of training time, such as ``hook_share=0.01``, into ``overhead.json`` under ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    path, temporary = root / "overhead.json", root / ".overhead.json.part"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    temporary.write_text(json.dumps({**known, **shares}) + "\n", encoding="utf-8")
    temporary.replace(path)
