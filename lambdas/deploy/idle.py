"""Removes a real-time endpoint that nobody has asked for hours: called by a schedule. The next request brings it back.

Configuration, model and champion.json stay. An endpoint that an execution is about to change is left alone.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from typing import Any

import boto3
from botocore.exceptions import ClientError
from clean_up import is_missing

log = logging.getLogger("idle")
log.setLevel(os.environ.get("LOG_LEVEL", "INFO"))

PERIOD_S = 300


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"asleep": bool, "why": str}``."""
    now = datetime.datetime.now(datetime.UTC)
    found = decide(now, datetime.timedelta(hours=float(os.environ["IDLE_HOURS"])))
    if found["asleep"]:
        remove(boto3.client("sagemaker"), os.environ["ENDPOINT_NAME"])
    log.info(json.dumps(found))
    return found


def decide(now: datetime.datetime, idle: datetime.timedelta) -> dict[str, Any]:
    """Whether the endpoint may go, and why."""
    name = os.environ["ENDPOINT_NAME"]
    try:
        endpoint = boto3.client("sagemaker").describe_endpoint(EndpointName=name)
    except ClientError as error:
        if is_missing(error):
            return {"asleep": False, "why": "There is no endpoint."}
        raise
    if endpoint["EndpointStatus"] != "InService":
        return {"asleep": False, "why": f"The endpoint is {endpoint['EndpointStatus']}."}
    if now - endpoint["LastModifiedTime"] < idle:
        return {"asleep": False, "why": f"The endpoint was changed at {endpoint['LastModifiedTime']:%Y-%m-%d %H:%M}."}
    running = boto3.client("stepfunctions").list_executions(
        stateMachineArn=os.environ["STATE_MACHINE_ARN"], statusFilter="RUNNING", maxResults=1
    )
    if running["executions"]:
        return {"asleep": False, "why": "An execution is running."}
    asked = invocations(name, now - idle, now)
    if asked:
        return {"asleep": False, "why": f"{asked:.0f} requests since {now - idle:%Y-%m-%d %H:%M}."}
    return {"asleep": True, "why": f"No request since {now - idle:%Y-%m-%d %H:%M}."}


def invocations(name: str, start: datetime.datetime, end: datetime.datetime) -> float:
    """Requests to the endpoint in a time."""
    points = boto3.client("cloudwatch").get_metric_statistics(
        Namespace="AWS/SageMaker",
        MetricName="Invocations",
        Dimensions=[{"Name": "EndpointName", "Value": name}, {"Name": "VariantName", "Value": "main"}],
        StartTime=start,
        EndTime=end,
        # A call answers 1,440 points at most: hours for a month, minutes for a day.
        Period=PERIOD_S if end - start <= datetime.timedelta(days=4) else 3600,
        Statistics=["Sum"],
    )["Datapoints"]
    return float(sum(point["Sum"] for point in points))


def remove(client: Any, name: str) -> None:
    """Stop scaling, then delete the endpoint."""
    try:
        boto3.client("application-autoscaling").deregister_scalable_target(
            ServiceNamespace="sagemaker",
            ResourceId=f"endpoint/{name}/variant/main",
            ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        )
    except ClientError as error:
        if error.response["Error"]["Code"] != "ObjectNotFoundException":
            raise
    client.delete_endpoint(EndpointName=name)
