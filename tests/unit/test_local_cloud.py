"""The front door: AWS's codes for what no service would take, and an end that leaves nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from local_cloud import emulator, run

IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.13-cpu"
STUBBORN = "trap '' TERM; sleep 600 & setsid sleep 600 & wait"
"""A job that ignores SIGTERM, with a child in its session and one that left it."""
PREFIXES = {"sagemaker": "SageMaker", "states": "AWSStepFunctions", "codebuild": "CodeBuild_20161006"}


def post(url: str, service: str, operation: str, body: bytes, key: str = emulator.ROOT_ACCESS_KEY_ID) -> tuple[int, Any]:
    """Sign and send what no SDK would; (status, JSON)."""
    headers = {"X-Amz-Target": f"{PREFIXES[service]}.{operation}", "Content-Type": "application/x-amz-json-1.1"}
    request = AWSRequest("POST", f"{url}/", headers=headers, data=body)
    SigV4Auth(Credentials(key, emulator.ROOT_SECRET_ACCESS_KEY), service, emulator.REGION).add_auth(request)
    prepared = request.prepare()
    try:
        with urllib.request.urlopen(urllib.request.Request(prepared.url, body, dict(prepared.headers)), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


# ---- Requests that are no requests ------------------------------------------------------------------------------------


def test_an_operation_that_aws_does_not_have(cloud) -> None:
    status, answer = post(cloud.url, "sagemaker", "MakeCoffee", b"{}")
    assert (status, answer["__type"]) == (400, "UnknownOperationException")
    assert answer["message"] == "sagemaker has no operation MakeCoffee"


def test_an_operation_that_is_not_emulated_is_refused_by_name(cloud) -> None:
    with pytest.raises(ClientError, match=r"CreateApp.*ValidationException|ValidationException.*CreateApp") as raised:
        cloud.client("sagemaker").create_app(DomainId="d-1", AppType="JupyterServer", AppName="a")
    message = raised.value.response["Error"]["Message"]
    assert message.startswith("CreateApp is not emulated by the local cloud. Emulated: ")
    assert "CreateTrainingJob" in message


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"{'MaxResults': 1}"])
@pytest.mark.parametrize(
    ("service", "operation"), [("sagemaker", "ListModels"), ("states", "ListExecutions"), ("codebuild", "StartBuild")]
)
def test_a_body_that_is_not_json(cloud, service: str, operation: str, body: bytes) -> None:
    status, answer = post(cloud.url, service, operation, body)
    assert (status, answer["__type"]) == (400, "SerializationException")
    assert answer["message"].startswith("The body is not JSON: ")


@pytest.mark.parametrize("body", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object(cloud, body: bytes) -> None:
    status, answer = post(cloud.url, "sagemaker", "ListModels", body)
    assert (status, answer["__type"]) == (400, "ValidationException")


def test_an_empty_body_is_an_empty_request(cloud) -> None:
    status, answer = post(cloud.url, "sagemaker", "ListModels", b"")
    assert status == 200
    assert isinstance(answer["Models"], list)


@pytest.mark.parametrize(
    ("operation", "request_body", "problem"),
    [
        ("DescribeTrainingJob", {}, 'Missing required parameter in input: "TrainingJobName"'),
        ("DescribeTrainingJob", {"TrainingJobName": 3}, "Invalid type for parameter TrainingJobName"),
        ("DescribeTrainingJob", {"TrainingJobName": "a", "Colour": "red"}, 'Unknown parameter in input: "Colour"'),
        ("DescribeTrainingJob", {"TrainingJobName": "a_b"}, "TrainingJobName: 'a_b' does not match"),
        ("DescribeTrainingJob", {"TrainingJobName": "a" * 64}, "TrainingJobName: 64 characters is outside 1 to 63"),
        ("ListTrainingJobs", {"MaxResults": 101}, "MaxResults: 101 is outside 1 to 100"),
        ("ListTrainingJobs", {"StatusEquals": "Sleeping"}, "StatusEquals: 'Sleeping' is not one of "),
        (
            "AddTags",
            {"ResourceArn": "arn:aws:sagemaker:us-east-1:000000000000:model/m", "Tags": [{"Key": "a"}]},
            'Missing required parameter in Tags[0]: "Value"',
        ),
    ],
)
def test_constraints_of_aws_s_model(cloud, operation: str, request_body: dict[str, Any], problem: str) -> None:
    status, answer = post(cloud.url, "sagemaker", operation, json.dumps(request_body).encode())
    assert (status, answer["__type"]) == (400, "ValidationException")
    assert problem in answer["message"]


@pytest.mark.parametrize(("service", "operation"), [("sagemaker", "ListModels"), ("codebuild", "ListProjects")])
def test_a_key_that_nobody_has_is_refused_by_our_services_and_by_ministack(cloud, service: str, operation: str) -> None:
    status, answer = post(cloud.url, service, operation, b"{}", key="AKIA" + 16 * "0")
    assert status in (400, 403)
    assert "UnrecognizedClient" in answer["__type"] or "InvalidClientTokenId" in answer["__type"]


def test_an_error_reaches_boto3_with_its_code_and_request_id(cloud) -> None:
    with pytest.raises(ClientError) as raised:
        cloud.client("sagemaker").describe_training_job(TrainingJobName="none")
    assert raised.value.response["Error"] == {"Code": "ValidationException", "Message": "Requested resource not found."}
    uuid.UUID(raised.value.response["ResponseMetadata"]["RequestId"])


# ---- The end ------------------------------------------------------------------------------------------------------------


@contextmanager
def running(root: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "local_cloud.cloud", "--port", str(port), "--root", str(root), "--lifeline"]
    log = root.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=run.PROJECT, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        run._wait_until_up(process, port, log)
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def start_sleeper(url: str) -> None:
    """A processing job that would run for ten minutes, in the role of a job."""
    session = boto3.Session(emulator.ROOT_ACCESS_KEY_ID, emulator.ROOT_SECRET_ACCESS_KEY, region_name=emulator.REGION)
    trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
    iam, sagemaker = (session.client(name, endpoint_url=url) for name in ("iam", "sagemaker"))
    document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    role = iam.create_role(RoleName="job", AssumeRolePolicyDocument=document)["Role"]["Arn"]
    sagemaker.create_processing_job(
        ProcessingJobName="sleeper",
        RoleArn=role,
        AppSpecification={
            "ImageUri": IMAGE,
            "ContainerEntrypoint": ["/bin/bash", "-c", "trap '' TERM; sleep 600 & wait; sleep 600"],
        },
        ProcessingResources={"ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 1}},
    )
    iam.close()
    sagemaker.close()


def sleepers(process: psutil.Process) -> list[psutil.Process]:
    """The cloud's descendants once the job's own command is among them."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        found = process.children(recursive=True)
        if any("sleep" in child.name() for child in found):
            return found
        time.sleep(0.1)
    raise AssertionError("the job did not start")


@pytest.mark.parametrize("end", ["SIGTERM", "stdin closes"])
def test_the_cloud_ends_within_ten_seconds_and_leaves_nothing(tmp_path: Path, end: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root, elsewhere = tmp_path / "root", set(Path("/tmp").glob("ministack*"))
    root.mkdir()
    with running(root, port) as process:
        start_sleeper(f"http://localhost:{port}")
        children = sleepers(psutil.Process(process.pid))
        started_s = time.monotonic()
        if end == "SIGTERM":
            process.terminate()
        elif process.stdin is not None:
            process.stdin.close()
        code = process.wait(10)
        took_s = time.monotonic() - started_s
    _, alive = psutil.wait_procs(children, timeout=2)
    assert (code, alive) == (0, [])
    assert took_s < 10
    assert not root.exists()
    assert set(Path("/tmp").glob("ministack*")) == elsewhere
    run._check_port(port)


def test_killed_hard_it_takes_its_jobs_with_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = tmp_path / "root"
    root.mkdir()
    with running(root, port) as process:
        start_sleeper(f"http://localhost:{port}")
        children = sleepers(psutil.Process(process.pid))
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
