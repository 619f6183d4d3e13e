"""Updates of the local cloud's endpoints under load: no request fails, whatever becomes of the new model. And what scales them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from local_fakes import BUCKET, ROLE, SERVER_URI, Client, FakeCloud, archive, serving_cloud, wait

from local_cloud.emulator import embedded_metrics
from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.sagemaker.endpoints import _steps
from local_cloud.scaling import Scaling
from local_cloud.service import ServiceError

SERVER = """
import http.server, os, sys
name = open(os.environ["SM_MODEL_DIR"] + "/name").read()
if name == "does-not-start": sys.exit(9)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A server of ours proves its model first: with wrong, failing or slow answers its /ping never says 200.
    def do_GET(self): self.answer(503 if name == "fails-its-self-test" else 200, b"")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if name == "dies": os._exit(1)
        self.answer(200, name.encode())
    def answer(self, code, body):
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
Server(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
"""
BUSY = ("Creating", "Updating", "RollingBack", "Deleting")
ALARM = "dogs-rollback-errors"
HALF = {"Type": "CAPACITY_PERCENT", "Value": 50}
WATCHED = {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": ALARM}]}}


def policies(wait_s: int) -> dict[str, dict[str, Any]]:
    """Ways to move to a new fleet; ``wait_s`` is divided by the cloud's ``deployment_speed``."""
    once = {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": wait_s}
    canary = {"Type": "CANARY", "WaitIntervalInSeconds": wait_s, "CanarySize": HALF}
    return {
        "none": {},
        "all at once": {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": once}},
        "canary": {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": canary}},
        "rolling": {"RollingUpdatePolicy": {"MaximumBatchSize": HALF, "WaitIntervalInSeconds": wait_s}},
    }


POLICIES = policies(60)
WATCHFUL = policies(600)
"""For updates that are to be taken back: nobody waits so long, and a slow machine does not end them before."""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with serving_cloud(tmp_path_factory.mktemp("cloud"), SERVER) as cloud:
        alarms = cloud.client("cloudwatch")
        alarms.put_metric_alarm(
            AlarmName=ALARM, ComparisonOperator="GreaterThanThreshold", EvaluationPeriods=1, Threshold=1,
            Namespace="Tests", MetricName="rung-by-hand", Period=60, Statistic="Sum",
        )  # fmt: skip
        alarms.close()
        yield cloud


@pytest.fixture(scope="module")
def sagemaker(cloud: FakeCloud) -> Iterator[SageMaker]:
    settings = Settings(grace=2, health_deadline=8, invocation_timeout=10, deployment_speed=40, alarm_interval=0.1)
    service = SageMaker(cloud, Images(cloud), settings)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def call(cloud: FakeCloud, sagemaker: SageMaker) -> Client:
    client = Client(sagemaker)
    for name in ("old", "new", "does-not-start", "fails-its-self-test", "dies"):
        cloud.put(f"models/{name}.tar.gz", archive({"name": name}))
        container = {"Image": SERVER_URI, "ModelDataUrl": f"s3://{BUCKET}/models/{name}.tar.gz"}
        client("CreateModel", ModelName=name, PrimaryContainer=container, ExecutionRoleArn=ROLE)
        variant = {"VariantName": "main", "ModelName": name, "InstanceType": "ml.m5.large", "InitialInstanceCount": 2}
        client("CreateEndpointConfig", EndpointConfigName=name, ProductionVariants=[variant])
    return client


@pytest.fixture
def endpoint(cloud: FakeCloud, call: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh endpoint that serves ``old``, and a silent alarm."""
    ring(cloud, "OK")
    name = f"e-{abs(hash(request.node.name))}"
    call("CreateEndpoint", EndpointName=name, EndpointConfigName="old")
    assert settled(call, name)["EndpointStatus"] == "InService"
    yield name
    call("DeleteEndpoint", EndpointName=name)


def settled(call: Client, name: str) -> dict[str, Any]:
    return wait(lambda: call("DescribeEndpoint", EndpointName=name), "EndpointStatus", BUSY)


def ring(cloud: FakeCloud, state: str) -> None:
    client = cloud.client("cloudwatch")
    client.set_alarm_state(AlarmName=ALARM, StateValue=state, StateReason="a test")
    client.close()


@contextmanager
def load(sagemaker: SageMaker, name: str, tries: int = 1, clients: int = 4) -> Iterator[Counter[tuple[int, str]]]:
    """Requests without a pause from several clients; counts ``(status, answer)`` of all that were sent.

    ``tries``: how often a client of the API would ask before it gives up.
    """
    seen: Counter[tuple[int, str]] = Counter()
    sent = Counter[str]()
    lock, stopped = threading.Lock(), threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            with lock:
                sent["requests"] += 1
            for _ in range(tries):
                status, _, body = sagemaker.invoke_endpoint(name, b"x", {})
                if status == 200:
                    break
            with lock:
                seen[status, body.decode() if status == 200 else "failed"] += 1
            time.sleep(0.005)

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert seen.total() == sent["requests"]  # every request is accounted for


def until_answered(seen: Counter[tuple[int, str]], answer: str) -> None:
    deadline = time.monotonic() + 20
    while (200, answer) not in seen and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_request_fails_while_a_new_model_takes_over(sagemaker: SageMaker, call: Client, endpoint: str, policy: str):
    with load(sagemaker, endpoint) as seen:
        until_answered(seen, "old")
        given = {"DeploymentConfig": {**POLICIES[policy], **WATCHED}} if POLICIES[policy] else {}
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName="new", RetainAllVariantProperties=True, **given)
        described = settled(call, endpoint)
        until_answered(seen, "new")
    assert described["EndpointConfigName"] == "new", described.get("FailureReason")
    assert described["ProductionVariants"][0]["DesiredInstanceCount"] == 2
    assert {status for status, _ in seen} == {200}
    assert {answer for _, answer in seen} == {"old", "new"}
    assert sagemaker.invoke_endpoint(endpoint, b"x", {})[2] == b"new"


@pytest.mark.parametrize("bad", ["does-not-start", "fails-its-self-test"])
def test_a_model_that_cannot_prove_itself_never_gets_a_request(sagemaker: SageMaker, call: Client, endpoint: str, bad: str):
    with load(sagemaker, endpoint) as seen:
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName=bad, DeploymentConfig={**WATCHFUL["canary"], **WATCHED})
        described = settled(call, endpoint)
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("InService", "old")
    assert "did not pass the ping health check" in described["FailureReason"]
    assert set(seen) == {(200, "old")}


@pytest.mark.parametrize("policy", ["all at once", "canary", "rolling"])
def test_an_alarm_brings_the_old_model_back(cloud: FakeCloud, sagemaker: SageMaker, call: Client, endpoint: str, policy: str):
    with load(sagemaker, endpoint) as seen:
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName="new", DeploymentConfig={**WATCHFUL[policy], **WATCHED})
        until_answered(seen, "new")
        ring(cloud, "ALARM")
        described = settled(call, endpoint)
        before = seen[200, "new"]
        time.sleep(0.2)
        assert seen[200, "new"] <= before + 4  # those under way; nothing more goes to the new model
    assert before > 0
    assert described["EndpointConfigName"] == "old"
    assert ALARM in described["FailureReason"]
    assert {status for status, _ in seen} == {200}


def test_a_model_that_dies_while_it_takes_over_is_taken_back(sagemaker: SageMaker, call: Client, endpoint: str):
    with load(sagemaker, endpoint, tries=30) as seen:
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName="dies", DeploymentConfig=WATCHFUL["canary"])
        described = settled(call, endpoint)
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("InService", "old")
    assert "a container of the new fleet ended" in described["FailureReason"]
    assert set(seen) == {(200, "old")}


def test_an_update_names_the_old_configuration_until_it_is_done_and_the_pending_one(call: Client, endpoint: str):
    for given, then in (("new", "new"), ("does-not-start", "new")):
        before = call("DescribeEndpoint", EndpointName=endpoint)
        assert "PendingDeploymentSummary" not in before
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName=given, DeploymentConfig=POLICIES["canary"])
        moving = call("DescribeEndpoint", EndpointName=endpoint)
        assert (moving["EndpointStatus"], moving["EndpointConfigName"]) == ("Updating", before["EndpointConfigName"])
        assert moving["PendingDeploymentSummary"]["EndpointConfigName"] == given
        rests = settled(call, endpoint)
        assert rests["EndpointConfigName"] == then
        assert "PendingDeploymentSummary" not in rests


def test_two_updates_at_once_are_refused(call: Client, endpoint: str):
    call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName="new", DeploymentConfig=POLICIES["canary"])
    with pytest.raises(ServiceError, match="in-progress"):
        call("UpdateEndpoint", EndpointName=endpoint, EndpointConfigName="old")
    settled(call, endpoint)


def test_the_steps_of_an_update():
    third = {"Type": "CAPACITY_PERCENT", "Value": 34}
    linear = {"TrafficRoutingConfiguration": {"Type": "LINEAR", "LinearStepSize": third, "WaitIntervalInSeconds": 5}}
    assert _steps({}) == [(1.0, 0.0)]
    assert _steps(POLICIES["all at once"]) == [(1.0, 60.0)]
    assert _steps(POLICIES["canary"]) == [(0.5, 60.0), (1.0, 60.0)]
    assert _steps({"BlueGreenUpdatePolicy": linear}) == [(0.34, 5.0), (0.68, 5.0), (1.0, 5.0)]
    assert _steps(POLICIES["rolling"]) == [(0.5, 60.0), (1.0, 60.0)]


def test_cloudwatch_is_told_of_every_invocation(cloud: FakeCloud, sagemaker: SageMaker, endpoint: str):
    for _ in range(7):
        sagemaker.invoke_endpoint(endpoint, b"x", {})
    client, now = cloud.client("cloudwatch"), datetime.now(UTC)
    dimensions = [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": "main"}]

    def total(name: str, statistic: str) -> float:
        points = client.get_metric_statistics(
            Namespace="AWS/SageMaker", MetricName=name, Dimensions=dimensions, Statistics=[statistic],
            StartTime=now - timedelta(minutes=5), EndTime=now + timedelta(minutes=5), Period=600,
        )["Datapoints"]  # fmt: skip
        return sum(point[statistic] for point in points)

    deadline = time.monotonic() + 15
    while total("Invocations", "Sum") < 7 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert total("Invocations", "Sum") == 7
    assert total("Invocation5XXErrors", "Sum") == 0
    assert 0 < total("ModelLatency", "Average") < 10_000_000
    client.close()


def test_metrics_in_a_lambdas_log():
    about = {"CloudWatchMetrics": [{"Namespace": "N", "Dimensions": [["Endpoint"]], "Metrics": [{"Name": "Bad", "Unit": "Count"}]}]}
    line = json.dumps({"_aws": about, "Endpoint": "dogs", "Bad": 2})
    log = f'START\n{line}\n{{"_aws": 3}}\n{{"_aws" no json\nEND'
    assert embedded_metrics(log) == [("N", "Bad", 2.0, {"Endpoint": "dogs"})]


# --- Application Auto Scaling ----------------------------------------------------------------------------------------------

TARGET = {
    "ServiceNamespace": "sagemaker",
    "ResourceId": "endpoint/dogs/variant/main",
    "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
}
POLICY = {
    "PolicyName": "p",
    "PolicyType": "TargetTrackingScaling",
    "TargetTrackingScalingPolicyConfiguration": {
        "TargetValue": 100.0,
        "PredefinedMetricSpecification": {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"},
    },
}


@pytest.fixture
def scaling(cloud: FakeCloud) -> Client:
    return Client(Scaling(cloud, lambda name: ["main"] if name == "dogs" else []), "application-autoscaling")


def test_a_target_from_registration_to_its_end(scaling: Client):
    with pytest.raises(ServiceError, match="No scalable target found"):
        scaling("DeregisterScalableTarget", **TARGET)
    with pytest.raises(ServiceError, match="No scalable target found"):
        scaling("PutScalingPolicy", **TARGET, **POLICY)
    arn = scaling("RegisterScalableTarget", **TARGET, MinCapacity=1, MaxCapacity=3)["ScalableTargetARN"]
    assert scaling("RegisterScalableTarget", **TARGET, MaxCapacity=5)["ScalableTargetARN"] == arn
    (target,) = scaling("DescribeScalableTargets", ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 5)
    scaling("PutScalingPolicy", **TARGET, **POLICY)
    assert len(scaling("DescribeScalingPolicies", ServiceNamespace="sagemaker")["ScalingPolicies"]) == 1
    scaling("DeregisterScalableTarget", **TARGET)
    assert scaling("DescribeScalingPolicies", ServiceNamespace="sagemaker")["ScalingPolicies"] == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ResourceId": "endpoint/cats/variant/main"}, "not found or not active"),
        ({"ServiceNamespace": "ecs"}, "is emulated here"),
        ({"MinCapacity": 4}, "Maximum capacity cannot be less"),
    ],
)
def test_targets_that_there_are_not_are_refused(scaling: Client, changes: dict[str, Any], named: str):
    with pytest.raises(ServiceError, match=named):
        scaling("RegisterScalableTarget", **{**TARGET, "MinCapacity": 1, "MaxCapacity": 3, **changes})


def test_permissions_name_the_service(cloud: FakeCloud):
    (permission,) = Scaling(cloud, lambda _: []).permissions("RegisterScalableTarget", TARGET)
    assert permission.action == "application-autoscaling:RegisterScalableTarget"
    assert permission.context == {"application-autoscaling:service-namespace": "sagemaker"}
