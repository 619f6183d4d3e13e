"""New files under ``incoming/`` start one execution, once no further file has come for a while.

Each file pushes the one appointment further into the future: a schedule that starts the state machine and then goes.
https://docs.aws.amazon.com/scheduler/latest/UserGuide/managing-schedule-delete.html
"""

from __future__ import annotations

import datetime
import json
import logging
import os
from typing import Any

import boto3
from botocore.exceptions import ClientError

log = logging.getLogger("incoming")
log.setLevel(os.environ.get("LOG_LEVEL", "INFO"))

NAME = "incoming"


def handle(event: dict[str, Any], context: Any) -> dict[str, str]:
    """EventBridge's ``Object Created`` of the data bucket in, the time of the execution out."""
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=int(os.environ["QUIET_S"]))
    push(boto3.client("scheduler"), when)
    log.info(json.dumps({"starts": f"{when:%Y-%m-%dT%H:%M:%SZ}"}))
    return {"starts": f"{when:%Y-%m-%dT%H:%M:%SZ}"}


def push(client: Any, when: datetime.datetime) -> None:
    """Make the appointment, or move it."""
    appointment = {
        "Name": NAME,
        "GroupName": os.environ["SCHEDULE_GROUP"],
        "ScheduleExpression": f"at({when:%Y-%m-%dT%H:%M:%S})",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "ActionAfterCompletion": "DELETE",
        "Target": {
            "Arn": os.environ["STATE_MACHINE_ARN"],
            "RoleArn": os.environ["SCHEDULE_ROLE_ARN"],
            "Input": "{}",
        },
    }
    try:
        client.update_schedule(**appointment)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ResourceNotFoundException":
            raise
        _make(client, appointment)


def _make(client: Any, appointment: dict[str, Any]) -> None:
    """A file that came at the same moment may have made it already: then the appointment is as late as it should be."""
    try:
        client.create_schedule(**appointment)
    except ClientError as error:
        if error.response["Error"]["Code"] != "ConflictException":
            raise
