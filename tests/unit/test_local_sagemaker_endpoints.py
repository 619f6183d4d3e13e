"""Models, packages and endpoints of the local SageMaker: real servers, updates, failures, limits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from local_fakes import BUCKET, CALLER, IMAGE, ROLE, SERVER_URI, Client, FakeCloud, archive, serving_cloud, wait

from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.sagemaker.endpoints import SERVERLESS_BODY
from local_cloud.service import ServiceError

SERVER = """
import http.server, json, os, sys, time
assert sys.argv[1] == "serve"
folder = os.environ["SM_MODEL_DIR"]
name = open(folder + "/name").read()
if name == "broken": sys.exit(9)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.answer(200, b"ok")
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"die": os._exit(1)
        if body.startswith(b"until "):
            print("slow one", flush=True)
            while not os.path.exists(body[6:]): time.sleep(0.01)
        code = 415 if body == b"bad" else 200
        told = {"name": name, "pid": os.getpid(), "type": self.headers["Content-Type"], "accept": self.headers["Accept"],
            "custom": self.headers["X-Amzn-SageMaker-Custom-Attributes"], "extra": os.environ.get("EXTRA")}
        self.answer(code, json.dumps(told).encode())
    def answer(self, code, body):
        self.send_response(code); self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): print("request", self.path, flush=True)
