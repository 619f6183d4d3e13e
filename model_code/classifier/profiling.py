"""System metrics and step phases in the layout of SageMaker's profiler, and the rules that read them.

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


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    pick = {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    return {**pick, "min": ordered[0], "max": ordered[-1], "mean": statistics.fmean(ordered)}


def analyse(root: Path, job_started: float | None = None, batch_size: int | None = None) -> dict[str, dict[str, Any]]:
    """The managed report's parts that apply: ``{"CPUBottleneck": {"RuleTriggered", "Detail", …}, …}``."""
    system, steps = read_system(root), read_steps(root)
    durations: dict[int, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    for row in steps:
        durations[row["step"]] += row["duration"]
        phases[row["phase"]] += row["duration"]
    window = (steps[0]["start"], steps[-1]["start"] + steps[-1]["duration"]) if steps else (0.0, 0.0)
    busy = [value for moment, value in cpu_series(system) if window[0] <= moment <= window[1]]
    memory = [value for _, value in cpu_series(system, "memory")]
    total = sum(phases.values()) or 1.0
    loading = phases.get("DataLoading", 0.0) / total
    times = list(durations.values())
    usage = _quantiles(busy)
    return {
        "OverallSystemUsage": _part(
            False, f"CPU {usage['mean']:.0f} % on average while stepping", cpu=usage, memory=_quantiles(memory)
        ),
        "OverallFrameworkMetrics": _part(
            False,
            ", ".join(f"{name} {phases[name] / total:.0%}" for name in PHASES if name in phases) or "no steps",
            seconds=dict(phases),
        ),
        "CPUBottleneck": _part(
            loading > 0.3 and usage["mean"] > 90,
            f"data loading takes {loading:.0%} of the steps, CPU at {usage['mean']:.0f} %",
            "more CPUs, a smaller picture_size, or num_workers",
        ),
        "IOBottleneck": _part(
            loading > 0.3 and usage["mean"] < 50,
            f"data loading takes {loading:.0%} of the steps, CPU at {usage['mean']:.0f} %",
            "keep the data set in memory or on a faster volume",
        ),
        "Dataloader": _part(
            loading > 0.5, f"data loading takes {loading:.0%} of the steps", "more num_workers, lighter augmentation"
        ),
        "BatchSize": _part(False, f"batch size {batch_size}; no GPU whose use could judge it", batch_size=batch_size),
        "GPUMemoryIncrease": _part(False, "no GPU in this job"),
        "LowGPUUtilization": _part(False, "no GPU in this job"),
        "LoadBalancing": _part(False, "one worker; nothing to balance"),
        "MaxInitializationTime": _initialisation(job_started, window[0]),
        "StepOutlier": _outliers(times),
    }


def _part(fired: bool, detail: str, remedy: str = "", **values: Any) -> dict[str, Any]:
    return {
        "RuleTriggered": int(fired),
        "Violations": int(fired),
        "Detail": detail,
        "Remedy": remedy if fired else "",
        "Details": values,
    }


def _initialisation(started: float | None, first_step: float) -> dict[str, Any]:
    if not started or not first_step:
        return _part(False, "the start of the job is not known")
    seconds = first_step - started
    return _part(
        seconds > 20 * 60,
        f"{seconds:.0f} s from the start of the script to the first step",
        "a smaller image or data set",
        seconds=seconds,
    )


def _outliers(times: list[float]) -> dict[str, Any]:
    if len(times) < 8:
        return _part(False, f"{len(times)} steps are too few to judge")
    mean, deviation = statistics.fmean(times), statistics.pstdev(times)
    late = [value for value in times if value > mean + 3 * deviation]
    quantiles = {key: value * 1000 for key, value in _quantiles(times).items()}
    fired = len(late) > 0.05 * len(times)
    return _part(
        fired,
        f"{len(late)} of {len(times)} steps took over 3 standard deviations more than {mean * 1000:.0f} ms",
        "look for other load",
        step_ms=quantiles,
    )
