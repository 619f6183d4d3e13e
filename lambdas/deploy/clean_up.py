"""Removes the model and endpoint configuration that a failed execution made: those named, and only if they do not serve."""

from __future__ import annotations

import os
from typing import Any

import boto3
from botocore.exceptions import ClientError


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"model", "endpoint_config"}`` in (empty when not made), the names of what was removed out."""
    client = boto3.client("sagemaker")
    made = {"endpoint_config": str(event.get("endpoint_config") or ""), "model": str(event.get("model") or "")}
    for kind, name in made.items():
        _check_name(kind, name)
    if made["endpoint_config"] and made["endpoint_config"] == serving_config(client):
        return {"removed": [], "kept": "The endpoint serves with this configuration."}
    calls = {
        "endpoint_config": lambda name: client.delete_endpoint_config(EndpointConfigName=name),
        "model": lambda name: client.delete_model(ModelName=name),
    }
    return {"removed": [name for kind, name in made.items() if name and _removed(calls[kind], name)]}


def _check_name(kind: str, name: str) -> None:
    """Refuse names that no execution of this stage can have made."""
    prefix = f"{os.environ['ENDPOINT_NAME']}-"
    if name and not name.startswith(prefix):
        raise ValueError(f"{kind} is {name!r}; expected a name that begins with {prefix!r}: nothing was removed.")


def serving_config(client: Any) -> str:
    """The configuration with which the endpoint serves or is about to; empty when there is no endpoint."""
    try:
        found = client.describe_endpoint(EndpointName=os.environ["ENDPOINT_NAME"])
        return "" if found.get("EndpointStatus") == "Deleting" else str(found["EndpointConfigName"])
    except ClientError as error:
        if is_missing(error):
            return ""
        raise


def is_missing(error: ClientError) -> bool:
    """Whether SageMaker says that a resource does not exist."""
    return "ould not find" in error.response["Error"].get("Message", "") or "NotFound" in error.response["Error"]["Code"]


def _removed(call: Any, name: str) -> bool:
    """Remove; already gone counts as not removed."""
    try:
        call(name)
    except ClientError as error:
        if is_missing(error):
            return False
        raise
    return True
