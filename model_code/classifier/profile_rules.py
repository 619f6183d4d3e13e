"""The managed profiler's rules, on system metrics and step phases in its layout.

The list and the meaning of each rule are those of SageMaker's profiler report
(https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-profiler-rules.html).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from classifier.findings import Finding
from classifier.profiling import PHASES, cpu_series, read_steps, read_system


def profile_findings(root: Path, job_started: float | None = None, batch_size: int | None = None) -> list[Finding]:
    """What each rule of the managed profiler's list says of the profile under ``root``."""
    parts = analyse(root, job_started, batch_size)
    return [
        Finding(name, bool(part["RuleTriggered"]), part["Detail"], part["Remedy"], values=part["Details"])
        for name, part in parts.items()
    ]


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
