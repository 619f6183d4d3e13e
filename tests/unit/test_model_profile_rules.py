"""Each rule of the managed profiler's list fires for a training that has the fault, and for no healthy one."""

from __future__ import annotations

import io
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier import profile_rules, profiling
from classifier.findings import Finding
from classifier.profile_rules import FolderTrial, profile_findings
from PIL import Image
from profile_fakes import LOOK_S, GpuUse, Loader, Network, fake_nvml, train
from training_child import CONTEXT

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "BatchSize", "CPUBottleneck", "Dataloader", "GPUMemoryIncrease", "IOBottleneck", "LoadBalancing", "LowGPUUtilization",
    "MaxInitializationTime", "OverallFrameworkMetrics", "OverallSystemUsage", "StepOutlier",
}  # fmt: skip


def findings(root: Path, **flags: float) -> dict[str, Finding]:
    return {finding.rule: finding for finding in profile_findings(root, **flags)}


def fired(root: Path, **flags: float) -> set[str]:
    return {name for name, finding in findings(root, **flags).items() if finding.triggered}


def test_a_healthy_training_fires_no_rule_and_every_rule_speaks(tmp_path: Path):
    started = time.time()
    train(tmp_path, Loader(40), window=3, epochs=2)
    found = {finding.rule: finding for finding in profile_findings(tmp_path, started, 16)}
    assert set(found) == RULES
    assert not [name for name, finding in found.items() if finding.triggered], found
    assert all(finding.detail and finding.source for finding in found.values())
    assert "DataLoading" in found["OverallFrameworkMetrics"].detail
    assert "CPU" in found["OverallSystemUsage"].detail
    assert 0 < found["OverallSystemUsage"].values["cpu"]["mean"] <= 100
    assert "batch size 16" in found["BatchSize"].detail


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_short_training_fires_no_rule(tmp_path: Path, steps: int):
    """Slow first steps, and too few of them to judge."""
    if steps:
        train(tmp_path, Loader(steps, lambda step: time.sleep(0.1)), window=3)
    assert fired(tmp_path) == set()


def test_slow_first_steps_and_validation_pauses_fire_no_rule(tmp_path: Path):
    timeline = profiling.StepTimeline(tmp_path)
    with profiling.SystemSampler(tmp_path, interval=0.02):
        for epoch in range(3):
            timeline.mode("train")
            for step in range(30):
                time.sleep(0.5 if epoch == step == 0 else 0)
                for phase in profiling.PHASES:
                    time.sleep(0.001)
                    timeline.mark(phase)
            timeline.mode("eval")
            time.sleep(0.3)
    timeline.close()
    assert fired(tmp_path) == set()


def test_other_load_on_the_machine_fires_no_rule(tmp_path: Path):
    """Every core is busy with something else."""
    with ThreadPoolExecutor(2) as others:
        done: list[bool] = []

        def burn() -> None:
            square = np.ones((400, 400), np.float32)
            while not done:
                square @ square

        for _ in range(2):
            others.submit(burn)
        train(tmp_path, Loader(80))
        done.append(True)
    assert fired(tmp_path) == set()


def test_a_loader_that_sleeps_fires_dataloader_alone(tmp_path: Path):
    train(tmp_path, Loader(40, lambda step: time.sleep(0.06 if step >= 8 else 0)))
    found = findings(tmp_path)
    assert {name for name, finding in found.items() if finding.triggered} == {"Dataloader"}
    loader = found["Dataloader"]
    assert "from step" in loader.detail
    assert set(range(8, 40)) <= set(loader.steps), "the steps that waited"
    assert "num_workers" in loader.remedy


def huge_picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    return out.getvalue()


def test_a_loader_that_decodes_huge_pictures_fires_cpu_bottleneck(tmp_path: Path):
    cores, picture = os.cpu_count() or 1, huge_picture()

    def decode(_: int) -> None:
        Image.open(io.BytesIO(picture)).convert("RGB").load()

    def batch() -> Iterator[None]:
        """Pictures whose decoding takes some ten steps' time: the step is computed beside it, and slower for it."""
        return workers.map(decode, range(16 * cores))

    with ThreadPoolExecutor(2 * cores) as workers:
        # Two batches ahead, as a loader's workers are: they decode while the step is computed too.
        batches = deque([batch(), batch()])

        def decoded(_: int) -> None:
            batches.append(batch())
            list(batches.popleft())

        train(tmp_path, Loader(25, decoded))
    found = findings(tmp_path)
    assert {"CPUBottleneck", "Dataloader"} <= {name for name, finding in found.items() if finding.triggered}, found
    assert "s in" in found["CPUBottleneck"].detail
    assert "decoded once" in found["CPUBottleneck"].remedy


