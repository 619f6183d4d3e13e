"""A SageMaker that knows one run's jobs, and the files of a run, for the tests of the report."""

from __future__ import annotations

import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

from classifier import reporting
from model_fakes import picture

STARTED = dt.datetime(2026, 1, 1, 12, 0, 0, tzinfo=dt.UTC)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "=cmd()|' /C calc'!A0",
    "abc\u202egnp.exe",
    "line\none\r\ntwo\ttab",
    "</script><script>alert(3)</script>",
    "%{x} $a^2$ &lt;b&gt; <b>bold</b>",
    "long " * 60,
    "@SUM(A1)",
    "Grüße 犬",
)


class FakeSageMaker:
    """The calls that the report makes, answered as SageMaker does."""

    def __init__(self, trials: int = 6, instance: str = "ml.m5.xlarge") -> None:
        self.trials, self.instance = trials, instance

    def describe_hyper_parameter_tuning_job(self, **_: str) -> dict[str, Any]:
        return {
            "HyperParameterTuningJobStatus": "Completed",
            "HyperParameterTuningJobConfig": {
                "Strategy": "Bayesian",
                "HyperParameterTuningJobObjective": {"MetricName": "best_valid_top1", "Type": "Maximize"},
                "ParameterRanges": {
                    "ContinuousParameterRanges": [{"Name": "learning_rate", "MinValue": "0.01", "MaxValue": "0.1"}]
                },
            },
            "TrainingJobDefinition": {"ResourceConfig": {"InstanceType": self.instance, "InstanceCount": 1}},
        }

    def get_paginator(self, name: str) -> FakeSageMaker:
        assert name == "list_training_jobs_for_hyper_parameter_tuning_job"
        return self

    def paginate(self, **_: str) -> list[dict[str, Any]]:
        return [{"TrainingJobSummaries": [self._trial(number) for number in range(self.trials)]}]

    def _trial(self, number: int) -> dict[str, Any]:
        job: dict[str, Any] = {
            "TrainingJobName": f"trial-{number}",
            "TrainingJobStatus": ("Completed", "Completed", "Stopped", "Failed")[number % 4],
            "TunedHyperParameters": {
                "learning_rate": str(0.01 * 1.5**number),
                "batch_size": ('"64"', '"128"')[number % 2],
                "optimizer": ("sgd", "adamw")[number // 2 % 2],
            },
            "TrainingStartTime": STARTED,
            "TrainingEndTime": STARTED + dt.timedelta(seconds=60 + number),
        }
        if number % 4 != 3:
            job["FinalHyperParameterTuningJobObjectiveMetric"] = {
                "MetricName": "best_valid_top1",
                "Value": 0.7 + 0.02 * (number % 5),
            }
        return job

    def describe_training_job(self, **_: str) -> dict[str, Any]:
        return {
            "TrainingJobStatus": "Completed",
            "BillableTimeInSeconds": 360,
            "ResourceConfig": {"InstanceType": self.instance, "InstanceCount": 1},
            "AlgorithmSpecification": {"TrainingImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cpu"},
            "HyperParameters": {
                "recipe": '"head"',
                "image_size": "224",
                "learning_rate": "0.05",
                "epochs": "6",
                "sagemaker_submit_directory": "s3://assets/0123abcd/sourcedir.tar.gz",
            },
            "FinalMetricDataList": [{"MetricName": "valid_top1", "Value": 0.8}],
        }

    def describe_processing_job(self, ProcessingJobName: str) -> dict[str, Any]:  # noqa: N803
        script = "evaluate.py" if "eval" in ProcessingJobName else "prepare.py"
        return {
            "ProcessingJobStatus": "Completed",
            "ProcessingResources": {"ClusterConfig": {"InstanceType": self.instance, "InstanceCount": 1}},
            "AppSpecification": {
                "ImageUri": "image",
                "ContainerEntrypoint": ["python3", f"/opt/ml/processing/input/code/{script}"],
                "ContainerArguments": ["--code_hash", "c0de", "--run", "r"],
            },
            "ProcessingStartTime": STARTED,
            "ProcessingEndTime": STARTED + dt.timedelta(seconds=90),
        }


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def prepared(names: tuple[str, ...]) -> dict[str, Any]:
    """prepare/report.json with refused files that have the names of the classes."""
    return {
        "source": "s3://pictures/" + names[0],
        "split": "given",
        "notes": [f"a note on {names[0]}"],
        "classes": [{"folder": name, "train": 20 + n, "valid": 4, "test": 5} for n, name in enumerate(names)],
        "num_quarantined": len(names),
        "quarantined": [
            {"file": f"train/{n}", "kind": "quarantined", "split": "train", "reason": "damaged picture"} for n in names
        ],
        "quarantine_reasons": {"damaged picture": len(names)},
        "num_duplicates": 1,
        "num_leaks": 1,
        "duplicates": [{"file": f"train/{names[0]}", "kind": "leak", "split": "train", "same_as": f"test/{names[-1]}"}],
        "picture_size": 256,
    }


def evaluated(names: tuple[str, ...]) -> dict[str, Any]:
    """evaluation/evaluation.json: every class is taken for the next one once."""
    count = len(names)
    table = [[4 if i == j else int(j == (i + 1) % count) for j in range(count)] for i in range(count)]
    bins = [{"count": 10, "confidence": 0.1 + 0.2 * n, "accuracy": 0.08 + 0.19 * n} for n in range(5)]
    pairs = [
        {
            "true": 0, "predicted": 1, "expected": names[0], "said": names[1], "count": 1, "share": 0.2,
            "examples": [{"file": "examples/0-1-0.jpg", "probability": 0.9}],
            "references": {"expected": "examples/0-0-0.jpg", "said": None},
        }
    ]  # fmt: skip
    test = {
        "top1": 0.8, "top1_interval": [0.75, 0.85], "top5": 1.0, "top5_interval": [1.0, 1.0],
        "num_pictures": 5 * count, "ece_before": 0.1, "ece_after": 0.02,
    }  # fmt: skip
    return {
        "test": test,
        "macro": {"precision": 0.8, "recall": 0.8, "f1": 0.8, "num_classes": count},
        "per_class": [{"label": n, "num_pictures": 5, "precision": 0.8, "recall": 0.8, "f1": 0.8} for n in names],
        "confusion": table,
        "confused_pairs": pairs,
        "reliability": {"before": bins, "after": bins},
        "confident_errors": [{"expected": names[0], "said": names[1], "probability": 0.9}],
        "classes": list(names),
        "champion": None,
        "latency_ms": {"p50": 9.5},
    }


def history(epochs: int = 6) -> list[dict[str, float]]:
    """The epochs of a training that goes well."""
    return [
        {
            "epoch": n + 1, "train_loss": 2 * math.exp(-n / 2), "train_top1": 1 - 0.7 * math.exp(-n / 2),
            "valid_loss": 2.1 * math.exp(-n / 2), "valid_top1": 1 - 0.72 * math.exp(-n / 2),
        }
        for n in range(epochs)
    ]  # fmt: skip


def write_profile(root: Path, nodes: tuple[str, ...] = ("algo-1",), *, steps: int = 40, gpu: bool = False) -> None:
    """System metrics and step phases in the profiler's layout."""
    begin = 1_700_000_000.0
    for node in nodes:
        lines = []
        for tick in range(60):
            kinds = [("cpu", "cpu0", "CPUUtilization", 60 + tick % 20), ("memory", "MemoryUsedPercent", "", 40)]
            kinds.append(("cpu", "cpu0", "I/OWaitPercentage", 0))
            kinds += [("gpu", "gpu0", "GPUUtilization", 80), ("gpu", "gpu0", "GPUMemoryUtilization", 30)] if gpu else []
            for kind, name, dimension, value in kinds:
                event = {"Type": kind, "Name": name, "Dimension": dimension, "Value": value, "NodeId": node}
                lines.append(json.dumps({**event, "Timestamp": begin + tick / 2}))
        path = root / "system" / "incremental" / "2023111422" / f"1700000000.{node}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        events: list[dict[str, Any]] = [
            {
                "name": "process_name",
                "ph": "M",
                "pid": 0,
                "args": {"name": "x", "start_time_since_epoch_in_micros": int(begin * 1e6)},
            }
        ]
        for step in range(steps):
            for number, (phase, share) in enumerate((("DataLoading", 1), ("Forward", 4), ("Backward", 6), ("Optimizer", 1))):
                start = step * 600_000 + number * 100_000
                event = {"name": phase, "pid": number, "tid": 0, "ph": "X", "ts": start, "dur": share * 10_000}
                events.append({**event, "args": {"step_num": str(step)}})
        write_json(root / "framework" / "pevents" / "2023111422" / f"1700000030000000_0-{node}_pythontimeline.json", events)


