"""``make predict`` and ``make logs``: a deployed stage asked from the shell, with the shell's own AWS credentials.

They work on AWS, and on the local cloud through ``AWS_ENDPOINT_URL``. Addresses and secrets are looked up in the stack's outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from infra.config import FileContext, load

KINDS = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".bmp": "image/bmp",
         ".tif": "image/tiff", ".tiff": "image/tiff"}  # fmt: skip
MAX_WAIT_S = 900.0
"""How long a sleeping endpoint is waited for; a deployment takes five to ten minutes."""
LINES = 20
"""So many last lines of each job's log are shown."""
_JOBS = {
    "ProcessingJobName": ("/aws/sagemaker/ProcessingJobs", "/"),
    "TrainingJobName": ("/aws/sagemaker/TrainingJobs", "/"),
    # A trial's log stream begins with its tuning job's name.
    "HyperParameterTuningJobName": ("/aws/sagemaker/TrainingJobs", "-"),
}
"""Request field -> log group, and what follows the job's name in a log stream's."""


class ClientSideError(Exception):
    """Something the user can mend; printed as one message, exit code 1."""


def outputs_of(stage: str, session: Any) -> dict[str, str]:
    """The outputs of the stage's stack. Raises ClientSideError when it is not deployed."""
    name = load(FileContext(stage=stage)).stack_name
    try:
        (stack,) = session.client("cloudformation").describe_stacks(StackName=name)["Stacks"]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        raise ClientSideError(
            f"STAGE={stage}: there is no stack {name} in {session.region_name}. Deploy it (make deploy STAGE={stage}), or name "
            "another STAGE or AWS_REGION"
        ) from None
    return {item["OutputKey"]: item["OutputValue"] for item in stack.get("Outputs", [])}


# ---- make predict -------------------------------------------------------------------------------------------------------


def request_for(picture: Path, outputs: dict[str, str], session: Any) -> urllib.request.Request:
    """The POST that asks what a picture shows. Raises ClientSideError for a file that is none."""
    if not picture.is_file():
        raise ClientSideError(f"IMAGE={picture}: no such file. Example: make predict IMAGE=dog.jpg")
    kind = KINDS.get(picture.suffix.lower())
    if kind is None:
        raise ClientSideError(f"IMAGE={picture}: expected a file that ends in {', '.join(KINDS)}")
    if "TokenSecretArn" not in outputs:
        raise ClientSideError("the stage's API wants signed calls (api.auth is iam): sign them with SigV4, e.g. with awscurl")
    token = session.client("secretsmanager").get_secret_value(SecretId=outputs["TokenSecretArn"])["SecretString"]
    headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
    return urllib.request.Request(f"{outputs['ApiUrl'].rstrip('/')}/predict", picture.read_bytes(), headers)  # noqa: S310