def test_a_loader_that_reads_a_disk_without_its_cache_fires_io_bottleneck(tmp_path: Path):
    path, size = tmp_path / "pictures", 32 * 2**20
    path.write_bytes(os.urandom(2**20) * 32)
    os.sync()
    try:
        disk = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary folder's file system cannot read past its cache (O_DIRECT)")
    buffer = mmap.mmap(-1, size)

    def read(_: int) -> None:
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            os.preadv(disk, [buffer], 0)

    train(tmp_path / "profile", Loader(40, read))
    os.close(disk)
    found = findings(tmp_path / "profile")
    if not found["OverallSystemUsage"].values["read"]["max"]:
        pytest.skip("this machine's disk counters do not see the temporary folder's disk")
    assert found["IOBottleneck"].triggered, found["IOBottleneck"]
    assert "MB/s" in found["IOBottleneck"].detail


def test_a_late_first_step_fires_max_initialization_time(tmp_path: Path):
    started = time.time()
    time.sleep(0.6)
    train(tmp_path, Loader(10))
    late = {f.rule: f for f in profile_findings(tmp_path, started, max_initialization_s=0.5)}["MaxInitializationTime"]
    assert late.triggered
    assert late.values["seconds"] >= 0.6
    assert not {f.rule: f for f in profile_findings(tmp_path, started)}["MaxInitializationTime"].triggered


def test_a_first_step_that_never_comes_fires_max_initialization_time(tmp_path: Path):
    with profiling.SystemSampler(tmp_path, interval=0.05):
        time.sleep(0.4)
    found = {f.rule: f for f in profile_findings(tmp_path, max_initialization_s=0.1)}["MaxInitializationTime"]
    assert found.triggered
    assert "no step yet" in found.detail


def test_pauses_inside_some_steps_fire_step_outlier(tmp_path: Path):
    calls = iter(range(10**6))
    train(tmp_path, Loader(80), Network(lambda: time.sleep(0.4 if next(calls) % 20 == 15 else 0)))
    found = findings(tmp_path)
    assert {name for name, finding in found.items() if finding.triggered} == {"StepOutlier"}
    assert set(found["StepOutlier"].steps) >= {15, 35, 55, 75}
    assert len(found["StepOutlier"].steps) < 8
    assert "Forward grows most" in found["StepOutlier"].detail


def worker(rank: int, port: int, roots: list[str], pauses_s: list[float]) -> None:
    """One of two processes that average gradients, with a pause in each forward pass. Its node is algo-1 or algo-2."""
    import warnings

    from classifier import distributed

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(SM_CURRENT_HOST=f"algo-{rank + 1}")
    distributed.start()
    for root, pause_s in zip(roots, pauses_s, strict=True):
        average(Path(root), pause_s)
    distributed.stop()


def average(root: Path, pause_s: float) -> None:
    """Forty steps. The network is gone before the group is left, as in a training: where it goes later, gloo may never end."""
    from torch.nn.parallel import DistributedDataParallel

    network = DistributedDataParallel(Network(lambda: time.sleep(pause_s)))
    timeline = profiling.StepTimeline(root)
    timeline.mode("train")
    for batch in Loader(40).epoch(0):
        timeline.mark("DataLoading")
        loss = torch.nn.functional.cross_entropy(network(batch.inputs.float() / 255), batch.labels)
        timeline.mark("Forward")
        loss.backward()
        timeline.mark("Backward")
        for weight in network.parameters():
            weight.data.sub_(weight.grad, alpha=0.01)
            weight.grad = None
        timeline.mark("Optimizer")
    timeline.close()


