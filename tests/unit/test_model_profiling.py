"""What a training writes of itself while it runs, and that smdebug's own tools read it."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from classifier import operator_window, profile_layout, profiling, saved_tensors, storage
from classifier.config import from_mapping
from classifier.errors import ConfigError
from local_fakes import BUCKET, moto_cloud
from profile_fakes import Loader, fake_nvml, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # smdebug is unmaintained and says so in many ways
]
FOR_EVER_US = 2**53


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes' profiles in one folder, as a run's prefix holds them."""
    root = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        for rank, host in enumerate(("algo-1", "algo-2")):
            patch.setenv("SM_CURRENT_HOST", host)
            patch.setenv("RANK", str(rank))
            train(root, Loader(30), window=3 if rank == 0 else 0, epochs=2)
    return root


def test_smdebugs_local_readers_read_both_nodes(profile: Path):
    saved_tensors.prepare_smdebug()
    from smdebug.profiler.algorithm_metrics_reader import LocalAlgorithmMetricsReader
    from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader

    system = LocalSystemMetricsReader(str(profile)).get_events(0, FOR_EVER_US)
    assert {event.node_id for event in system} == {"algo-1", "algo-2"}
    assert {(event.type, event.dimension) for event in system} >= {
        ("cpu", "CPUUtilization"), ("cpu", "I/OWaitPercentage"), ("memory", ""), ("i/o", ""), ("network", "Algorithm"),
    }  # fmt: skip
    assert {event.name for event in system if event.type == "cpu"} == {f"cpu{number}" for number in range(os.cpu_count() or 1)}
    assert len(system) == len(profiling.read_system(profile))
    phases = LocalAlgorithmMetricsReader(str(profile)).get_events(0, FOR_EVER_US)
    assert {event.node_id for event in phases} == {"algo-1-0", "algo-2-1"}
    assert {event.event_name for event in phases} == set(profiling.PHASES)
    assert len(phases) == 2 * 2 * 30 * len(profiling.PHASES)


def test_smdebugs_frame_reads_the_profile(profile: Path):
    saved_tensors.prepare_smdebug()
    from smdebug.profiler.analysis.utils.profiler_data_to_pandas import PandasFrame

    frame = PandasFrame(str(profile))
    system = frame.get_all_system_metrics()
    assert set(system["nodeID"]) == {"algo-1", "algo-2"}
    assert system[system["dimension"] == "CPUUtilization"]["value"].between(0, 100).all()
    phases = frame.get_all_framework_metrics()
    assert set(phases["framework_metric"]) == set(profiling.PHASES)
    assert sorted(phases["step"].unique()) == list(range(60))


