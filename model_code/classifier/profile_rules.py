"""The managed profiler's rules, as smdebug rules over a profile's folder.

Names, meaning and, where they fit, thresholds are those of SageMaker's built-in profiler rules (SOURCE; their defaults are in the
package ``smdebug-rulesconfig``). Where they differ, the class says how and why. Two differences are common to all:

- Patience. The managed rules stay silent for 1000 samples, over eight minutes, which are longer than many of our trainings. Here
  a rule asks for MIN_SAMPLES samples or MIN_STEPS steps, and looks at steps only: not at preparation, warm-up, evaluation, or the
  steps that ``torch.profiler`` slowed.
- Data loading. The managed rules see PyTorch's loader processes; ours loads with threads, so the wait for a batch is measured.

smdebug's ``ProfilerTrial`` and its readers read the files, and ``invoke_rule`` runs a rule; a rule judges a whole profile at once.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from classifier.findings import Finding
from classifier.profile_data import MIN_SAMPLES, MIN_STEPS, Profile, Steps, collect
from classifier.profile_layout import PHASES
from classifier.profiling import read_window_steps
from classifier.saved_tensors import prepare_smdebug

prepare_smdebug()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the code is of another age
    from smdebug.core.logger import get_logger
    from smdebug.exceptions import NoMoreProfilerData, RuleEvaluationConditionMet
    from smdebug.profiler.algorithm_metrics_reader import LocalAlgorithmMetricsReader
    from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader
    from smdebug.rules.rule import Rule
    from smdebug.trials.profiler_trial import ProfilerTrial

SOURCE = "https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-built-in-profiler-rules.html"
_END_OF_TIME_US = 2**53
WAIT_S = 0.005
"""A mean wait for a batch below this is bookkeeping (indexing, copying and normalising a batch), not waiting."""


class FolderTrial(ProfilerTrial):  # type: ignore[misc]
    """smdebug's trial over a local folder. smdebug's own waits ten seconds, and for ever where there is no profile; this one
    takes the folder as it is."""

    def __init__(self, root: Path) -> None:
        self.name, self.path, self.logger = root.name, str(root), get_logger()
        self.system_metrics_reader = LocalSystemMetricsReader(self.path)
        self.framework_metrics_reader = LocalAlgorithmMetricsReader(self.path)
        self.first_timestamp = self.system_metrics_reader.get_timestamp_of_first_available_file()
        self.profile = collect(
            self.get_system_metrics(0, _END_OF_TIME_US),
            self.get_framework_metrics(0, _END_OF_TIME_US),
            read_window_steps(root),
        )


class ProfilerRule(Rule):  # type: ignore[misc]
    """A smdebug rule that judges a profile; ``finding`` holds what it said last."""

    threshold: ClassVar[str] = ""

    def __init__(self, base_trial: FolderTrial) -> None:
        super().__init__(base_trial, action_str="")
        self.finding = self.fine("not judged yet")

    @abstractmethod
    def judge(self, profile: Profile) -> Finding:
        """What the rule says."""

    def invoke_for_timerange(self, timestamp_start: int, timestamp_end: int) -> bool:
        """Judge what the profile holds between two moments in µs; whether the rule fires."""
        self.finding = self.judge(self.base_trial.profile.between(timestamp_start / 1e6, timestamp_end / 1e6))
        self.report.update(RuleTriggered=int(self.finding.triggered), Details=self.finding.values)
        return self.finding.triggered

    def invoke_at_step(self, step: int) -> bool:
        """Profiler rules know time ranges, not saved steps; smdebug wants the method."""
        return False

    def invoke(self, step: int) -> None:
        """One pass over the whole profile, for ``invoke_rule``."""
        if self.invoke_for_timerange(0, _END_OF_TIME_US):
            raise RuleEvaluationConditionMet(self.rule_name, step, end_of_rule=True)
        raise NoMoreProfilerData(_END_OF_TIME_US)

    def fine(self, detail: str, /, **values: Any) -> Finding:
        """The rule does not fire."""
        return Finding(type(self).__name__, False, detail, values=values, threshold=self.threshold, source=SOURCE)

    def fires(self, detail: str, remedy: str, steps: list[int] | None = None, /, **values: Any) -> Finding:
        """The rule fires."""
        return Finding(
            type(self).__name__, True, detail, remedy, steps or [], values, threshold=self.threshold, source=SOURCE
        )  # fmt: skip


def quantiles(values: Any) -> dict[str, float]:
    """Percentiles, ends and mean."""
    if not len(values):
        return {}
    marks = {f"p{q}": float(np.quantile(values, q / 100)) for q in (5, 50, 95, 99)}
    return {**marks, "min": float(np.min(values)), "max": float(np.max(values)), "mean": float(np.mean(values))}


def _wait(steps: Steps) -> tuple[float, float]:
    """Share of the time spent waiting for a batch, and the mean wait in seconds; the slowest twentieth of the steps, where
    checkpoints and other pauses are, left out."""
    kept = steps.seconds <= np.quantile(steps.seconds, 0.95)
    waits = steps.phases[kept, PHASES.index("DataLoading")]
    return float(waits.sum() / max(steps.seconds[kept].sum(), 1e-9)), float(waits.mean())


def _waiting_workers(profile: Profile, share: float) -> dict[str, tuple[float, float]]:
    """Workers that wait for batches for more than ``share`` of their time, with share and mean wait."""
    found = {}
    for worker, steps in profile.steps.items():
        if len(steps) >= MIN_STEPS:
            waited, mean_s = _wait(steps)
            if waited > share and mean_s > WAIT_S:
                found[worker] = (waited, mean_s)
    return found


def _cpu_full(profile: Profile, node: str) -> Any:
    """``(M,) bool``: the samples in which all cores were busy, and wanted by this job: a machine that is busy with something else
    is not the job's bottleneck."""
    cpu, wanted = profile.samples(node, "CPUUtilization"), profile.samples(node, "JobCPUDemand")
    return (cpu > 90) & (wanted > 90) if len(wanted) == len(cpu) else cpu > 90


