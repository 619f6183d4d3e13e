"""After the first run: a model is deployed again, a failed deployment leaves the old one, a second run re-uses its data."""

from __future__ import annotations

import json
import time

import pytest
from deployment import LONGER, typical

pytestmark = pytest.mark.pipeline


def serves(deployed, digits) -> bool:
    path = typical(digits, "6")
    status, answer = deployed.post(path.read_bytes(), **deployed.authorized)
    return status == 200 and answer["predictions"][0]["label"] == "6"


def test_a_registered_model_is_deployed_again_by_updating_the_endpoint(finished, deployed, digits):
    follower, ended = deployed.execute({"action": "deploy", "model_package": finished.output["model_package"]})
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    states = [visit.name for visit in follower.visits]
    assert "UpdateEndpoint" in states
    assert "PrepareData" not in states
    assert serves(deployed, digits)
    config = deployed.cloud.client("sagemaker").describe_endpoint(EndpointName="dogs-local")["EndpointConfigName"]
    champion = deployed.cloud.client("s3").get_object(Bucket=deployed.outputs["DataBucket"], Key="champion.json")
    assert json.loads(champion["Body"].read())["endpoint_config"] == config


def test_a_package_that_does_not_exist_fails_with_its_name_and_the_old_endpoint_serves_on(finished, deployed, digits):
    missing = finished.output["model_package"].rsplit("/", 1)[0] + "/99"
    _, ended = deployed.execute({"action": "deploy", "model_package": missing})
    assert ended["status"] == "FAILED"
    assert "ReadPackage" in ended["cause"]
    assert serves(deployed, digits)


def test_two_executions_in_the_same_second_end_well(finished, deployed, digits):
    """Both deploy: one goes first, the other waits for it, and the endpoint has one complete configuration at the end."""
    states = deployed.cloud.client("stepfunctions")
    deploy = json.dumps({"action": "deploy", "model_package": finished.output["model_package"]})
    arns = [
        states.start_execution(stateMachineArn=deployed.outputs["StateMachineArn"], name=name, input=deploy)["executionArn"]
        for name in ("first", "second")
    ]
    deadline_s = time.monotonic() + 180
    both = [states.describe_execution(executionArn=arn) for arn in arns]
    while any(one["status"] == "RUNNING" for one in both):
        assert time.monotonic() < deadline_s
        time.sleep(1)
        both = [states.describe_execution(executionArn=arn) for arn in arns]
    outcomes = sorted(one["status"] for one in both)
    assert "SUCCEEDED" in outcomes, [one.get("cause") for one in both]
    for one in both:
        # Whoever was overtaken says so.
        assert one["status"] == "SUCCEEDED" or "Another execution deployed meanwhile" in one["cause"], one["cause"]
    endpoint = deployed.cloud.client("sagemaker").describe_endpoint(EndpointName="dogs-local")
    assert endpoint["EndpointStatus"] == "InService"
    champion = deployed.cloud.client("s3").get_object(Bucket=deployed.outputs["DataBucket"], Key="champion.json")
    assert json.loads(champion["Body"].read())["endpoint_config"] == endpoint["EndpointConfigName"]
    assert serves(deployed, digits)


def test_nothing_is_left_of_what_was_replaced_but_the_config_that_serves(finished, deployed):
    sagemaker = deployed.cloud.client("sagemaker")
    assert [e["EndpointStatus"] for e in sagemaker.list_endpoints(NameContains="dogs-local")["Endpoints"]] == ["InService"]
    running = [j for j in sagemaker.list_training_jobs()["TrainingJobSummaries"] if j["TrainingJobStatus"] == "InProgress"]
    assert running == []


@pytest.mark.slow
def test_a_second_run_reuses_the_data_set_and_the_image_and_meets_the_champion(finished, deployed, digits):
    follower, ended = deployed.execute(LONGER)
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    output = json.loads(ended["output"])
    assert output["dataset_hash"] == finished.output["dataset_hash"]
    assert output["champion_top1"] == pytest.approx(finished.output["test_top1"])
    states = [visit.name for visit in follower.visits]
    assert "BuildServer" not in states
    bucket, key = deployed.outputs["DataBucket"], f"runs/{ended['name']}/prepare/result.json"
    result = json.loads(deployed.cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())
    assert result["reused"] is True
    assert serves(deployed, digits)