def test_smdebugs_s3_readers_read_what_was_uploaded(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved_tensors.prepare_smdebug()
    from smdebug.profiler.analysis.utils.profiler_data_to_pandas import PandasFrame
    from smdebug.profiler.system_metrics_reader import S3SystemMetricsReader

    with moto_cloud(tmp_path) as cloud:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": cloud.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        storage.s3.cache_clear()
        uri = f"s3://{BUCKET}/runs/r/profiler-output"
        with profiling.Uploader({profile: uri}):
            pass
        storage.s3.cache_clear()
        events = S3SystemMetricsReader(uri).get_events(0, FOR_EVER_US)
        assert len(events) == len(profiling.read_system(profile))
        frame = PandasFrame(uri)
        assert set(frame.get_all_system_metrics()["nodeID"]) == {"algo-1", "algo-2"}
        assert set(frame.get_all_framework_metrics()["framework_metric"]) == set(profiling.PHASES)


def test_steps_are_told_by_node_rank_and_phase(profile: Path):
    rows = profiling.read_steps(profile)
    assert {(row["node"], row["rank"]) for row in rows} == {("algo-1", 0), ("algo-2", 1)}
    mine = [row for row in rows if row["node"] == "algo-1"]
    assert [row["step"] for row in mine] == [step for step in range(60) for _ in profiling.PHASES]
    assert [row["phase"] for row in mine[:4]] == list(profiling.PHASES)
    for before, after in itertools.pairwise(mine):
        assert after["start"] >= before["start"] + before["duration"] - 1e-5, "phases follow each other"


def test_the_window_names_the_operators_and_keeps_a_trace(profile: Path):
    rows = profiling.read_operators(profile)
    assert {"node", "name", "calls", "cpu_ms", "device_ms", "share"} <= set(rows[0])
    backward = next(row for row in rows if row["name"] == "aten::convolution_backward")
    assert backward["calls"] == 2 * 3, "two convolutions, three steps: the warm-up step is not counted"
    assert backward["cpu_ms"] > 0
    assert rows == sorted(rows, key=lambda row: -row["cpu_ms"])
    assert sum(row["share"] for row in rows) <= 1 + 1e-9
    assert {row["node"] for row in rows} == {"algo-1"}
    with gzip.open(profile / "framework" / "operators" / "0-algo-1_trace.gz", "rt") as stored:
        assert any(event["name"] == "aten::convolution_backward" for event in json.load(stored)["traceEvents"])
    assert profiling.read_window_steps(profile) == {9, 10, 11, 12, 13}
    assert profiling.read_kernels(profile) == []


def test_on_a_gpu_kernels_have_a_table_of_their_own_simulated():
    def average(key: str, device: str, cpu_us: float, device_us: float) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, count=2, device_type=SimpleNamespace(name=device), self_cpu_time_total=cpu_us, self_device_time_total=device_us
        )  # fmt: skip

    table = operator_window.operator_table([
        average("aten::add", "CPU", 9000, 1000), average("aten::mm", "CPU", 500, 3000), average("gemm", "CUDA", 0, 3000),
        average("add_kernel", "CUDA", 0, 1000), average("ProfilerStep#12", "CPU", 99000, 0),
    ])  # fmt: skip
    assert [(row["kind"], row["name"], row["share"]) for row in table] == [
        ("operator", "aten::mm", 0.75), ("operator", "aten::add", 0.25), ("kernel", "gemm", 0.75), ("kernel", "add_kernel", 0.25),
    ]  # fmt: skip
    assert table[0]["device_ms"] == 3.0


def test_weights_are_the_same_with_and_without_the_window(tmp_path: Path):
    watched = train(tmp_path / "watched", Loader(30), window=5).state_dict()
    alone = train(tmp_path / "alone", Loader(30)).state_dict()
    assert profiling.read_operators(tmp_path / "watched")
    assert not (tmp_path / "alone" / "framework" / "operators").exists()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


@pytest.mark.parametrize(("steps", "epochs", "recorded"), [(5, 2, 0), (12, 1, 1), (11, 2, 5), (6, 3, 1)])
def test_a_window_that_an_epoch_ends_keeps_what_it_has_or_begins_again(tmp_path: Path, steps: int, epochs: int, recorded: int):
    """It begins after ten steps, and its first step warms up."""
    train(tmp_path, Loader(steps), window=5, epochs=epochs)
    counts = [row["calls"] for row in profiling.read_operators(tmp_path) if row["name"] == "aten::convolution_backward"]
    assert counts == ([2 * recorded] if recorded else [])


def test_a_trace_stays_under_its_limit(tmp_path: Path):
    events = [{"ph": "M", "name": "process_name"}] + [{"ph": "X", "name": f"op{i * 7919}", "dur": i} for i in range(5000)]
    path = tmp_path / "0-algo-1_trace.gz"
    with gzip.open(path, "wt") as stored:
        json.dump({"traceEvents": events}, stored)
    operator_window.shorten_trace(path, 10_000)
    assert path.stat().st_size <= 10_000
    with gzip.open(path, "rt") as stored:
        kept = json.load(stored)["traceEvents"]
    assert kept[0]["ph"] == "M"
    assert min(event["dur"] for event in kept[1:]) > 2000, "the longest are kept"


def test_the_configuration_knows_the_window():
    assert from_mapping({"profile_steps": "0"}).profile_steps == 0
    with pytest.raises(ConfigError, match="profile_steps"):
        from_mapping({"profile_steps": "-1"})


