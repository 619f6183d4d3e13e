"""Rows 11 and 13: a deployment meets an endpoint in motion or broken, or another deployment."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from deployment import Rules
from fault_table import Landed

from infra.config import StageConfig
from infra.pipeline import definition
from infra.verify import walk
from infra.verify.configurations import config_of
from infra.verify.walk import TaskError

PACKAGE = "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/7"
DEPLOY = {"action": "deploy", "model_package": PACKAGE}
OLD = "dogs-dev-00000000older000"
PASSING = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")


def config(stage: str) -> StageConfig:
    return config_of({"stage": stage, "override": json.dumps({"poll_seconds": 60})})


class Watched(walk.Account):
    """Refuses what SageMaker refuses: two updates at once, and a change of an endpoint in motion."""

    def __init__(self, prefix: str, statuses: list[str], then: str | None) -> None:
        super().__init__(bucket="data", prefix=prefix)
        self.statuses, self.then = list(statuses), then
        self.changes: list[str] = []
        self.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": OLD}

    def status(self) -> str | None:
        return self.statuses[0] if self.statuses else self.then

    def on_find_endpoint(self, request: Any) -> Any:
        if self.changes and self.changes[-1] != "delete":
            return super().on_find_endpoint(request)
        status = self.status()
        if self.statuses:
            self.statuses.pop(0)
        if status is None or (self.changes and self.changes[-1] == "delete"):
            raise TaskError("SageMaker.SageMakerException", 'Could not find endpoint "arn:…". (Service: SageMaker)')
        return {**(self.endpoint or {}), "EndpointStatus": status, "FailureReason": "it was broken" if status == "Failed" else ""}

    def _change(self, kind: str) -> None:
        assert not self.statuses, f"{kind} while the endpoint is {self.statuses[0]}"
        self.changes.append(kind)

    def on_create_endpoint(self, request: Any) -> Any:
        self._change("create")
        return super().on_create_endpoint(request)

    def on_update_endpoint(self, request: Any) -> Any:
        self._change("update")
        return super().on_create_endpoint(request)

    def on_delete_failed_endpoint(self, request: Any) -> Any:
        self._change("delete")
        return {}

    on_check_endpoint = on_check_restore = on_check_current = on_check_served = on_find_endpoint


ENDS: dict[str | None, list[str]] = {"InService": ["update"], "Failed": ["delete", "create"], None: ["create"],
                                     "OutOfService": ["update"], "UpdateRollbackFailed": ["update"]}  # fmt: skip


@pytest.mark.fault(11)
@pytest.mark.parametrize("stage", ["dev", "prod"])
@pytest.mark.parametrize("then", ENDS)
@pytest.mark.parametrize("status", PASSING)
def test_an_endpoint_in_motion_is_waited_for_and_changed_once(landed: Landed, stage: str, status: str, then: str | None):
    chosen = config(stage)
    for times in (1, 3):
        account = Watched(chosen.prefix, [status] * times, then)
        machine = walk.Walk(definition(chosen), account)
        last, output = machine.run({**DEPLOY, "model_package": PACKAGE.replace("dogs-dev", chosen.prefix)})
        assert last == "Done", output
        assert account.changes == ENDS[then]
        assert machine.visited.count("WaitForOthers") == times + (then == "Failed")
        landed()


@pytest.mark.fault(11)
@pytest.mark.parametrize("stage", ["dev", "prod"])
@pytest.mark.parametrize("status", [*PASSING, "Failed"])
def test_an_endpoint_that_never_settles_ends_at_the_deadline_and_is_not_touched(landed: Landed, stage: str, status: str):
    chosen = config(stage)
    most = -(-chosen.endpoint.deadline_s // chosen.poll_seconds)
    account = Watched(chosen.prefix, [status] * (most + 50), "InService")
    if status == "Failed":
        account.faults["DeleteFailedEndpoint"] = [{}] * (most + 50)
    machine = walk.Walk(definition(chosen), account)
    last, output = machine.run({**DEPLOY, "model_package": PACKAGE.replace("dogs-dev", chosen.prefix)})
    assert last == "Failed"
    assert account.changes == []
    assert f"is {status} with" in output["Cause"]
    assert f"within {chosen.endpoint.deadline_s} s" in output["Cause"]
    assert machine.visited.count("WaitForOthers") <= most + 1
    assert "CleanUp" in machine.visited
    landed()


# --- the real local endpoint -------------------------------------------------------------------------------------------------


def settled(cloud: Any, name: str = "dogs-local") -> dict[str, Any]:
    sagemaker = cloud.client("sagemaker")
    while (found := sagemaker.describe_endpoint(EndpointName=name))["EndpointStatus"] not in ("InService", "Failed"):
        time.sleep(0.2)
    return dict(found)


def complete(deployed: Any) -> None:
    """One endpoint, in service, with a configuration and a model that exist, and the champion that it serves."""
    sagemaker = deployed.cloud.client("sagemaker")
    found = settled(deployed.cloud)
    assert found["EndpointStatus"] == "InService"
    described = sagemaker.describe_endpoint_config(EndpointConfigName=found["EndpointConfigName"])
    sagemaker.describe_model(ModelName=described["ProductionVariants"][0]["ModelName"])
    assert len(sagemaker.list_endpoints(NameContains="dogs-local")["Endpoints"]) == 1


def champion(deployed: Any) -> str:
    body = deployed.cloud.client("s3").get_object(Bucket=deployed.outputs["DataBucket"], Key="champion.json")["Body"].read()
    return str(json.loads(body)["endpoint_config"])


@pytest.mark.fault(11)
@pytest.mark.pipeline
@pytest.mark.slow
@pytest.mark.parametrize("motion", ["Updating", "Deleting", "missing"])
def test_a_real_endpoint_in_motion_is_waited_for(finished, deployed, landed: Landed, motion: str):
    sagemaker = deployed.cloud.client("sagemaker")
    config_name = settled(deployed.cloud)["EndpointConfigName"]
    if motion == "Updating":
        sagemaker.update_endpoint(EndpointName="dogs-local", EndpointConfigName=config_name)
    else:
        sagemaker.delete_endpoint(EndpointName="dogs-local")
    if motion == "missing":
        while sagemaker.list_endpoints(NameContains="dogs-local")["Endpoints"]:
            time.sleep(0.1)
    else:
        assert sagemaker.describe_endpoint(EndpointName="dogs-local")["EndpointStatus"] == motion
    landed()
    _, ended = deployed.execute({"action": "deploy", "model_package": finished.output["model_package"]})
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    complete(deployed)
    assert champion(deployed) == settled(deployed.cloud)["EndpointConfigName"]


def start(deployed: Any, finished: Any, name: str) -> str:
    """The ARN of a deployment that has begun."""
    states = deployed.cloud.client("stepfunctions")
    given = json.dumps({"action": "deploy", "model_package": finished.output["model_package"]})
    made = states.start_execution(stateMachineArn=deployed.outputs["StateMachineArn"], name=f"{name}-{time.time_ns()}", input=given)
    return str(made["executionArn"])


def ended(deployed: Any, arn: str) -> dict[str, Any]:
    """Its description, once it has ended."""
    states, deadline = deployed.cloud.client("stepfunctions"), time.monotonic() + 180
    while (found := states.describe_execution(executionArn=arn))["status"] == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return dict(found)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.fault(13)
@pytest.mark.pipeline
@pytest.mark.slow
def test_of_two_deployments_one_is_aborted_anywhere(finished, deployed, landed: Landed):
    """Ten times, at a random moment: the other one succeeds, and the endpoint has one complete configuration."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    chance = random.Random(seed)
    states = deployed.cloud.client("stepfunctions")
    for number in range(10):
        arns = [start(deployed, finished, f"pair-{number}-{side}") for side in ("a", "b")]
        time.sleep(chance.uniform(0, 4))
        states.stop_execution(executionArn=arns[0], cause="a test")
        first, second = (ended(deployed, arn) for arn in arns)
        if first["status"] == "ABORTED":
            landed()
        # Whoever was overtaken by the other says so; what serves is whole in every case.
        assert second["status"] == "SUCCEEDED" or "Another execution deployed meanwhile" in second["cause"], second.get("cause")
        complete(deployed)


