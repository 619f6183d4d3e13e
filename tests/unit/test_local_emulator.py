"""ministack's names that we use, and IAM enforcement in front of both its services and ours."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from local_cloud import emulator
from local_cloud.service import ServiceError


def test_the_names_of_ministack_are_where_we_use_them():
    from ministack.app import _request_account_scope
    from ministack.core import iam_evaluator, responses, router
    from ministack.services import codebuild, ecr, lambda_svc, s3, sts
    from ministack.services.cloudformation import provisioners

    assert callable(_request_account_scope)
    names = ("pin_request_origin", "pin_signed_request", "pin_signed_body", "enforce", "resolve_caller_identity", "_conditions_met")
    assert all(callable(getattr(iam_evaluator, name)) for name in (*names, "EvalContext", "AuthError"))
    assert callable(router.extract_access_key_id)
    assert callable(router.extract_region)
    assert callable(responses.set_request_account_id)
    assert callable(responses.set_request_region)
    assert callable(sts.register_session)
    assert {"create", "delete"} <= set(provisioners._RESOURCE_HANDLERS["AWS::ECR::Repository"])
    assert {"create", "update"} <= set(provisioners._RESOURCE_HANDLERS["AWS::S3::Bucket"])
    assert hasattr(s3, "_bucket_tags")
    assert {"create", "update"} <= set(provisioners._RESOURCE_HANDLERS["AWS::CodeBuild::Project"])
    assert callable(provisioners._codebuild_cfn_to_api)
    assert callable(provisioners._cw_metric_alarm_record)
    assert callable(codebuild._project_shape)
    assert hasattr(codebuild, "_projects")
    assert all(callable(getattr(lambda_svc, name)) for name in ("invalidate_worker", "acquire_worker", "release_worker"))
    assert callable(ecr._delete_repository)
    assert "delete" in provisioners._RESOURCE_HANDLERS["AWS::Lambda::Function"]
    assert is_dataclass(iam_evaluator.EvalContext)
    assert "AWS::SageMaker::ModelPackageGroup" not in provisioners._RESOURCE_HANDLERS


def test_a_stack_may_hold_an_alarm_over_several_metrics(cloud):
    """The alarm of a real-time endpoint that nobody asks is one. It is made and changed, and does not go off here."""
    metric = {"Metric": {"Namespace": "n", "MetricName": "m"}, "Period": 60, "Stat": "Sum"}
    alarm = {
        "AlarmName": f"test-{uuid.uuid4().hex[:8]}",
        "ComparisonOperator": "GreaterThanThreshold",
        "EvaluationPeriods": 1,
        "Metrics": [{"Id": "asked", "MetricStat": metric, "ReturnData": False}, {"Id": "idle", "Expression": "FILL(asked, 0) < 1"}],
    }
    formation, name = cloud.client("cloudformation"), alarm["AlarmName"]
    for change, done, threshold in (("create_stack", "stack_create_complete", 1), ("update_stack", "stack_update_complete", 2)):
        template = {"Resources": {"Alarm": {"Type": "AWS::CloudWatch::Alarm", "Properties": {**alarm, "Threshold": threshold}}}}
        getattr(formation, change)(StackName=name, TemplateBody=json.dumps(template))
        formation.get_waiter(done).wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20})
        (found,) = cloud.client("cloudwatch").describe_alarms(AlarmNames=[name])["MetricAlarms"]
        assert (found["StateValue"], found["Threshold"]) == ("INSUFFICIENT_DATA", threshold)
    formation.delete_stack(StackName=name)


@contextmanager
def function(cloud, code: str) -> Iterator[str]:
    """The name of a function that a stack of its own holds, with a role of its own; the stack is deleted at the end."""
    iam, formation, name = cloud.client("iam"), cloud.client("cloudformation"), f"test-{uuid.uuid4().hex[:8]}"
    assumed = {"Version": "2012-10-17", "Statement": [trust("lambda.amazonaws.com")["Statement"][0]]}
    role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(assumed))["Role"]["Arn"]
    given = {"FunctionName": name, "Runtime": "python3.13", "Handler": "index.handle", "Role": role, "Code": {"ZipFile": code}}
    template = {"Resources": {"Function": {"Type": "AWS::Lambda::Function", "Properties": given}}}
    formation.create_stack(StackName=name, TemplateBody=json.dumps(template))
    formation.get_waiter("stack_create_complete").wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20})
    yield name
    formation.delete_stack(StackName=name)
    formation.get_waiter("stack_delete_complete").wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20})


def test_a_deleted_stacks_function_leaves_no_process_and_no_folder(cloud):
    with function(cloud, "def handle(event, context):\n    return 1\n") as name:
        assert cloud.client("lambda").invoke(FunctionName=name)["Payload"].read() == b"1"
        assert list((cloud.root / "tmp").glob(f"*{name}*"))
    assert not list((cloud.root / "tmp").glob(f"*{name}*"))
    assert not [one.pid for one in psutil.process_iter(["cmdline"]) if name in " ".join(one.info["cmdline"] or [])]


def test_many_invocations_at_once_share_a_few_processes_and_all_are_answered(cloud):
    many, functions = 3 * emulator.FUNCTION_PROCESSES, cloud.client("lambda")
    code = "import os, time\n\ndef handle(event, context):\n    time.sleep(0.5)\n    return os.getpid()\n"
    with function(cloud, code) as name, ThreadPoolExecutor(many) as callers:
        answers = list(callers.map(lambda _: functions.invoke(FunctionName=name), range(many)))
        assert not [answer["FunctionError"] for answer in answers if "FunctionError" in answer]
        assert 1 < len({answer["Payload"].read() for answer in answers}) <= emulator.FUNCTION_PROCESSES


def test_a_deleted_repositorys_images_leave_no_files(cloud):
    ecr, formation, name = cloud.client("ecr"), cloud.client("cloudformation"), f"test-{uuid.uuid4().hex[:8]}"
    repository = {"Type": "AWS::ECR::Repository", "Properties": {"RepositoryName": name, "EmptyOnDelete": True}}
    formation.create_stack(StackName=name, TemplateBody=json.dumps({"Resources": {"Repository": repository}}))
    formation.get_waiter("stack_create_complete").wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20})
    ecr.put_image(repositoryName=name, imageManifest="{}", imageTag="one")
    folder = cloud.root / "images" / name
    files = [folder / "one.json", folder / "made" / "one" / "rootfs" / "serve.py"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    with pytest.raises(ClientError, match="RepositoryNotEmpty"):
        ecr.delete_repository(repositoryName=name)
    assert all(file.exists() for file in files), "what could not be deleted keeps its images"
    formation.delete_stack(StackName=name)
    formation.get_waiter("stack_delete_complete").wait(StackName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 20})
    assert not [path for path in folder.rglob("*") if path.is_file()]


def trust(service: str, condition: dict | None = None) -> dict:
    statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}
    return {"Statement": [{**statement, **({"Condition": condition} if condition else {})}]}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (trust("states.amazonaws.com"), True),
        (trust("sagemaker.amazonaws.com"), False),
        (trust("states.amazonaws.com", {"StringEquals": {"aws:SourceAccount": emulator.ACCOUNT}}), True),
        (trust("states.amazonaws.com", {"StringEquals": {"aws:SourceAccount": "111111111111"}}), False),
        ({"Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}]}, False),
    ],
)
def test_a_service_assumes_only_roles_that_trust_it(policy, expected):
    assert emulator._trusts(policy, "states.amazonaws.com") is expected


@pytest.fixture
def role(cloud):
    """A role whose policy allows to describe endpoints named ``mine`` and to pass no role; its session is returned."""
    return session_with(
        cloud,
        Action=["sagemaker:DescribeEndpoint", "s3:ListBucket", "sagemaker:CreateModel"],
        Resource=["arn:aws:sagemaker:*:*:endpoint/mine", "arn:aws:s3:::allowed", "arn:aws:sagemaker:*:*:model/*"],
    )


def session_with(cloud, **statement) -> boto3.Session:
    """A session of a new role whose policy is this one statement."""
    iam, name = cloud.client("iam"), f"test-{uuid.uuid4().hex[:8]}"
    assume = {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}
    made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [assume]}))
    allow = {"Effect": "Allow", **statement}
    iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allow]}))
    given = cloud.client("sts").assume_role(RoleArn=made["Role"]["Arn"], RoleSessionName="test")["Credentials"]
    return boto3.Session(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"], region_name=emulator.REGION)


def denied(call) -> str:
    with pytest.raises(ClientError) as refused:
        call()
    return refused.value.response["Error"]["Code"]


@pytest.mark.parametrize(("behind", "allowed"), [(":*", True), ("", False)])
def test_a_log_group_is_named_in_a_policy_as_aws_wants_it(cloud, behind, allowed):
    """With ``:*`` behind its name for all actions but those of tags."""
    name = f"/test/{uuid.uuid4().hex[:8]}"
    cloud.client("logs").create_log_group(logGroupName=name)
    arn = f"arn:aws:logs:*:*:log-group:{name}{behind}"
    logs = cloud.client("logs", session_with(cloud, Action="logs:CreateLogStream", Resource=arn))
    if allowed:
        logs.create_log_stream(logGroupName=name, logStreamName="one")
    else:
        assert denied(lambda: logs.create_log_stream(logGroupName=name, logStreamName="one")) == "AccessDeniedException"


def test_a_call_inside_the_policy_passes_and_one_outside_is_denied(cloud, role):
    sagemaker = cloud.client("sagemaker", role)
    # Allowed: the answer is about the endpoint, which does not exist.
    assert denied(lambda: sagemaker.describe_endpoint(EndpointName="mine")) == "ValidationException"
    assert denied(lambda: sagemaker.describe_endpoint(EndpointName="other")) == "AccessDeniedException"
    assert denied(lambda: sagemaker.delete_endpoint(EndpointName="mine")) == "AccessDeniedException"
    cloud.client("s3").create_bucket(Bucket="allowed")
    cloud.client("s3").create_bucket(Bucket="forbidden")
    assert cloud.client("s3", role).list_objects_v2(Bucket="allowed")["KeyCount"] == 0
    assert denied(lambda: cloud.client("s3", role).list_objects_v2(Bucket="forbidden")) == "AccessDenied"
    lines = [json.loads(line) for line in (cloud.root / "denied.jsonl").read_text().splitlines()]
    assert {"DescribeEndpoint", "DeleteEndpoint"} <= {line["action"] for line in lines}
    assert any("forbidden" in line["action"] for line in lines)


def test_passing_a_role_needs_its_own_permission(cloud, role):
    model = {"ModelName": "m", "ExecutionRoleArn": f"arn:aws:iam::{emulator.ACCOUNT}:role/any"}
    with pytest.raises(ClientError, match="iam:PassRole"):
        cloud.client("sagemaker", role).create_model(**model)


def test_a_wrong_signature_is_refused(cloud, role):
    keys = role.get_credentials()
    forged = boto3.Session(keys.access_key, "wrong", keys.token, region_name=emulator.REGION)
    refusal = denied(lambda: cloud.client("sagemaker", forged).describe_endpoint(EndpointName="mine"))
    assert refusal in ("InvalidSignatureException", "SignatureDoesNotMatch")


def test_requests_are_checked_against_the_api_model(cloud):
    sagemaker = cloud.client("sagemaker")
    with pytest.raises(ClientError, match="does not match"):
        sagemaker.describe_endpoint(EndpointName="-no-")
    with pytest.raises(ClientError, match="33 characters is outside"):
        sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName="a" * 33)


def test_a_role_that_does_not_trust_the_service_is_not_assumed(cloud, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    with pytest.raises(ServiceError, match="does not exist"):
        emulator.assume(f"arn:aws:iam::{emulator.ACCOUNT}:role/missing", "sagemaker.amazonaws.com", "s")
