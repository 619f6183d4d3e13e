"""CloudFormation's custom resource: on deletion of the stack, removes what executions made at run time."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.exceptions import ClientError
from clean_up import is_missing

log = logging.getLogger("on_destroy")
log.setLevel("INFO")

DEADLINE_S = 780
PAUSE_S = 5


def handle(event: dict[str, Any], context: Any) -> None:
    """Answers CloudFormation in every case: without an answer a deletion hangs for an hour."""
    status, reason = "SUCCESS", ""
    try:
        if event["RequestType"] == "Delete":
            remove_all(event["ResourceProperties"])
    except Exception as error:
        log.exception("clean-up failed")
        status, reason = "FAILED", f"{error} Remove it by hand in the SageMaker console, then delete the stack again."
    _respond(event, status, reason)


def remove_all(properties: dict[str, str]) -> None:
    """Stop running executions; then the endpoint, configurations and models; packages and logs unless data are to be kept."""
    prefix = properties["Prefix"]
    deadline = time.monotonic() + DEADLINE_S
    stop_executions(boto3.client("stepfunctions"), properties["StateMachineArn"], deadline)
    client = boto3.client("sagemaker")
    delete_endpoint(client, prefix, deadline)
    for name in _names(client, "list_endpoint_configs", "EndpointConfigs", "EndpointConfigName", prefix):
        _ignore_missing(client.delete_endpoint_config, EndpointConfigName=name)
    for name in _names(client, "list_models", "Models", "ModelName", prefix):
        _ignore_missing(client.delete_model, ModelName=name)
    if properties.get("DeleteData") == "true":
        for arn in _packages(client, prefix):
            _ignore_missing(client.delete_model_package, ModelPackageName=arn)
        # SageMaker makes it with the endpoint and keeps it for ever; the groups of its jobs belong to the whole account.
        _ignore_missing(boto3.client("logs").delete_log_group, logGroupName=f"/aws/sagemaker/Endpoints/{prefix}")


def stop_executions(client: Any, machine: str, deadline: float) -> None:
    """Stop what runs; Step Functions stops its jobs."""
    while True:
        try:
            running = client.list_executions(stateMachineArn=machine, statusFilter="RUNNING")["executions"]
        except ClientError as error:
            if "DoesNotExist" in error.response["Error"]["Code"]:
                return
            raise
        for execution in running:
            client.stop_execution(executionArn=execution["executionArn"], cause="The stack is being deleted.")
        if not running:
            return
        _wait(deadline, f"{len(running)} executions to stop")


def delete_endpoint(client: Any, name: str, deadline: float) -> None:
    """Delete the endpoint and wait until it is gone. One in motion is waited for: SageMaker refuses to delete it."""
    while True:
        try:
            status = client.describe_endpoint(EndpointName=name)["EndpointStatus"]
            if status not in {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}:
                # Where its machines are scaled SageMaker ends that itself, with this role's right to do so.
                client.delete_endpoint(EndpointName=name)
        except ClientError as error:
            if is_missing(error):
                return
            # SageMaker may begin a change of its own after our look.
            if "in-progress" not in error.response["Error"].get("Message", ""):
                raise
        _wait(deadline, f"endpoint {name} to go")


def _names(client: Any, operation: str, field: str, name: str, prefix: str) -> Iterator[str]:
    """Names of this stage's resources of one kind: ``<prefix>-<16 hex digits>``."""
    pages = client.get_paginator(operation).paginate(NameContains=f"{prefix}-")
    # The digits matter: with a stack ``dogs-dev`` beside a stack ``dogs-dev-b``, one name is the start of the other's.
    ours = re.compile(rf"{re.escape(prefix)}-[0-9a-f]{{16}}")
    yield from [str(item[name]) for page in pages for item in page[field] if ours.fullmatch(str(item[name]))]


def _packages(client: Any, group: str) -> list[str]:
    """ARNs of the group's model packages."""
    try:
        pages = client.get_paginator("list_model_packages").paginate(ModelPackageGroupName=group)
        return [str(item["ModelPackageArn"]) for page in pages for item in page["ModelPackageSummaryList"]]
    except ClientError as error:
        if is_missing(error) or "does not exist" in error.response["Error"].get("Message", ""):
            return []
        raise


def _ignore_missing(call: Any, **arguments: str) -> None:
    """Call; what is already gone is fine."""
    try:
        call(**arguments)
    except ClientError as error:
        if not is_missing(error):
            raise


def _wait(deadline: float, what: str) -> None:
    """Pause, unless the Lambda's time is nearly over."""
    if time.monotonic() + PAUSE_S > deadline:
        raise TimeoutError(f"Waited {DEADLINE_S} s for {what}.")
    time.sleep(PAUSE_S)


def _respond(event: dict[str, Any], status: str, reason: str) -> None:
    """CloudFormation's protocol: a PUT to the address it gave."""
    body = json.dumps(
        {
            "Status": status,
            "Reason": reason[:1000] or "Done",
            "PhysicalResourceId": event.get("PhysicalResourceId") or f"{event['ResourceProperties']['Prefix']}-runtime",
            "StackId": event["StackId"],
            "RequestId": event["RequestId"],
            "LogicalResourceId": event["LogicalResourceId"],
        }
    ).encode()
    request = urllib.request.Request(event["ResponseURL"], data=body, method="PUT", headers={"Content-Type": ""})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30):  # noqa: S310 - the address comes from CloudFormation
        pass