def _nothing_to_judge(profile: Profile) -> str:
    return f"{max((len(steps) for steps in profile.steps.values()), default=0)} steps are too few to judge"


class Dataloader(ProfilerRule):
    """Steps wait for their batches. The managed rule compares the number of loader processes with the cores."""

    threshold = f"wait for a batch over 50 % of the step time and {WAIT_S * 1000:.0f} ms, {MIN_STEPS} steps"

    def judge(self, profile: Profile) -> Finding:
        """Fires for the worker that waits longest."""
        judged = {worker: _wait(steps) for worker, steps in profile.steps.items() if len(steps) >= MIN_STEPS}
        if not judged:
            return self.fine(_nothing_to_judge(profile))
        late = _waiting_workers(profile, 0.5)
        worker = max(late or judged, key=lambda name: judged[name][0])
        share, mean_s = judged[worker]
        steps = profile.steps[worker]
        detail = f"{profile.where(worker)}data loading takes {share:.0%} of a step, {mean_s * 1000:.1f} ms"
        values = {"share": share, "wait_ms": quantiles(steps.phases[:, 0] * 1000)}
        if not late:
            return self.fine(detail, **values)
        full = _cpu_full(profile, profile.node_of(worker))
        crowded = len(full) > 0 and np.mean(full) > 0.5
        remedy = (
            "the CPU is busy: lighter augmentation, a smaller picture_size or image_size, or an instance with more CPUs"
            if crowded
            else "the CPU has time left: more num_workers, or input_cache=memory so that pictures are decoded once"
        )
        waits = steps.phases[:, PHASES.index("DataLoading")]
        late_steps = steps.numbers[waits > max(WAIT_S, 0.5 * mean_s)].tolist()
        return self.fires(f"{detail}; from step {late_steps[0]} on", remedy, late_steps, **values)