def write_run(root: Path, names: tuple[str, ...] = ("beagle", "boxer", "collie"), **profile: Any) -> Path:
    """A run's folder as the jobs leave it, without tensors."""
    write_json(root / "prepare" / "report.json", prepared(names))
    counts = {"train": 60, "valid": 12, "test": 15}
    write_json(root / "prepare" / "result.json", {"dataset_hash": "d00d", "num_pictures": counts, "source": "x"})
    write_json(root / "evaluation" / "evaluation.json", evaluated(names))
    write_json(root / "evaluation" / "training.json", {"started": 1_699_999_990.0, "batch_size": 64, "history": history()})
    (root / "evaluation" / "examples").mkdir()
    for name in ("0-1-0", "0-0-0"):
        (root / "evaluation" / "examples" / f"{name}.jpg").write_bytes(picture(1, kind="JPEG"))
    write_profile(root / "profiler-output", **profile)
    return root


def flags(base: Path, **changes: Any) -> reporting.ReportFlags:
    """Flags of report.py with every job named, on ``base``/run."""
    known: dict[str, Any] = {
        "run": "r",
        "run_dir": str(base / "run"),
        "report": str(base / "report"),
        "rules": str(base / "rules"),
        "tuning_job": "tuning",
        "training_job": "training",
        "processing_jobs": "prep-1,none,,eval-1",
    }
    return reporting.ReportFlags(**{**known, **changes})