def sampled(root: Path, seconds: float, interval: float = 0.05) -> list[dict]:
    with profiling.SystemSampler(root, interval=interval):
        time.sleep(seconds)
    return profiling.read_system(root)


def test_gpus_are_read_through_nvml_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvml(monkeypatch, lambda s: (37, 25), None, lambda s: (100, 50))
    events = [event for event in sampled(tmp_path, 0.3) if event["Type"] == "gpu"]
    seen = {(event["Name"], event["Dimension"]): event["Value"] for event in events}
    assert seen == {
        ("gpu0", "GPUUtilization"): 37, ("gpu0", "GPUMemoryUtilization"): 25,
        ("gpu2", "GPUUtilization"): 100, ("gpu2", "GPUMemoryUtilization"): 50,
    }  # fmt: skip


def test_without_a_driver_or_its_library_there_are_no_gpu_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    import pynvml

    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert {event["Type"] for event in sampled(tmp_path / "a", 0.2)} == {"cpu", "memory", "i/o", "network", "process"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert {event["Type"] for event in sampled(tmp_path / "b", 0.2)} == {"cpu", "memory", "i/o", "network", "process"}
    assert capfd.readouterr() == ("", "")


def _use_of(folder: Path, core: int) -> list[float]:
    events = profiling.read_system(folder)
    return [e["Value"] for e in events if e["Name"] == f"cpu{core}" and e["Dimension"] == "CPUUtilization"]


BUSY = """
import os, sys, time
from pathlib import Path
from classifier import profiling
core, folder = min(os.sched_getaffinity(0)), Path(sys.argv[1])
with profiling.SystemSampler(folder, interval=0.2):
    os.sched_setaffinity(0, {core})
    started, seen = time.monotonic(), False
    # Where others are busy too, the sampler's turn comes late.
    while not seen and time.monotonic() < started + 20:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            pass
        seen = any(e["Name"] == f"cpu{core}" for e in profiling.read_system(folder))
"""


def test_a_busy_core_is_seen_busy(tmp_path: Path):
    """In a process of its own: the demand is that of all its threads, and other tests leave some behind."""
    environment = os.environ | {"PYTHONPATH": str(Path(profiling.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", BUSY, str(tmp_path)], env=environment, check=True)
    events, values = profiling.read_system(tmp_path), _use_of(tmp_path, min(os.sched_getaffinity(0)))
    assert max(values) > 80
    wanted = [e["Value"] * (os.cpu_count() or 1) for e in events if e["Name"] == "JobCPUDemand"]
    assert 80 < max(wanted) < 250, "percent of a core: one thread that never sleeps"


def test_a_late_sample_puts_off_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Samples that made up for it were a millisecond apart: a job was said to want 24 cores of 2."""
    import psutil

    memory, late = psutil.virtual_memory, iter((0.0, 0.35))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: (time.sleep(next(late, 0.0)), memory())[1])
    stamps = sorted({event["Timestamp"] for event in sampled(tmp_path, 1.5, interval=0.1)})
    gaps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    assert max(gaps) > 0.35, "one was late"
    assert min(gaps) > 0.04, "half an interval at least"


def test_a_clock_that_jumps_moves_stamps_and_no_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, started = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (time.monotonic() - started > 0.3))
    received = iter(range(0, 10**9, 1000))
    import psutil

    monkeypatch.setattr(psutil, "net_io_counters", lambda: SimpleNamespace(bytes_recv=next(received), bytes_sent=0))
    events = sampled(tmp_path, 0.8, interval=0.1)
    stamps = [event["Timestamp"] for event in events]
    assert max(stamps) - min(stamps) > 3000, "the clock did jump"
    rates = [event["Value"] for event in events if event["Name"] == "ReceiveBytesPerSecond"]
    assert all(1000 < rate < 100_000 for rate in rates), "1000 bytes in about 0.1 s"


def test_a_timeline_keeps_its_durations_when_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    timeline, real = profiling.StepTimeline(tmp_path), time.time_ns
    timeline.mode("train")
    for step in range(4):
        monkeypatch.setattr(time, "time_ns", lambda back=step: real() - back * 3600 * 10**9)
        for phase in profiling.PHASES:
            time.sleep(0.001)
            timeline.mark(phase)
        timeline.flush()
    timeline.close()
    assert all(0.001 <= row["duration"] < 0.5 for row in profiling.read_steps(tmp_path))


def test_pauses_between_stretches_of_training_belong_to_no_phase(tmp_path: Path):
    timeline = profiling.StepTimeline(tmp_path)
    for _ in range(2):
        timeline.mode("train")
        for phase in profiling.PHASES:
            timeline.mark(phase)
        timeline.mode("eval")
        timeline.mark("Forward")
        time.sleep(0.2)
    timeline.close()
    rows = profiling.read_steps(tmp_path)
    assert len(rows) == 8
    assert sum(row["duration"] for row in rows) < 0.15


def test_on_a_gpu_the_device_stamps_the_phases_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The host queues a step at once; the device works 1, 2, 3 and 4 ms at its phases."""
    device = {"ms": 0.0, "synchronised": 0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device["ms"]

        def synchronize(self) -> None:
            device["synchronised"] += 1

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timeline = profiling.StepTimeline(tmp_path, on_gpu=True)
    timeline.mode("train")
    for _ in range(3):
        for work, phase in enumerate(profiling.PHASES, start=1):
            device["ms"] += work
            timeline.mark(phase)
    assert device["synchronised"] == 0, "marks make nobody wait"
    timeline.close()
    rows = profiling.read_steps(tmp_path)
    assert [round(row["duration"] * 1000) for row in rows] == [1, 2, 3, 4] * 3


def test_marks_and_samples_are_cheap_and_measured(tmp_path: Path):
    timeline = profiling.StepTimeline(tmp_path)
    timeline.mode("train")
    began = time.thread_time()
    for _ in range(5000):
        for phase in profiling.PHASES:
            timeline.mark(phase)
    timeline.close()
    assert (time.thread_time() - began) / 5000 < 200e-6, "seconds of CPU time for a step, files included"
    sampled(tmp_path, 1.2, interval=0.5)
    shares = profiling.read_overhead(tmp_path)
    assert 0 < shares["sampler_share"] < 0.1
    assert shares["phases_share"] > 0.3, "nothing but marks was timed"


def test_overhead_is_merged_and_told_over_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert profiling.read_overhead(tmp_path) == {}
    profiling.write_overhead(tmp_path, hook_share=0.01)
    profiling.write_overhead(tmp_path, sampler_share=0.002, hook_share=0.02)
    monkeypatch.setenv("SM_CURRENT_HOST", "algo-2")
    profiling.write_overhead(tmp_path, sampler_share=0.004)
    assert profiling.read_overhead(tmp_path) == {"hook_share": 0.02, "sampler_share": 0.004}
    assert json.loads((tmp_path / "overhead.json").read_text()) == {"hook_share": 0.02, "sampler_share": 0.002}


def test_a_full_disk_ends_the_sampling_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "system").write_text("a file where a folder is wanted")
    with profiling.SystemSampler(tmp_path, interval=0.05):
        time.sleep(0.3)
    assert "system metrics end here" in capsys.readouterr().out


def test_readers_take_absent_and_half_written_files(tmp_path: Path, profile: Path):
    assert profiling.read_system(tmp_path) == profiling.read_steps(tmp_path) == profiling.read_operators(tmp_path) == []
    folder = tmp_path / "system" / "incremental" / "2026010100"
    folder.mkdir(parents=True)
    line = json.dumps(profiling.read_system(profile)[0])
    (folder / "1767225600.algo-1.json").write_text(f"{line}\n{line[:40]}")
    assert len(profiling.read_system(tmp_path)) == 1


def test_the_host_names_the_node(monkeypatch: pytest.MonkeyPatch):
    for host, node in {"algo-2": "algo-2", "localhost": "algo-1"}.items():
        monkeypatch.setenv("SM_CURRENT_HOST", host)
        assert profile_layout.node_id() == node