class CPUBottleneck(ProfilerRule):
    """The CPU is full while the GPU has nothing to do or, on a machine without one, while steps wait for batches."""

    threshold = (
        "CPU over 90 % with a GPU under 10 % in more than 50 % of the samples (managed default); without a GPU: CPU over 90 %, and "
        "the job itself wanting over 90 % of it, in more than 50 % of the samples, while the wait for a batch takes over 30 %"
    )

    def judge(self, profile: Profile) -> Finding:
        """Fires for the first node with the fault."""
        waiting = _waiting_workers(profile, 0.3)
        details, values = [], {}
        for node in profile.nodes:
            cpu, gpu = profile.samples(node, "CPUUtilization"), profile.samples(node, "GPUUtilization", np.min)
            if len(cpu) < MIN_SAMPLES:
                details.append(f"{profile.where(node)}{len(cpu)} samples are too few to judge")
                continue
            late = {worker: found for worker, found in waiting.items() if profile.node_of(worker) == node}
            full = _cpu_full(profile, node)
            share = float(np.mean(full & (gpu < 10)) if len(gpu) == len(cpu) else np.mean(full) if late else 0.0)
            values[node] = {"share": share, "cpu": quantiles(cpu)}
            idle = "a GPU is under 10 %" if len(gpu) else "steps wait for batches"
            details.append(f"{profile.where(node)}CPU over 90 % while {idle} in {share:.0%} of {len(cpu)} samples")
            if share > 0.5:
                return self.fires(
                    f"{details[-1]}, first {profile.when(node, full)}",
                    "an instance with more CPUs, lighter augmentation, or input_cache=memory so that pictures are decoded once",
                    **values,
                )
        return self.fine("; ".join(details) or "no samples of the CPU", **values)


class IOBottleneck(ProfilerRule):
    """Disk or network cannot keep up, while the GPU has nothing to do or, on a machine without one, while steps wait for batches.

    The managed rule looks at the I/O wait of a core alone. Linux counts it only while a core is idle, and not at all for network
    file systems, so a high reading rate counts too.
    """

    READ_RATE = 20e6
    threshold = (
        "I/O wait of a core over 50 % (managed default) or reading over 20 MB/s, with a GPU under 10 %, in more than 50 % of the "
        "samples; without a GPU: while the wait for a batch takes over 30 %"
    )

    def judge(self, profile: Profile) -> Finding:
        """Fires for the first node with the fault."""
        waiting = _waiting_workers(profile, 0.3)
        details, values = [], {}
        for node in profile.nodes:
            stalled, gpu = profile.samples(node, "I/OWaitPercentage", np.max), profile.samples(node, "GPUUtilization", np.min)
            if len(stalled) < MIN_SAMPLES:
                details.append(f"{profile.where(node)}{len(stalled)} samples are too few to judge")
                continue
            rate = _sum(profile, node, "ReadThroughputInBytesPerSecond", "ReceiveBytesPerSecond", len(stalled))
            late = any(profile.node_of(worker) == node for worker in waiting)
            slow = (stalled > 50) | (rate > self.READ_RATE)
            share = float(np.mean(slow & (gpu < 10)) if len(gpu) == len(stalled) else np.mean(slow) if late else 0.0)
            values[node] = {"share": share, "io_wait": quantiles(stalled), "read_bytes_per_s": quantiles(rate)}
            idle = "a GPU is under 10 %" if len(gpu) else "steps wait for batches"
            details.append(
                f"{profile.where(node)}reading {np.median(rate) / 1e6:.0f} MB/s, I/O wait {np.median(stalled):.0f} %; slow while "
                f"{idle} in {share:.0%} of {len(stalled)} samples"
            )
            if share > 0.5:
                return self.fires(
                    f"{details[-1]}, first {profile.when(node, slow)}",
                    "input_cache=memory, an instance with more memory or a faster volume, or smaller pictures (picture_size)",
                    **values,
                )
        return self.fine("; ".join(details) or "no samples of disks", **values)