@pytest.mark.fault(13)
@pytest.mark.pipeline
@pytest.mark.slow
def test_two_deployments_at_once_end_with_one_whole_endpoint(finished, deployed, landed: Landed):
    for number in range(5):
        arns = [start(deployed, finished, f"two-{number}-{side}") for side in ("a", "b")]
        both = [ended(deployed, arn) for arn in arns]
        assert "SUCCEEDED" in [one["status"] for one in both], number
        for one in both:
            assert one["status"] == "SUCCEEDED" or "Another execution deployed meanwhile" in one["cause"], one["cause"]
        complete(deployed)
        assert champion(deployed) == settled(deployed.cloud)["EndpointConfigName"]
        landed()


@pytest.mark.fault(13)
@pytest.mark.pipeline
@pytest.mark.slow
def test_a_deployment_that_fails_goes_back_to_one_that_tidied_up_late(finished, deployed, landed: Landed):
    """The first one's tidying up sees that the second one's model serves; the second one's smoke test fails after that."""
    rules, before = Rules(deployed.cloud.root), champion(deployed)
    obeyed = rules.obeyed()
    rules.set({"call": "^sagemaker:DescribeEndpoint$", "caller": "CleanUp", "delay_s": 12})
    try:
        first = start(deployed, finished, "late")
        until(lambda: champion(deployed) != before)
        theirs = champion(deployed)
        until(lambda: rules.obeyed() == obeyed + 1)
        refused = {"call": "^lambda:POST .*SmokeTest", "caller": "StateMachine", "code": "AccessDenied", "status": 403}
        rules.set({**refused, "delay_s": 24}, {**refused, "times": 10})
        second = start(deployed, finished, "wrong")
        assert ended(deployed, first)["status"] == "SUCCEEDED"
        assert settled(deployed.cloud)["EndpointConfigName"] != theirs, "the second one's model serves by now"
        failed = ended(deployed, second)
    finally:
        rules.set()
    landed(rules.obeyed() - obeyed)
    assert failed["status"] == "FAILED"
    assert "failed in SmokeTest" in failed["cause"]
    assert settled(deployed.cloud)["EndpointConfigName"] == theirs == champion(deployed)
    complete(deployed)


@pytest.mark.fault(13)
@pytest.mark.pipeline
@pytest.mark.slow
def test_who_was_overtaken_during_his_smoke_test_does_not_overwrite_the_champion(finished, deployed, landed: Landed):
    sagemaker, rules = deployed.cloud.client("sagemaker"), Rules(deployed.cloud.root)
    obeyed = rules.obeyed()
    rules.set({"call": "^lambda:POST .*SmokeTest", "caller": "StateMachine", "delay_s": 15})
    try:
        first = start(deployed, finished, "slow")
        until(lambda: rules.obeyed() == obeyed + 1)
        theirs = settled(deployed.cloud)["EndpointConfigName"]
        second = start(deployed, finished, "quick")
        assert ended(deployed, second)["status"] == "SUCCEEDED"
        overtaken = ended(deployed, first)
    finally:
        rules.set()
    landed()
    assert overtaken["status"] == "FAILED"
    assert "The smoke test passed. Another execution deployed meanwhile" in overtaken["cause"]
    assert champion(deployed) == settled(deployed.cloud)["EndpointConfigName"] != theirs
    assert sagemaker.describe_endpoint_config(EndpointConfigName=theirs)["ProductionVariants"], "the second one's way back"
    complete(deployed)
