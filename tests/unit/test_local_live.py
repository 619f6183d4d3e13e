"""The report of a run while it goes on, over real HTTP: made when asked for, not oftener than promised, final at the end."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from local_cloud.live import INTERVAL_S, job_names, outcome

BUCKET = "live-data"


def get(url: str, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers."""
    request = urllib.request.Request(f"{url}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def eventually(look: Callable[[], Any], seconds: float = 90) -> Any:
    deadline_s = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline_s, "not seen in time"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def start(cloud: Any) -> Iterator[Callable[[str], str]]:
    """Starts an execution that waits, under a name; the state machine is the simplest there is."""
    states, iam = cloud.client("stepfunctions"), cloud.client("iam")
    trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    role = iam.create_role(RoleName="waiter", AssumeRolePolicyDocument=document)["Role"]["Arn"]
    wait = {"StartAt": "Wait", "States": {"Wait": {"Type": "Wait", "Seconds": 600, "End": True}}}
    machine = states.create_state_machine(name="waiter", definition=json.dumps(wait), roleArn=role)["stateMachineArn"]
    cloud.client("s3").create_bucket(Bucket=BUCKET)

    def begin(name: str) -> str:
        return str(states.start_execution(stateMachineArn=machine, name=name)["executionArn"])

    yield begin
    for execution in states.list_executions(stateMachineArn=machine)["executions"]:
        states.stop_execution(executionArn=execution["executionArn"])


def test_a_page_is_live_while_the_execution_runs_and_final_after_it(cloud, start) -> None:
    arn = start("live-1")
    path = "/report/live-1"
    status, waiting, headers = get(cloud.url, path)
    assert status == 200
    assert "http-equiv=refresh" in waiting
    assert not (cloud.root / "live" / "live-1").exists(), "nothing was written yet, so nothing can be made"
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    assert "frame-ancestors 'none'" in headers["content-security-policy"]

    cloud.client("s3").put_object(Bucket=BUCKET, Key="runs/live-1/prepare/result.json", Body=b'{"dataset_hash": "abc"}')
    asked_s = time.monotonic()
    live = eventually(lambda: (text := get(cloud.url, path)[1]) and "being made" not in text and text)
    assert "live-1" in live
    made = cloud.root / "live" / "live-1" / "report.html"
    first = made.stat().st_mtime_ns
    for _ in range(3):
        get(cloud.url, path)  # the last page is shown, whoever asks how often
    if time.monotonic() - asked_s < INTERVAL_S:
        assert made.stat().st_mtime_ns == first
    cloud.client("stepfunctions").stop_execution(executionArn=arn, error="Stopped", cause="by <hand>")
    time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - asked_s)))
    eventually(lambda: get(cloud.url, path)[0] == 200 and made.stat().st_mtime_ns != first)
    time.sleep(1)
    final = made.stat().st_mtime_ns
    time.sleep(INTERVAL_S)
    assert get(cloud.url, path)[0] == 200
    time.sleep(1)
    assert made.stat().st_mtime_ns == final, "a final page is made once"


def test_nothing_is_made_when_nobody_looks(cloud, start) -> None:
    start("unseen")
    cloud.client("s3").put_object(Bucket=BUCKET, Key="runs/unseen/prepare/result.json", Body=b"{}")
    assert "unseen" in get(cloud.url, "/report/")[1]
    assert not (cloud.root / "live" / "unseen").exists()


def test_an_execution_that_ended_before_it_wrote_says_why(cloud, start) -> None:
    arn = start("early")
    cloud.client("stepfunctions").stop_execution(executionArn=arn)
    status, text, _ = get(cloud.url, "/report/early")
    assert status == 200
    assert "The execution was aborted." in text
    assert "refresh" not in text


class Ended:
    """An execution as moto keeps it."""

    def __init__(self, status: str, cause: str | None = None, error: str | None = None) -> None:
        self.exec_status, self.cause, self.error = SimpleNamespace(value=status), cause, error


@pytest.mark.parametrize(
    ("execution", "said"),
    [
        (Ended("RUNNING"), ""),
        (Ended("SUCCEEDED"), ""),
        (Ended("FAILED", "Run x failed in Train", "TrainFailed"), "Run x failed in Train"),
        (Ended("FAILED", None, "States.Runtime"), "States.Runtime"),
        (Ended("ABORTED"), "The execution was aborted."),
        (Ended("TIMED_OUT", "too long"), "The execution was timed out: too long"),
    ],
)
def test_the_page_is_told_why_a_run_ended(execution: Any, said: str) -> None:
    assert outcome(execution) == said


def test_the_jobs_of_an_execution_are_read_from_its_history() -> None:
    def event(resource: str, **parameters: str) -> dict[str, Any]:
        return {"taskScheduledEventDetails": {"resource": resource, "parameters": json.dumps(parameters)}}

    events = [
        {"type": "ExecutionStarted"},
        event("createProcessingJob.sync", ProcessingJobName="p"),
        event("createHyperParameterTuningJob.sync", HyperParameterTuningJobName="t"),
        event("createTrainingJob.sync", TrainingJobName="first"),
        event("createTrainingJob.sync", TrainingJobName="second"),
        event("getObject", Bucket="b"),
    ]
    execution = SimpleNamespace(to_history_output=lambda: {"events": events})
    assert job_names(execution) == {"processing_jobs": ("p",), "tuning_job": "t", "training_job": "second"}
    begun = SimpleNamespace(to_history_output=lambda: {"events": []})
    assert job_names(begun) == {"processing_jobs": (), "tuning_job": "none", "training_job": "none"}


def test_an_unknown_execution_is_not_found_and_shown_inert(cloud) -> None:
    status, text, _ = get(cloud.url, "/report/%3Cscript%3E")
    assert status == 404
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", ""])
def test_a_foreign_name_for_this_machine_is_refused(cloud, host: str) -> None:
    assert get(cloud.url, "/report/", Host=host)[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:4566", "[::1]:4566"])
def test_this_machines_own_names_are_answered(cloud, host: str) -> None:
    assert get(cloud.url, "/report", Host=host)[0] == 200


def test_a_bucket_called_report_is_still_s3s(cloud) -> None:
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket="report")
    s3.put_object(Bucket="report", Key="a", Body=b"an object")
    assert s3.get_object(Bucket="report", Key="a")["Body"].read() == b"an object"
    address = s3.generate_presigned_url("get_object", Params={"Bucket": "report", "Key": "a"})
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.read() == b"an object"