def answer_to(request: urllib.request.Request, max_wait_s: float = MAX_WAIT_S) -> dict[str, Any]:
    """The API's answer; an endpoint that starts is waited for as its ``Retry-After`` asks. Raises ClientSideError."""
    deadline_s = time.monotonic() + max_wait_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - the stack's own address
                return dict(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            with error:
                said, wait_s = error.read().decode("utf-8", "replace"), float(error.headers.get("Retry-After") or 0)
            if error.code not in (429, 503) or not wait_s or time.monotonic() + wait_s > deadline_s:
                raise ClientSideError(f"the API answered {error.code}: {said}") from None
            print(f"the API answered {error.code}; asking again in {wait_s:.0f} s: {said}", file=sys.stderr)
            time.sleep(wait_s)
        except (urllib.error.URLError, TimeoutError) as error:
            raise ClientSideError(f"{request.full_url} could not be reached ({error}). Check the network") from None


def predict(stage: str, picture: str, session: Any) -> None:
    """Print the likeliest labels of a picture, one a line."""
    found = answer_to(request_for(Path(picture), outputs_of(stage, session), session))
    for one in found["predictions"]:
        print(f"{one['probability']:7.4f}  {one['label']}")


# ---- make logs ----------------------------------------------------------------------------------------------------------


def execution_of(machine: str, name: str, states: Any) -> dict[str, Any]:
    """A description of the execution ``name``, of the newest when empty. Raises ClientSideError when there is none."""
    known = states.list_executions(stateMachineArn=machine, maxResults=100)["executions"]
    if not known:
        raise ClientSideError(f"{machine} has never been started: start it in the Step Functions console")
    newest = sorted(known, key=lambda one: one["startDate"], reverse=True)
    chosen = next((one for one in newest if name in ("", one["name"])), None)
    if chosen is None:
        there = ", ".join(one["name"] for one in newest[:5])
        raise ClientSideError(f"RUN={name}: expected the name of an execution. The newest are {there}")
    return dict(states.describe_execution(executionArn=chosen["executionArn"]))


def events_of(arn: str, states: Any) -> list[dict[str, Any]]:
    """The execution's history, oldest first."""
    pages = states.get_paginator("get_execution_history").paginate(executionArn=arn)
    return [event for page in pages for event in page["events"]]


def visits_in(events: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each state entered and for each task that failed."""
    for event in events:
        at = event["timestamp"].strftime("%H:%M:%S")
        if entered := event.get("stateEnteredEventDetails"):
            yield f"{at}  {entered['name']}"
        elif failed := event.get("taskFailedEventDetails") or event.get("taskTimedOutEventDetails"):
            yield f"{at}    failed: {failed.get('error', '')}: {failed.get('cause', '')}"


def jobs_in(events: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """``(job, log group, beginning of its log streams' names)`` for each job that the execution asked for."""
    for event in events:
        parameters = json.loads(event.get("taskScheduledEventDetails", {}).get("parameters") or "{}")
        for field, (group, follows) in _JOBS.items():
            if event.get("taskScheduledEventDetails", {}).get("resource", "").startswith("create") and field in parameters:
                yield parameters[field], group, parameters[field] + follows


def last_lines(group: str, beginning: str, logs: Any) -> Iterator[tuple[str, list[str]]]:
    """The last lines of each log stream whose name begins so; nothing where there is no log (yet)."""
    try:
        streams = logs.describe_log_streams(logGroupName=group, logStreamNamePrefix=beginning)["logStreams"]
    except logs.exceptions.ResourceNotFoundException:
        return
    for stream in streams:
        name = stream["logStreamName"]
        found = logs.get_log_events(logGroupName=group, logStreamName=name, limit=LINES, startFromHead=False)["events"]
        yield name, [event["message"].rstrip("\n") for event in found]


def show_logs(stage: str, run: str, session: Any) -> None:
    """Print an execution's states, its jobs' last lines, and how it ended."""
    states, logs = session.client("stepfunctions"), session.client("logs")
    execution = execution_of(outputs_of(stage, session)["StateMachineArn"], run, states)
    events = events_of(execution["executionArn"], states)
    for line in visits_in(events):
        print(line)
    for job, group, beginning in jobs_in(events):
        shown = False
        for name, lines in last_lines(group, beginning, logs):
            shown = True
            print(f"\n== {group} {name}", *lines, sep="\n")
        if not shown:
            print(f"\n== {group} {job}: no log (it has not started, or its log has expired)")
    print(f"\nExecution {execution['name']}: {execution['status']}", execution.get("cause", ""))


def main() -> None:
    """Ask, and print; every refusal is one clear message and exit code 1."""
    parser = argparse.ArgumentParser(prog="make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict", "logs"], help="labels of a picture, or what an execution did and said")
    parser.add_argument("--stage", default="dev")
    parser.add_argument("--image", default="", help="with predict: a picture")
    parser.add_argument("--run", default="", help="with logs: an execution's name; default: the newest")
    arguments = parser.parse_args()
    try:
        session = boto3.Session()
        if session.region_name is None:
            raise ClientSideError("no region is set: export AWS_REGION, e.g. us-east-1, where the stage is deployed")
        if arguments.what == "predict":
            predict(arguments.stage, arguments.image, session)
        else:
            # The folder in S3 that messages name is as good as the name.
            show_logs(arguments.stage, arguments.run.rstrip("/").rpartition("/")[2], session)
    except ClientSideError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(1) from None
    except (BotoCoreError, ClientError) as problem:
        print(f"error: AWS refused or could not be reached: {problem}. Check your credentials and AWS_REGION", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
