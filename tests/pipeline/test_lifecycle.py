"""A stack's life on the local cloud: deployed, changed, deployed, destroyed, deployed again, with another one beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deployment import Account, destroy
from rich.console import Console

from infra.verify.configurations import CONFIGURATIONS
from local_cloud import run

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

HEX = "0123456789abcdef"


def execution_leftovers(cloud: Any, prefix: str, bucket: str) -> None:
    """What an execution makes and CloudFormation does not know."""
    sagemaker, s3 = cloud.client("sagemaker"), cloud.client("s3")
    for key in ("champion.json", "datasets/x/shards/train-0.tar", "runs/one/report/report.html"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"{}")
        s3.put_object(Bucket=bucket, Key=key, Body=b"{ }")  # an older version too
    role = next(
        one["Arn"]
        for one in cloud.client("iam").list_roles()["Roles"]
        if "EndpointRole" in one["RoleName"] and prefix in one["RoleName"]
    )
    container = {
        "Image": f"000000000000.dkr.ecr.us-east-1.amazonaws.com/{prefix}-server:x",
        "ModelDataUrl": f"s3://{bucket}/models/x/model.tar.gz",
    }
    sagemaker.create_model(ModelName=f"{prefix}-{HEX}", PrimaryContainer=container, ExecutionRoleArn=role)
    variant = {
        "VariantName": "main",
        "ModelName": f"{prefix}-{HEX}",
        "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 5},
    }
    sagemaker.create_endpoint_config(EndpointConfigName=f"{prefix}-{HEX}", ProductionVariants=[variant])


def test_a_stack_is_deployed_changed_destroyed_and_deployed_again_beside_another(
    cloud: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    port, quiet, account = int(cloud.url.rsplit(":", 1)[1]), Console(quiet=True), Account(cloud)
    before, ran_before = account.stacks(), account.runs()
    for name in ("birds", "cats"):
        outputs = run.deploy(port, "local", {"name": name}, cloud.root, quiet)
        execution_leftovers(cloud, f"{name}-local", outputs["DataBucket"])
    assert {"ImageClassifier-birds-local", "ImageClassifier-cats-local"} <= account.stacks()
    kept = account.holds("cats-local")
    assert {"model", "endpoint config", "bucket", "function", "state machine", "log group"} <= set(kept)

    # A change, deployed over it: nothing of the executions is lost.
    changed = run.deploy(port, "local", {"name": "birds", "retention_days": 30}, cloud.root, quiet)
    assert f"birds-local-{HEX}" in account.holds("birds-local")["model"]
    champion = cloud.client("s3").get_object(Bucket=changed["DataBucket"], Key="champion.json")
    assert champion["Body"].read() == b"{ }"

    destroy(cloud, "local", {"name": "birds"})
    assert "ImageClassifier-birds-local" not in account.stacks()
    left = account.holds("birds-local")
    # API Gateway's log role belongs to the account: CDK keeps it, and it costs nothing.
    assert {kind: names for kind, names in left.items() if kind != "role"} == {}
    assert [name for name in left.get("role", []) if "PredictApiCloudWatch" not in name] == []
    assert account.holds("cats-local") == kept, "the other stack was touched"

    again = run.deploy(port, "local", {"name": "birds"}, cloud.root, quiet)
    assert again["DataBucket"]
    assert cloud.client("s3").list_objects_v2(Bucket=again["DataBucket"])["KeyCount"] == 0
    for name in ("birds", "cats"):
        destroy(cloud, "local", {"name": name})
    assert account.stacks() <= before | {"CDKToolkit"}
    assert set(account.runs()) <= set(ran_before)


@pytest.mark.parametrize("name", ["prod", "idle", "triggered", "own-key", "big", "quiet"])
def test_a_companys_stack_is_deployed_and_destroyed_here_too(cloud: Any, monkeypatch: pytest.MonkeyPatch, name: str):
    """Configurations of ``make verify`` that are made of nothing the local cloud refuses."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    port, account, chosen = int(cloud.url.rsplit(":", 1)[1]), Account(cloud), CONFIGURATIONS[name]
    before, ran_before = account.stacks(), account.runs()
    override = {**json.loads(chosen.get("override", "{}")), "name": name.replace("-", "")[:5]}
    outputs = run.deploy(port, chosen["stage"], override, cloud.root, Console(quiet=True))
    assert set(outputs) >= {"ApiUrl", "StateMachineArn", "DataBucket", "TokenSecretArn"}
    destroy(cloud, chosen["stage"], override)
    assert account.stacks() <= before | {"CDKToolkit"}
    assert set(account.runs()) <= set(ran_before)
