"""Stops and removes what an execution made and nobody uses: after a failure all of it, otherwise what was made twice.

A call whose answer is lost is made again under another name, and what the first one made is known to nobody. Everything that an
execution makes carries the same 8 hex digits in its name, so it is found all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import boto3
from botocore.exceptions import ClientError


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"run": "<8 hex digits>"}`` in, the names of what was stopped and removed out. What serves is kept.

    ``endpoint_config`` and ``model`` are empty, or name what is kept whatever serves by now: a model that another execution has
    just replaced is what the endpoint goes back to when the other one fails.
    """
    key = str(event.get("run") or "")
    if not re.fullmatch(r"[0-9a-f]{8}", key):
        raise ValueError(f"run is {key!r}; expected the 8 hex digits of an execution: nothing was removed.")
    client = boto3.client("sagemaker")
    stopped = stop_jobs(client, key)
    kept = {str(event.get("endpoint_config") or ""), str(event.get("model") or ""), *serving(client)}
    configs = [name for name in endpoint_configs(client, key) if name not in kept]
    removed = [name for name in configs if _done(client.delete_endpoint_config, EndpointConfigName=name)]
    others = [name for name in models(client, key) if name not in kept]
    removed += [name for name in others if _done(client.delete_model, ModelName=name)]
    return {"stopped": stopped, "removed": removed}


def stop_jobs(client: Any, key: str) -> list[str]:
    """Stop the execution's jobs that run; a tuning job stops its trials."""
    tuning = [
        name for name in tuning_jobs(client, key) if _done(client.stop_hyper_parameter_tuning_job, HyperParameterTuningJobName=name)
    ]
    training = [name for name in training_jobs(client, key) if _done(client.stop_training_job, TrainingJobName=name)]
    processing = [name for name in processing_jobs(client, key) if _done(client.stop_processing_job, ProcessingJobName=name)]
    return [*tuning, *training, *processing]


def tuning_jobs(client: Any, key: str) -> Iterator[str]:
    """Names of the execution's tuning jobs that run."""
    pages = client.get_paginator("list_hyper_parameter_tuning_jobs").paginate(NameContains=key, StatusEquals="InProgress")
    yield from _ours(
        (one["HyperParameterTuningJobName"] for page in pages for one in page["HyperParameterTuningJobSummaries"]), key
    )


def training_jobs(client: Any, key: str) -> Iterator[str]:
    """Names of the execution's training jobs that run, trials aside."""
    pages = client.get_paginator("list_training_jobs").paginate(NameContains=key, StatusEquals="InProgress")
    yield from _ours((one["TrainingJobName"] for page in pages for one in page["TrainingJobSummaries"]), key)


def processing_jobs(client: Any, key: str) -> Iterator[str]:
    """Names of the execution's processing jobs that run."""
    pages = client.get_paginator("list_processing_jobs").paginate(NameContains=key, StatusEquals="InProgress")
    yield from _ours((one["ProcessingJobName"] for page in pages for one in page["ProcessingJobSummaries"]), key)


def endpoint_configs(client: Any, key: str) -> Iterator[str]:
    """Names of the execution's endpoint configurations."""
    pages = client.get_paginator("list_endpoint_configs").paginate(NameContains=key)
    yield from _ours((one["EndpointConfigName"] for page in pages for one in page["EndpointConfigs"]), key)


def models(client: Any, key: str) -> Iterator[str]:
    """Names of the execution's models."""
    pages = client.get_paginator("list_models").paginate(NameContains=key)
    yield from _ours((one["ModelName"] for page in pages for one in page["Models"]), key)


def _ours(names: Iterator[str], key: str) -> Iterator[str]:
    """``<prefix>-[<kind>-]<key and 8 more hex digits>``: the digits might be in somebody else's name too."""
    ours = re.compile(rf"{re.escape(os.environ['ENDPOINT_NAME'])}-(?:[a-z]+-)?{key}[0-9a-f]{{8}}")
    yield from [name for name in names if ours.fullmatch(name)]


def serving(client: Any) -> set[str]:
    """Names of the configurations with which the endpoint serves or is about to, and of their models; none without an endpoint."""
    try:
        found = client.describe_endpoint(EndpointName=os.environ["ENDPOINT_NAME"])
    except ClientError as error:
        if is_missing(error):
            return set()
        raise
    if found.get("EndpointStatus") == "Deleting":
        return set()
    # Until an update has ended, the endpoint's own configuration is the old one.
    pending = found.get("PendingDeploymentSummary", {}).get("EndpointConfigName")
    configs = {str(found["EndpointConfigName"]), *([str(pending)] if pending else [])}
    return configs.union(*(models_of(client, name) for name in sorted(configs)))


def models_of(client: Any, config: str) -> set[str]:
    """Names of an endpoint configuration's models; none where somebody has deleted it."""
    try:
        found = client.describe_endpoint_config(EndpointConfigName=config)
    except ClientError as error:
        if is_missing(error):
            return set()
        raise
    return {str(variant["ModelName"]) for variant in found["ProductionVariants"]}


def is_missing(error: ClientError) -> bool:
    """Whether SageMaker says that a resource does not exist."""
    return "ould not find" in error.response["Error"].get("Message", "") or "NotFound" in error.response["Error"]["Code"]


def _done(call: Callable[..., Any], **arguments: str) -> bool:
    """Call; what is already gone or has ended counts as not done."""
    try:
        call(**arguments)
    except ClientError as error:
        if is_missing(error) or error.response["Error"]["Code"] == "ValidationException":
            return False
        raise
    return True