def _sum(profile: Profile, node: str, first: str, second: str, count: int) -> Any:
    parts = [profile.samples(node, name) for name in (first, second)]
    return sum((part for part in parts if len(part) == count), np.zeros(count))


class BatchSize(ProfilerRule):
    """CPU, GPU and GPU memory have all room left: the batch could be larger, or the instance smaller."""

    threshold = "95th percentile of CPU, GPU and GPU memory each under 70 % (managed default)"

    def __init__(self, base_trial: FolderTrial, batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        super().__init__(base_trial)

    def judge(self, profile: Profile) -> Finding:
        """Fires for the first GPU with the fault."""
        size = "unknown" if self.batch_size is None else str(self.batch_size)
        if not profile.gpus:
            return self.fine(f"batch size {size}; no GPU whose use could judge it", batch_size=self.batch_size)
        details = []
        for node, gpu in profile.gpus:
            use = {
                "CPU": profile.samples(node, "CPUUtilization"),
                "GPU": profile.samples(node, "GPUUtilization", name=gpu),
                "GPU memory": profile.samples(node, "GPUMemoryUtilization", name=gpu),
            }
            if min(map(len, use.values())) < MIN_GPU_SAMPLES:
                details.append(f"{profile.where(node)}{gpu}: too few samples to judge")
                continue
            p95 = {name: float(np.quantile(values, 0.95)) for name, values in use.items()}
            told = ", ".join(f"{name} {value:.0f} %" for name, value in p95.items())
            details.append(f"{profile.where(node)}{gpu}: batch size {size}, 95th percentiles {told}")
            if max(p95.values()) < 70:
                return self.fires(
                    details[-1],
                    "a larger batch_size (and learning_rate with it), or a smaller instance",
                    batch_size=self.batch_size,
                    **p95,
                )
        return self.fine("; ".join(details), batch_size=self.batch_size)


MIN_GPU_SAMPLES = 60
"""Half a minute of stepping: shorter trainings say nothing of a GPU's steady use."""


class LowGPUUtilization(ProfilerRule):
    """A GPU has little to do, or much and then nothing in turns."""

    threshold = "95th percentile under 70 %, or over 70 % with a 5th percentile under 10 % (managed default)"

    def judge(self, profile: Profile) -> Finding:
        """Fires for the first GPU with the fault."""
        if not profile.gpus:
            return self.fine("no GPU in this job")
        details, values = [], {}
        for node, gpu in profile.gpus:
            use = profile.samples(node, "GPUUtilization", name=gpu)
            if len(use) < MIN_GPU_SAMPLES:
                details.append(f"{profile.where(node)}{gpu}: {len(use)} samples are too few to judge")
                continue
            low, high = float(np.quantile(use, 0.05)), float(np.quantile(use, 0.95))
            values[f"{node}/{gpu}"] = quantiles(use)
            details.append(f"{profile.where(node)}{gpu}: 5th percentile {low:.0f} %, 95th {high:.0f} %")
            if high < 70:
                return self.fires(
                    f"{details[-1]}: under-used",
                    "a larger batch_size, faster data loading (see Dataloader), or a smaller instance",
                    **values,
                )
            if low < 10:
                idle = use < 10
                return self.fires(
                    f"{details[-1]}: it idles {idle.mean():.0%} of the time, first {profile.when(node, idle)}",
                    "see Dataloader and IOBottleneck: the GPU waits between steps",
                    **values,
                )
        return self.fine("; ".join(details), **values)


class GPUMemoryIncrease(ProfilerRule):
    """Memory in use grows while training goes on. The managed rule compares moving averages one sample apart; here the thirds of
    the stepping time are compared, so that one larger batch or the allocator's first steps are no leak."""

    threshold = "median of the last third over that of the first by more than 5 points (managed increase), the middle between them"

    def judge(self, profile: Profile) -> Finding:
        """Fires for the first GPU with the fault."""
        if not profile.gpus:
            return self.fine("no GPU in this job")
        details, values = [], {}
        for node, gpu in profile.gpus:
            use = profile.samples(node, "GPUMemoryUtilization", name=gpu)
            if len(use) < MIN_GPU_SAMPLES:
                details.append(f"{profile.where(node)}{gpu}: {len(use)} samples are too few to judge")
                continue
            first, middle, last = (float(np.median(part)) for part in np.array_split(use, 3))
            values[f"{node}/{gpu}"] = quantiles(use)
            details.append(f"{profile.where(node)}{gpu}: memory in use {first:.0f} %, {middle:.0f} %, {last:.0f} % by thirds")
            if last - first > 5 and middle > first + 1 and last > middle + 1:
                return self.fires(
                    f"{details[-1]}, at most {use.max():.0f} % {profile.when(node, use == use.max(), gpu)}",
                    "keep no tensors with their graph over steps (detach losses before summing), then a smaller batch_size",
                    **values,
                )
        return self.fine("; ".join(details), **values)


class LoadBalancing(ProfilerRule):
    """Workers have unequal work. The managed rule compares histograms of GPU use; a GPU that waits for others in NCCL looks busy,
    so the time of the phases in which nobody waits for another worker (loading and forward) is compared as well."""

    threshold = (
        "distance of two GPUs' histograms of use over 0.5 (managed default) and means 20 points apart; or median of loading and "
        f"forward of the slowest worker over 1.5 times the fastest's and a tenth of a step longer, {MIN_STEPS} steps"
    )

    def judge(self, profile: Profile) -> Finding:
        """Fires for GPUs first, then for workers."""
        uneven = self._gpus(profile)
        if uneven:
            return uneven
        own = {
            worker: float(np.median(steps.phases[:, :2].sum(axis=1)))
            for worker, steps in profile.steps.items()
            if len(steps) >= MIN_STEPS
        }
        if len(profile.steps) < 2 and len(profile.gpus) < 2:
            return self.fine("one worker; nothing to balance")
        if len(own) < 2:
            return self.fine(_nothing_to_judge(profile))
        slow, fast = max(own, key=lambda name: own[name]), min(own, key=lambda name: own[name])
        step_s = float(np.median(profile.steps[slow].seconds))
        told = f"loading and forward take {own[slow] * 1000:.1f} ms in {slow} and {own[fast] * 1000:.1f} ms in {fast}"
        values = {"own_ms": {worker: seconds * 1000 for worker, seconds in own.items()}, "step_ms": step_s * 1000}
        if own[slow] > 1.5 * own[fast] and own[slow] - own[fast] > 0.1 * step_s:
            remedy = f"look for other load or a slower machine at {slow}; use instances of one type and one worker for each GPU"
            return self.fires(f"{told}: {fast} waits in every backward pass", remedy, **values)
        return self.fine(told, **values)

    def _gpus(self, profile: Profile) -> Finding | None:
        use = {(node, gpu): profile.samples(node, "GPUUtilization", name=gpu) for node, gpu in profile.gpus}
        long = {key: values for key, values in use.items() if len(values) >= MIN_GPU_SAMPLES}
        for first, one in long.items():
            for second, other in long.items():
                distance = _distance(one, other)
                if distance > 0.5 and one.mean() - other.mean() > 20:
                    return self.fires(
                        f"{'/'.join(first)} is used {one.mean():.0f} % and {'/'.join(second)} {other.mean():.0f} % on average, "
                        f"distance of the histograms {distance:.2f}",
                        "one worker for each GPU and equal parts of each batch; or an instance with fewer GPUs",
                        distance=distance,
                    )
        return None


def _distance(one: Any, other: Any) -> float:
    """Square root of the Jensen-Shannon divergence (natural logarithm) of two histograms in steps of ten percent."""
    shares = [np.histogram(values, bins=10, range=(0, 100))[0] / len(values) for values in (one, other)]
    middle = (shares[0] + shares[1]) / 2
    divergence = 0.0
    for share in shares:
        seen = share > 0
        divergence += float((share[seen] * np.log(share[seen] / middle[seen])).sum()) / 2
    return float(np.sqrt(max(divergence, 0.0)))


class MaxInitializationTime(ProfilerRule):
    """The first step comes late."""

    threshold = "20 minutes from the start of the job to the first step (managed default)"

    def __init__(self, base_trial: FolderTrial, started: float | None = None, threshold_s: float = 20 * 60) -> None:
        self.started, self.threshold_s = started, threshold_s
        super().__init__(base_trial)

    def judge(self, profile: Profile) -> Finding:
        """Fires too where no step came at all. ``started`` unknown: the first sample counts."""
        started = self.started or profile.first_sample
        if not started:
            return self.fine("the start of the job is not known")
        stepped = profile.first_step
        seconds = max(0.0, (stepped or profile.last_sample) - started)
        detail = f"{seconds:.0f} s from the start of the script {'to the first step' if stepped else 'and no step yet'}"
        if seconds <= self.threshold_s:
            return self.fine(detail, seconds=seconds)
        remedy = "a smaller image, fewer or smaller pictures, input_cache=disk, or FastFile input, so that steps begin sooner"
        return self.fires(f"{detail}; the limit is {self.threshold_s:.0f} s", remedy, seconds=seconds)


class StepOutlier(ProfilerRule):
    """Single steps take much longer than those around them.

    The managed rule counts steps over the mean by 3 standard deviations, and fires at more than 10 among 100 or more: outliers
    widen the deviation and hide, and every long training has 10. Here a step is compared with the median of its neighbours, so
    that a machine that slows for a while is no outlier, and the rule fires when outliers cost enough to be worth a look.
    """

    NEIGHBOURS = 21
    AFTER_PAUSE, PAUSE_S = 3, 0.05
    """After an evaluation the loader fills up anew and checkpoints are on their way to S3: so many steps may be slow."""
    threshold = (
        f"steps over twice the median of {NEIGHBOURS} neighbours, over 3 robust standard deviations and over 20 ms longer; at "
        "least 3 of 50 or more steps, which together cost more than 15 % of the step time and a second"
    )

    def judge(self, profile: Profile) -> Finding:
        """Fires for the worker that lost most."""
        judged = {worker: steps for worker, steps in profile.steps.items() if len(steps) >= 50}
        if not judged:
            return self.fine(_nothing_to_judge(profile))
        lost = {worker: self._excess(steps.seconds) * ~self._after_pause(steps) for worker, steps in judged.items()}
        worker = max(lost, key=lambda name: lost[name].sum() / judged[name].seconds.sum())
        steps, excess = judged[worker], lost[worker]
        late = excess > 0
        share = float(excess.sum() / steps.seconds.sum())
        values = {"step_ms": quantiles(steps.seconds * 1000), "lost_share": share}
        detail = f"{profile.where(worker)}{late.sum()} of {len(steps)} steps are outliers and cost {share:.0%} of the step time"
        if late.sum() < 3 or share <= 0.15 or excess.sum() <= 1:
            return self.fine(detail, **values)
        grown = steps.phases[late].mean(axis=0) - np.median(steps.phases[~late], axis=0)
        phase = PHASES[int(grown.argmax())]
        remedy = {
            "DataLoading": "look at what runs between steps: checkpoints (checkpoint_interval_s), logging, or slow batches",
        }.get(phase, "look for other load on the machine, memory that is paged out, or pictures of unequal size")
        numbers = steps.numbers[late].tolist()
        first = f"the first is step {numbers[0]}, {steps.starts[late][0] - profile.start:.0f} s in; {phase} grows most"
        return self.fires(f"{detail}; {first}", remedy, numbers, **values)

    def _after_pause(self, steps: Steps) -> Any:
        """Which steps are among the first after a pause between steps."""
        pauses = steps.starts[1:] - (steps.starts + steps.seconds)[:-1] > self.PAUSE_S
        late = np.zeros(len(steps), dtype=bool)
        for first in np.flatnonzero(pauses) + 1:
            late[first : first + self.AFTER_PAUSE] = True
        return late

    def _excess(self, seconds: Any) -> Any:
        """Seconds over the neighbours' median, of outliers; 0 for the others."""
        half = self.NEIGHBOURS // 2
        usual = np.median(np.lib.stride_tricks.sliding_window_view(np.pad(seconds, half, mode="reflect"), self.NEIGHBOURS), axis=1)
        longer = seconds - usual
        spread = 1.4826 * float(np.median(np.abs(longer)))
        return np.where((seconds > 2 * usual) & (longer > 3 * spread) & (longer > 0.02), longer, 0.0)


class OverallFrameworkMetrics(ProfilerRule):
    """Where a step's time goes. Informs, never fires, as in the managed report."""

    def judge(self, profile: Profile) -> Finding:
        """Shares of the phases over all workers, and seconds of each."""
        if not any(len(steps) for steps in profile.steps.values()):
            return self.fine("no steps after the first, which warm up")
        total = sum((steps.phases.sum(axis=0) for steps in profile.steps.values()), np.zeros(len(PHASES)))
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(PHASES, total / total.sum(), strict=True))
        workers = {
            worker: dict(zip(PHASES, steps.phases.sum(axis=0).tolist(), strict=True)) for worker, steps in profile.steps.items()
        }
        return self.fine(shares, seconds=dict(zip(PHASES, total.tolist(), strict=True)), workers=workers)