print("starting", name, flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
"""
BUSY = ("Creating", "Updating", "Deleting")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with serving_cloud(tmp_path_factory.mktemp("cloud"), SERVER) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def sagemaker(cloud: FakeCloud) -> Iterator[SageMaker]:
    service = SageMaker(cloud, Images(cloud), Settings(grace=2, health_deadline=15, invocation_timeout=10))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def call(sagemaker: SageMaker) -> Client:
    return Client(sagemaker)


def deployable(cloud: FakeCloud, call: Client, name: str, **variant: Any) -> None:
    """A model and an endpoint configuration of this name whose server tells the name."""
    cloud.put(f"models/{name}.tar.gz", archive({"name": name, "code/x.py": ""}))
    container = {
        "Image": SERVER_URI,
        "ModelDataUrl": f"s3://{BUCKET}/models/{name}.tar.gz",
        "Environment": {"EXTRA": "/opt/ml/model"},
    }
    call("CreateModel", ModelName=name, PrimaryContainer=container, ExecutionRoleArn=ROLE)
    serverless = {"ServerlessConfig": {"MemorySizeInMB": 1024, "MaxConcurrency": 1}}
    production = {"VariantName": "all", "ModelName": name, **(variant or serverless)}
    call("CreateEndpointConfig", EndpointConfigName=name, ProductionVariants=[production])


def settled(call: Client, name: str) -> dict[str, Any]:
    return wait(lambda: call("DescribeEndpoint", EndpointName=name), "EndpointStatus", BUSY)


def test_an_endpoint_from_creation_to_deletion(cloud: FakeCloud, sagemaker: SageMaker, call: Client) -> None:
    deployable(cloud, call, "one")
    deployable(cloud, call, "two", InstanceType="ml.m5.large", InitialInstanceCount=1)
    deployable(cloud, call, "broken")
    call("CreateEndpoint", EndpointName="E", EndpointConfigName="one")
    made = settled(call, "E")
    assert made["EndpointStatus"] == "InService", made.get("FailureReason")
    assert made["EndpointArn"].endswith(":endpoint/e")
    assert made["ProductionVariants"][0]["CurrentServerlessConfig"]["MaxConcurrency"] == 1

    headers = {"content-type": "image/png", "accept": "application/json", "x-amzn-sagemaker-custom-attributes": "top_k=3"}
    status, answered, body = sagemaker.invoke_endpoint("E", b"hello", headers)
    told = json.loads(body)
    assert status == 200
    assert answered["Content-Type"] == "application/json"
    assert answered["x-Amzn-Invoked-Production-Variant"] == "all"
    assert (told["name"], told["type"], told["custom"]) == ("one", "image/png", "top_k=3")
    assert told["extra"].endswith("/opt/ml/model")

    status, answered, body = sagemaker.invoke_endpoint("E", b"bad", {})
    problem = json.loads(body)
    assert (status, answered["x-amzn-errortype"], problem["OriginalStatusCode"]) == (424, "ModelError", 415)
    assert json.loads(problem["OriginalMessage"])["name"] == "one"
    assert sagemaker.invoke_endpoint("E", b"x" * (SERVERLESS_BODY + 1), {})[0] == 413

    free = cloud.root / "free"
    slow = threading.Thread(target=sagemaker.invoke_endpoint, args=("E", b"until " + os.fsencode(free), {}))
    slow.start()
    log = cloud.root / "logs" / "endpoints" / "E.log"
    while "slow one" not in log.read_text():
        assert slow.is_alive()
        time.sleep(0.02)
    assert sagemaker.invoke_endpoint("E", b"hello", {})[1]["x-amzn-errortype"] == "ThrottlingException"
    free.touch()
    slow.join()

    call("UpdateEndpoint", EndpointName="E", EndpointConfigName="broken")
    with pytest.raises(ServiceError, match="in-progress"):
        call("DeleteEndpoint", EndpointName="E")
    kept = settled(call, "E")
    assert (kept["EndpointStatus"], kept["EndpointConfigName"]) == ("InService", "one")
    assert "did not pass the ping health check" in kept["FailureReason"]
    assert json.loads(sagemaker.invoke_endpoint("E", b"hello", {})[2])["name"] == "one"

    call("UpdateEndpoint", EndpointName="E", EndpointConfigName="two")
    moved = settled(call, "E")
    assert (moved["EndpointStatus"], moved["EndpointConfigName"]) == ("InService", "two")
    assert "FailureReason" not in moved
    assert json.loads(sagemaker.invoke_endpoint("E", b"hello", {})[2])["name"] == "two"
    assert "starting two" in log.read_text()

    call("DeleteEndpoint", EndpointName="E")
    gone(call, "E")
    status, answered, body = sagemaker.invoke_endpoint("E", b"hello", {})
    assert (status, answered["x-amzn-errortype"]) == (400, "ValidationError")
    assert "not found" in json.loads(body)["Message"]
    assert not list((cloud.root / "endpoints" / "E").glob("*"))


def gone(call: Client, name: str) -> None:
    message = f'Could not find endpoint "arn:aws:sagemaker:us-east-1:123456789012:endpoint/{name.lower()}".'
    wait(lambda: {"there": bool(call("ListEndpoints", NameContains=name)["Endpoints"])}, "there", (True,))
    with pytest.raises(ServiceError) as missing:
        call("DescribeEndpoint", EndpointName=name)
    assert (missing.value.code, missing.value.message) == ("ValidationException", message)


def test_a_failed_endpoint_says_why_and_can_only_be_deleted(cloud: FakeCloud, call: Client) -> None:
    cloud.put("models/none.tar.gz", b"not an archive")
    container = {"Image": SERVER_URI, "ModelDataUrl": f"s3://{BUCKET}/models/none.tar.gz"}
    call("CreateModel", ModelName="none", PrimaryContainer=container, ExecutionRoleArn=ROLE)
    variant = {"VariantName": "v", "ModelName": "none", "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 5}}
    call("CreateEndpointConfig", EndpointConfigName="none", ProductionVariants=[variant])
    call("CreateEndpoint", EndpointName="failed", EndpointConfigName="none")
    made = settled(call, "failed")
    assert made["EndpointStatus"] == "Failed"
    assert "Failed to download model data" in made["FailureReason"]
    with pytest.raises(ServiceError, match="delete it"):
        call("UpdateEndpoint", EndpointName="failed", EndpointConfigName="none")
    call("DeleteEndpoint", EndpointName="failed")
    gone(call, "failed")


def test_a_dead_server_is_started_once_more(cloud: FakeCloud, sagemaker: SageMaker, call: Client) -> None:
    deployable(cloud, call, "mortal")
    call("CreateEndpoint", EndpointName="mortal", EndpointConfigName="mortal")
    assert settled(call, "mortal")["EndpointStatus"] == "InService"
    first = json.loads(sagemaker.invoke_endpoint("mortal", b"hello", {})[2])["pid"]
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 40
    while (asked := sagemaker.invoke_endpoint("mortal", b"hello", {}))[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    second = json.loads(asked[2])["pid"]
    assert second != first
    status, answered, _ = sagemaker.invoke_endpoint("mortal", b"die", {})
    assert (status, answered["x-amzn-errortype"]) == (424, "ModelError")
    assert sagemaker.invoke_endpoint("mortal", b"hello", {})[0] == 424
    assert call("DescribeEndpoint", EndpointName="mortal")["EndpointStatus"] == "InService"


def test_versions_of_a_model_package_and_a_model_from_one(cloud: FakeCloud, sagemaker: SageMaker, call: Client) -> None:
    group = call("CreateModelPackageGroup", ModelPackageGroupName="dogs")["ModelPackageGroupArn"]
    with pytest.raises(ServiceError, match="already exists"):
        call("CreateModelPackageGroup", ModelPackageGroupName="dogs")
    specification = {
        "Containers": [{"Image": SERVER_URI, "ModelDataUrl": f"s3://{BUCKET}/models/x.tar.gz"}],
        "SupportedContentTypes": ["image/png"],
        "SupportedResponseMIMETypes": ["application/json"],
    }
    request = {"ModelPackageGroupName": "dogs", "InferenceSpecification": specification, "CustomerMetadataProperties": {"run": "1"}}
    assert sagemaker.permissions("CreateModelPackage", request)[0].resource.endswith(":model-package/dogs/1")
    first = call("CreateModelPackage", **request)["ModelPackageArn"]
    second = call("CreateModelPackage", **request, ModelApprovalStatus="Approved")["ModelPackageArn"]
    assert [first.rsplit(":", 1)[1], second.rsplit(":", 1)[1]] == ["model-package/dogs/1", "model-package/dogs/2"]
    described = call("DescribeModelPackage", ModelPackageName=first)
    assert (described["ModelPackageVersion"], described["ModelApprovalStatus"]) == (1, "PendingManualApproval")
    assert described["CreatedBy"]["IamIdentity"]["Arn"] == CALLER.arn
    with pytest.raises(ServiceError, match="PendingManualApproval"):
        call("CreateModel", ModelName="p", PrimaryContainer={"ModelPackageName": first}, ExecutionRoleArn=ROLE)
    call("UpdateModelPackage", ModelPackageArn=first, ModelApprovalStatus="Approved", CustomerMetadataProperties={"more": "2"})
    assert call("DescribeModelPackage", ModelPackageName=first)["CustomerMetadataProperties"] == {"run": "1", "more": "2"}
    call("CreateModel", ModelName="p", PrimaryContainer={"ModelPackageName": first}, ExecutionRoleArn=ROLE)
    assert call("DescribeModel", ModelName="p")["ModelArn"].endswith(":model/p")
    listed = call("ListModelPackages", ModelPackageGroupName="dogs", SortOrder="Ascending")["ModelPackageSummaryList"]
    assert [item["ModelPackageVersion"] for item in listed] == [1, 2]
    assert call("ListModelPackages")["ModelPackageSummaryList"] == []
    with pytest.raises(ServiceError) as full:
        call("DeleteModelPackageGroup", ModelPackageGroupName="dogs")
    assert full.value.code == "ConflictException"
    for resource in (first, second):
        call("DeleteModelPackage", ModelPackageName=resource)
    call("DeleteModelPackageGroup", ModelPackageGroupName=group)
    with pytest.raises(ServiceError, match="does not exist"):
        call("DescribeModelPackageGroup", ModelPackageGroupName="dogs")


@pytest.mark.parametrize(
    ("operation", "request_", "named"),
    [
        ("CreateEndpoint", {"EndpointName": "x", "EndpointConfigName": "missing"}, "Could not find endpoint configuration"),
        ("DeleteModel", {"ModelName": "missing"}, "Could not find model"),
        (
            "CreateEndpointConfig",
            {"EndpointConfigName": "x", "ProductionVariants": [{"VariantName": "v", "ModelName": "no"}]},
            "find model",
        ),
        (
            "CreateEndpointConfig",
            {"EndpointConfigName": "x", "ProductionVariants": [], "DataCaptureConfig": {"a": 1}},
            "DataCaptureConfig",
        ),
        (
            "UpdateEndpoint",
            {"EndpointName": "x", "EndpointConfigName": "y", "RetainDeploymentConfig": True},
            "RetainDeploymentConfig",
        ),
        (
            "CreateModel",
            {"ModelName": "m", "ExecutionRoleArn": ROLE, "PrimaryContainer": {"Image": "docker.io/nginx:1"}},
            "docker.io/nginx:1",
        ),
        ("CreateTransformJob", {"TransformJobName": "t"}, "CreateTransformJob is not emulated"),
    ],
)
def test_refusals_name_what_is_wrong(sagemaker: SageMaker, operation: str, request_: dict[str, Any], named: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        sagemaker.call(operation, request_, CALLER)
    assert refusal.value.code == "ValidationException"
    assert named in refusal.value.message


def test_a_training_container_cannot_serve_and_nothing_outlives_the_cloud(cloud: FakeCloud) -> None:
    service = SageMaker(cloud, Images(cloud), Settings(grace=5))
    call = Client(service)
    call("CreateModel", ModelName="t", PrimaryContainer={"Image": IMAGE}, ExecutionRoleArn=ROLE)
    variant = {"VariantName": "v", "ModelName": "t", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
    call("CreateEndpointConfig", EndpointConfigName="t", ProductionVariants=[variant])
    call("CreateEndpoint", EndpointName="t", EndpointConfigName="t")
    assert "cannot serve" in settled(call, "t")["FailureReason"]
    deployable(cloud, call, "last")
    call("CreateEndpoint", EndpointName="last", EndpointConfigName="last")
    assert settled(call, "last")["EndpointStatus"] == "InService"
    pid = json.loads(service.invoke_endpoint("last", b"hello", {})[2])["pid"]
    service.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