def test_a_slow_worker_of_two_fires_load_balancing_and_an_equal_one_does_not(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    roots = [tmp_path / "uneven", tmp_path / "even"]
    pauses_s = [[0.01, 0.03], [0.07, 0.03]]
    arguments = [(rank, port, [str(root) for root in roots], pauses_s[rank]) for rank in range(2)]
    processes = [CONTEXT.Process(target=worker, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    uneven, even = (findings(root)["LoadBalancing"] for root in roots)
    assert uneven.triggered
    assert "in algo-2-1 and" in uneven.detail
    assert "algo-1-0 waits in every backward pass" in uneven.detail
    assert not even.triggered, even.detail
    assert set(even.values["own_ms"]) == {"algo-1-0", "algo-2-1"}


# Rules about GPUs: a real timeline and the sampler's own files, the driver's answers simulated.


def stepping(root: Path, monkeypatch: pytest.MonkeyPatch, *gpus: GpuUse, looks: int = 130) -> None:
    """Steps of a training until the GPUs were looked at so often."""
    seen, timeline = fake_nvml(monkeypatch, *gpus), profiling.StepTimeline(root)
    with profiling.SystemSampler(root, interval=LOOK_S):
        timeline.mode("train")
        while seen[0] < looks:
            for phase in profiling.PHASES:
                time.sleep(0.002)
                timeline.mark(phase)
    timeline.close()


def noisy(use: float, memory: float) -> GpuUse:
    random = np.random.default_rng(0)
    return lambda s: (float(np.clip(use + random.normal(0, 3), 0, 100)), memory)


def test_well_used_gpus_fire_no_rule_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stepping(tmp_path, monkeypatch, noisy(93, 80), noisy(90, 80))
    assert fired(tmp_path) == set()


@pytest.mark.parametrize(
    ("gpu", "rules", "words"),
    [
        (noisy(40, 80), {"LowGPUUtilization"}, "under-used"),
        (lambda s: (95 if s % 0.4 < 0.3 else 0, 80), {"LowGPUUtilization"}, "idles"),
        (noisy(40, 20), {"LowGPUUtilization", "BatchSize"}, "95th percentiles CPU"),
        (lambda s: (90, min(95, 30 + 40 * s)), {"GPUMemoryIncrease"}, "by thirds"),
    ],
    ids=["low", "idle in turns", "small batch", "leak"],
)
def test_gpu_faults_fire_their_rules_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: GpuUse, rules: set[str], words: str
):
    quiet_cpu(monkeypatch, 20.0)
    stepping(tmp_path, monkeypatch, gpu)
    found = findings(tmp_path)
    assert {name for name, finding in found.items() if finding.triggered} == rules
    assert any(words in found[name].detail for name in rules)
    assert all(found[name].remedy for name in rules)


def test_memory_that_grows_once_is_no_leak_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stepping(tmp_path, monkeypatch, lambda s: (90, 30 if s < 0.5 else 60))
    assert fired(tmp_path) == set()


def test_gpus_with_unequal_work_fire_load_balancing_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stepping(tmp_path, monkeypatch, noisy(95, 80), noisy(72, 80))
    found = findings(tmp_path)["LoadBalancing"]
    assert found.triggered
    assert "algo-1/gpu0 is used 9" in found.detail


@pytest.mark.parametrize(("cpu", "wait", "rule"), [(99.0, 0.0, "CPUBottleneck"), (20.0, 80.0, "IOBottleneck")])
def test_a_gpu_that_waits_for_cpu_or_disk_fires_the_bottleneck_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: float, wait: float, rule: str
):
    quiet_cpu(monkeypatch, cpu, wait)
    stepping(tmp_path, monkeypatch, lambda s: (2 if s % 0.4 < 0.3 else 95, 80))
    assert rule in fired(tmp_path)
    assert not fired(tmp_path) & ({"CPUBottleneck", "IOBottleneck"} - {rule})


def quiet_cpu(monkeypatch: pytest.MonkeyPatch, use: float, waiting: float = 0.0) -> None:
    """Cores as the test wants them, whatever the machine does."""
    from classifier import system_metrics

    readings = [("cpu", "cpu0", "CPUUtilization", use), ("cpu", "cpu0", "I/OWaitPercentage", waiting)]
    monkeypatch.setattr(system_metrics._Cpus, "read", lambda self: readings)
    monkeypatch.setattr(system_metrics._Demand, "read", lambda self: [("process", "JobCPUDemand", "", use)])


def test_findings_name_the_node_where_there_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pauses: dict[str, Callable[[int], object]] = {"algo-1": lambda step: None, "algo-2": lambda step: time.sleep(0.05)}
    for rank, (node, pause) in enumerate(pauses.items()):
        monkeypatch.setenv("SM_CURRENT_HOST", node)
        monkeypatch.setenv("RANK", str(rank))
        train(tmp_path, Loader(30, pause))
    found = findings(tmp_path)
    assert found["Dataloader"].triggered
    assert found["Dataloader"].detail.startswith("algo-2-1: ")
    assert set(found["OverallSystemUsage"].values["nodes"]) == {"algo-1", "algo-2"}


def test_smdebugs_invoker_runs_the_rules(tmp_path: Path):
    from smdebug.exceptions import RuleEvaluationConditionMet
    from smdebug.rules.rule import Rule
    from smdebug.rules.rule_invoker import invoke_rule

    train(tmp_path, Loader(30, lambda step: time.sleep(0.03)))
    trial = FolderTrial(tmp_path)
    late, fine = profile_rules.Dataloader(trial), profile_rules.StepOutlier(trial)
    assert isinstance(late, Rule)
    with pytest.raises(RuleEvaluationConditionMet):
        invoke_rule(late, raise_eval_cond=True)
    assert late.report["RuleTriggered"] == 1
    invoke_rule(fine, raise_eval_cond=True)
    assert not fine.finding.triggered


def test_a_restarted_training_counts_its_steps_apart(tmp_path: Path):
    """Spot capacity ended and the job began again: the same numbers come twice in one profile."""
    for _ in range(2):
        train(tmp_path, Loader(30))
    steps = FolderTrial(tmp_path).profile.steps["algo-1-0"]
    assert len(steps) == 2 * (30 - 3)
    assert steps.seconds.max() < 20 * np.median(steps.seconds)
