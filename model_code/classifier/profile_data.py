"""A profile in arrays, as the rules look at it. Steps and samples of warm-up, evaluation and profiled steps are left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifier.profile_layout import PHASES

Floats = NDArray[np.float64]

WARM_STEPS = 3
"""First steps of a process, in which allocators and caches fill."""
MIN_STEPS = 20
MIN_SAMPLES = 10


@dataclass(frozen=True)
class Steps:
    """N steps of one worker, by time. ``numbers (N,) int``, ``starts (N,)`` s since the epoch, ``phases (N, 4)`` s, as PHASES."""

    numbers: NDArray[np.int64]
    starts: Floats
    phases: Floats

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def seconds(self) -> Floats:
        """``(N,)`` time of each step."""
        found: Floats = self.phases.sum(axis=1)
        return found

    def where(self, chosen: NDArray[np.bool_]) -> Steps:
        """Some of the steps."""
        return Steps(self.numbers[chosen], self.starts[chosen], self.phases[chosen])


@dataclass(frozen=True)
class Profile:
    """``steps`` by worker (``algo-1-0``: node and rank); ``readings`` by node, dimension or name, and core or GPU: times and
    values ``(M,)``."""

    steps: dict[str, Steps]
    readings: dict[tuple[str, str, str], tuple[Floats, Floats]]
    first_step: float | None = None
    """Start of the very first step, warm-up included."""
    busy: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Starts and ends of all steps of a node, by start."""

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return sorted({node for node, _, _ in self.readings} | {self.node_of(worker) for worker in self.steps})

    @property
    def gpus(self) -> list[tuple[str, str]]:
        """``(node, gpu0)`` …"""
        return sorted((node, name) for node, dimension, name in self.readings if dimension == "GPUUtilization")

    @property
    def first_sample(self) -> float:
        """Time of the first sample of all nodes, 0 where there is none."""
        return min((float(times[0]) for times, _ in self.readings.values() if len(times)), default=0.0)

    @property
    def last_sample(self) -> float:
        """Time of the last sample of all nodes, 0 where there is none."""
        return max((float(times[-1]) for times, _ in self.readings.values() if len(times)), default=0.0)

    @property
    def start(self) -> float:
        """Zero of the times that findings tell."""
        return self.first_sample or self.first_step or 0.0

    @staticmethod
    def node_of(worker: str) -> str:
        """``algo-1`` of ``algo-1-0``."""
        return worker.rpartition("-")[0]

    def where(self, name: str) -> str:
        """The beginning of a sentence about a node or worker: its name, where there are several."""
        names = list(self.steps) if name in self.steps else self.nodes
        return f"{name}: " if len(names) > 1 else ""

    def between(self, start: float, end: float) -> Profile:
        """What happened in a range of time, in s since the epoch."""
        steps = {worker: part.where((part.starts >= start) & (part.starts <= end)) for worker, part in self.steps.items()}
        readings = {}
        for key, (times, values) in self.readings.items():
            inside = (times >= start) & (times <= end)
            readings[key] = (times[inside], values[inside])
        return replace(self, steps=steps, readings=readings)

    def samples(self, node: str, metric: str, over: Callable[..., Any] = np.mean, name: str | None = None) -> Floats:
        """``(M,)`` values of a metric of a node while it stepped: of one core or GPU, or ``over`` all of them."""
        return self._stepping(node, metric, over, name)[1]

    def when(self, node: str, chosen: Any, name: str | None = None) -> str:
        """When the first of the chosen samples of a node was taken."""
        metric = "CPUUtilization" if name is None else "GPUUtilization"
        times = self._stepping(node, metric, np.mean, name)[0]
        hits = times[: len(chosen)][np.asarray(chosen)[: len(times)]]
        return f"{hits[0] - self.start:.0f} s in" if len(hits) else "at no time"

    def _stepping(self, node: str, metric: str, over: Callable[..., Any], name: str | None) -> tuple[Floats, Floats]:
        rows = [row for key, row in self.readings.items() if key[:2] == (node, metric) and name in (None, key[2])]
        if not rows or node not in self.busy:
            return np.zeros(0), np.zeros(0)
        count = min(len(times) for times, _ in rows)  # a sample cut off at the end lacks some
        times = rows[0][0][:count]
        values = over(np.stack([row[:count] for _, row in rows]), axis=0)
        starts, ends = self.busy[node]
        before = np.searchsorted(starts, times, side="right") - 1
        inside = (before >= 0) & (times <= ends[before])
        return times[inside], values[inside]


def collect(system: Iterable[Any], framework: Iterable[Any], slowed_steps: set[int]) -> Profile:
    """The profile from smdebug's system and framework events; ``slowed_steps`` ran under torch.profiler."""
    whole = {worker: _steps(events) for worker, events in _by_worker(framework).items()}
    whole = {worker: steps for worker, steps in whole.items() if len(steps)}
    counted = {worker: steps.where(_counts(steps, slowed_steps)) for worker, steps in whole.items()}
    first_step = min((float(steps.starts[0]) for steps in whole.values()), default=None)
    return Profile(counted, _readings(system), first_step, _busy(counted))


def _counts(steps: Steps, slowed_steps: set[int]) -> NDArray[np.bool_]:
    return (steps.numbers >= WARM_STEPS) & ~np.isin(steps.numbers, sorted(slowed_steps))


def _by_worker(framework: Iterable[Any]) -> dict[str, list[Any]]:
    found = defaultdict(list)
    for event in framework:
        if event.event_name in PHASES:
            found[event.node_id].append(event)
    return found


def _steps(events: list[Any]) -> Steps:
    """Whole steps; a process that was killed leaves the beginning of one, and its successor counts from 0 again."""
    numbers, starts, phases = [], [], []
    current: dict[str, float] = {}
    start = 0.0
    for event in sorted(events, key=lambda e: e.start_time):
        if event.event_name == PHASES[0]:
            current, start = {}, event.start_time / 1e6
        current[event.event_name] = event.duration / 1e6
        if event.event_name == PHASES[-1] and len(current) == len(PHASES):
            numbers.append(int(event.event_args["step_num"]))
            starts.append(start)
            phases.append([current[phase] for phase in PHASES])
    return Steps(np.array(numbers, np.int64), np.array(starts), np.array(phases).reshape(-1, len(PHASES)))


def _busy(steps: dict[str, Steps]) -> dict[str, tuple[Floats, Floats]]:
    """Of the workers of a node, the one with most steps stands for all: they go in step."""
    found: dict[str, tuple[Floats, Floats]] = {}
    for worker, part in sorted(steps.items(), key=lambda item: len(item[1])):
        if len(part):
            found[Profile.node_of(worker)] = (part.starts, part.starts + part.seconds)
    return found


def _readings(system: Iterable[Any]) -> dict[tuple[str, str, str], tuple[Floats, Floats]]:
    """By node, dimension (or, where that says nothing of the metric, name) and name."""
    rows: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for event in system:
        metric = event.name if event.dimension in ("", "Algorithm", "Platform") else event.dimension
        rows[event.node_id, metric, event.name].append((event.timestamp, event.value))
    found = {}
    for key, pairs in rows.items():
        table = np.array(sorted(pairs))
        found[key] = (table[:, 0], table[:, 1])
    return found
