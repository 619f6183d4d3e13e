"""What SageMaker knows of a run's jobs: status, instance, duration, arguments; and what they cost by the list."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from classifier.prices import cost_usd

Client = Callable[[], Any]
Facts = dict[str, Any]


def _named(job: str) -> bool:
    return bool(job) and job != "none"


def _seconds(job: Facts, start: str, end: str) -> float | None:
    first, last = job.get(start), job.get(end)
    return (last - first).total_seconds() if first and last else None


def _number(text: object) -> float | None:
    try:
        return float(str(text).strip('"'))
    except ValueError:
        return None


def read_tuning(client: Client, tuning_job: str) -> tuple[list[Facts], Facts, str]:
    """``(trials, best first; the tuning's own facts; note)``; the note says why there are none."""
    if not _named(tuning_job):
        return [], {}, "no tuning job was named"
    try:
        service = client()
        tuning = service.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=tuning_job)
        pages = service.get_paginator("list_training_jobs_for_hyper_parameter_tuning_job")
        found = [
            job for page in pages.paginate(HyperParameterTuningJobName=tuning_job) for job in page.get("TrainingJobSummaries", [])
        ]
        trials = [_trial(job) for job in found]
    except Exception as problem:
        return [], {}, f"tuning job {tuning_job!r} could not be read ({type(problem).__name__}: {problem})"
    config = tuning.get("HyperParameterTuningJobConfig", {})
    resources = tuning.get("TrainingJobDefinition", {}).get("ResourceConfig", {})
    facts = {
        "name": tuning_job,
        "status": tuning.get("HyperParameterTuningJobStatus"),
        "strategy": config.get("Strategy"),
        "objective": config.get("HyperParameterTuningJobObjective", {}).get("MetricName"),
        "ranges": config.get("ParameterRanges", {}),
        "instance": resources.get("InstanceType"),
        "count": resources.get("InstanceCount", 1),
    }
    return sorted(trials, key=lambda row: -(row["objective"] if row["objective"] is not None else -1.0)), facts, ""


def _trial(job: Facts) -> Facts:
    tuned = {key: str(value).strip('"') for key, value in job.get("TunedHyperParameters", {}).items()}
    return {
        "name": job["TrainingJobName"],
        "status": job["TrainingJobStatus"],
        "stopped_early": job["TrainingJobStatus"] in ("Stopped", "Stopping"),
        "failure": job.get("FailureReason", ""),
        "hyperparameters": tuned,
        "learning_rate": _number(tuned.get("learning_rate")),
        "batch_size": _number(tuned.get("batch_size")),
        "objective": _number(job.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value")),
        "seconds": _seconds(job, "TrainingStartTime", "TrainingEndTime"),
    }


def read_training(client: Client, training_job: str) -> tuple[Facts, str]:
    """``(facts of the training job, note)``."""
    if not _named(training_job):
        return {}, "no training job was named"
    try:
        job = client().describe_training_job(TrainingJobName=training_job)
    except Exception as problem:
        return {}, f"training job {training_job!r} could not be read ({type(problem).__name__}: {problem})"
    given = {key: str(value).strip('"') for key, value in job.get("HyperParameters", {}).items()}
    resources = job.get("ResourceConfig", {})
    billable = job.get("BillableTimeInSeconds")
    facts = {
        "name": training_job,
        "status": job.get("TrainingJobStatus"),
        "failure": job.get("FailureReason", ""),
        "billable_seconds": billable if billable is not None else _seconds(job, "TrainingStartTime", "TrainingEndTime"),
        "instance": resources.get("InstanceType"),
        "count": resources.get("InstanceCount", 1),
        "spot": bool(job.get("EnableManagedSpotTraining")),
        "image": job.get("AlgorithmSpecification", {}).get("TrainingImage"),
        "code": given.get("sagemaker_submit_directory"),
        "hyperparameters": {key: value for key, value in given.items() if not key.startswith("sagemaker_")},
        "metrics": {metric["MetricName"]: metric["Value"] for metric in job.get("FinalMetricDataList", [])},
    }
    return facts, ""


def read_processing(client: Client, names: list[str]) -> tuple[list[Facts], list[str]]:
    """``(facts of every processing job, notes)``."""
    rows, notes = [], []
    for job_name in filter(_named, names):
        try:
            job = client().describe_processing_job(ProcessingJobName=job_name)
        except Exception as problem:
            notes.append(f"processing job {job_name!r} could not be read ({type(problem).__name__}: {problem})")
            continue
        cluster = job.get("ProcessingResources", {}).get("ClusterConfig", {})
        arguments = job.get("AppSpecification", {}).get("ContainerArguments", [])
        rows.append(
            {
                "name": job_name,
                "status": job.get("ProcessingJobStatus"),
                "failure": job.get("FailureReason", ""),
                "instance": cluster.get("InstanceType"),
                "count": cluster.get("InstanceCount", 1),
                "seconds": _seconds(job, "ProcessingStartTime", "ProcessingEndTime"),
                "script": _script(job.get("AppSpecification", {})),
                "image": job.get("AppSpecification", {}).get("ImageUri"),
                "arguments": _flags(arguments),
            }
        )
    return rows, notes


def _script(specification: Facts) -> str:
    words = [*specification.get("ContainerEntrypoint", []), *specification.get("ContainerArguments", [])]
    return next((word.rsplit("/", 1)[-1] for word in words if str(word).endswith(".py")), "")


def _flags(words: list[str]) -> dict[str, str]:
    return {flag.removeprefix("--"): value for flag, value in itertools.pairwise(words) if flag.startswith("--")}


def bill(processing: list[Facts], tuning: Facts, trials: list[Facts], training: Facts) -> list[Facts]:
    """One row a job: kind, name, status, instance, seconds, and the estimated cost or why there is none."""
    rows = [
        _priced(f"processing, {job['script'] or 'script not known'}", job, job.get("seconds"))
        for job in processing
    ]  # fmt: skip
    rows += [_priced("trial", {**tuning, **trial}, trial["seconds"]) for trial in trials]
    if training:
        rows.append(_priced("training", training, training.get("billable_seconds")))
    return rows


def _priced(kind: str, job: Facts, seconds: float | None) -> Facts:
    cost, why = cost_usd(job.get("instance"), seconds, int(job.get("count") or 1))
    if job.get("status") == "InProgress" and seconds is None:
        why = "it was running when the report was written"
    known = {key: job.get(key) for key in ("name", "status", "instance", "count")}
    return {"kind": kind, **known, "seconds": seconds, "cost_usd": cost, "why": why}