class OverallSystemUsage(ProfilerRule):
    """How much of the machine is used. Informs, never fires, as in the managed report."""

    METRICS: ClassVar[dict[str, str]] = {
        "cpu": "CPUUtilization",
        "memory": "MemoryUsedPercent",
        "gpu": "GPUUtilization",
        "gpu_memory": "GPUMemoryUtilization",
        "io_wait": "I/OWaitPercentage",
        "read": "ReadThroughputInBytesPerSecond",
        "write": "WriteThroughputInBytesPerSecond",
        "received": "ReceiveBytesPerSecond",
        "sent": "TransmitBytesPerSecond",
    }

    def judge(self, profile: Profile) -> Finding:
        """Quantiles by node, and of all nodes together under the metric's own name."""
        nodes = {
            node: {name: quantiles(profile.samples(node, metric)) for name, metric in self.METRICS.items()}
            for node in profile.nodes
        }
        joined = {
            name: quantiles(np.concatenate([profile.samples(node, metric) for node in profile.nodes] or [np.zeros(0)]))
            for name, metric in self.METRICS.items()
        }
        told = [f"{name} {joined[name.lower()]['mean']:.0f} %" for name in ("CPU", "Memory", "GPU") if joined[name.lower()]]
        return self.fine(f"{', '.join(told)} on average while stepping" if told else "no samples", **joined, nodes=nodes)


def profile_findings(
    root: Path, job_started: float | None = None, batch_size: int | None = None, *, max_initialization_s: float = 20 * 60
) -> list[Finding]:
    """What each rule of the managed profiler's list says of the profile under ``root``; ``job_started`` in s since the epoch."""
    trial = FolderTrial(root)
    rules: list[ProfilerRule] = [
        OverallSystemUsage(trial),
        OverallFrameworkMetrics(trial),
        CPUBottleneck(trial),
        IOBottleneck(trial),
        Dataloader(trial),
        BatchSize(trial, batch_size),
        GPUMemoryIncrease(trial),
        LowGPUUtilization(trial),
        LoadBalancing(trial),
        MaxInitializationTime(trial, job_started, max_initialization_s),
        StepOutlier(trial),
    ]
    for rule in rules:
        rule.invoke_for_timerange(0, _END_OF_TIME_US)
    return [rule.finding for rule in rules]
