"""A real-time endpoint under load: models come and go, bad ones are refused, a sleeping one is woken. Minutes long."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deployment import OVERRIDE, Rules, typical
from onnx import helper, numpy_helper
from rich.console import Console

from local_cloud import run

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

NAME = "dogs-local"
ENDPOINT = {
    "mode": "realtime", "min_instances": 2, "max_instances": 4, "update": "canary", "canary_percent": 50, "bake_s": 240,
    "startup_s": 60, "idle_hours": 1,
}  # fmt: skip
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def realtime(finished: Any, deployed: Any) -> Iterator[Any]:
    """The stack with a real-time endpoint in place of the serverless one, and the run's model on it; afterwards as it was."""
    package = finished.output["model_package"]
    change(deployed, {**OVERRIDE, "endpoint": ENDPOINT, "api": {"throttle_rate": 1000, "throttle_burst": 1000}}, package)
    yield deployed
    change(deployed, OVERRIDE, package)


def change(deployed: Any, override: dict[str, Any], package: str) -> None:
    """Deploy the stack anew, with an endpoint of its kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", deployed.cloud.url)
        run.deploy(int(deployed.cloud.url.rsplit(":", 1)[1]), "local", override, deployed.cloud.root, Console(quiet=True))
    asleep(deployed)  # a serverless endpoint cannot become a real-time one
    deploy(deployed, package)


def asleep(deployed: Any) -> None:
    sagemaker = deployed.cloud.client("sagemaker")
    sagemaker.delete_endpoint(EndpointName=NAME)
    while sagemaker.list_endpoints(NameContains=NAME)["Endpoints"]:
        time.sleep(0.2)


def deploy(deployed: Any, package: str) -> None:
    _, ended = deployed.execute({"action": "deploy", "model_package": package})
    assert ended["status"] == "SUCCEEDED", ended.get("cause")


def champion(deployed: Any) -> dict[str, Any]:
    answer = deployed.cloud.client("s3").get_object(Bucket=deployed.outputs["DataBucket"], Key="champion.json")
    return dict(json.loads(answer["Body"].read()))


@contextmanager
def load(deployed: Any, digits: Path, clients: int = 3) -> Iterator[Counter[int]]:
    """Pictures posted through the API without a pause; counts the statuses of all that were sent."""
    picture = typical(digits, "6").read_bytes()
    seen: Counter[int] = Counter()
    sent = Counter[str]()
    lock, stopped = threading.Lock(), threading.Event()

    def post() -> None:
        while not stopped.is_set():
            with lock:
                sent["requests"] += 1
            status, answer = deployed.post(picture, **deployed.authorized)
            right = status == 200 and answer["predictions"][0]["label"] == "6"
            with lock:
                seen[status if right or status != 200 else -1] += 1

    threads = [threading.Thread(target=post) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert seen.total() == sent["requests"]


def test_a_new_model_takes_over_under_load_and_no_request_fails(finished, realtime, digits):
    before = champion(realtime)["endpoint_config"]
    with load(realtime, digits) as seen:
        deploy(realtime, finished.output["model_package"])
    assert champion(realtime)["endpoint_config"] != before
    assert set(seen) == {200}
    assert seen[200] > 50
    found = realtime.cloud.client("sagemaker").describe_endpoint(EndpointName=NAME)
    assert found["ProductionVariants"][0]["DesiredInstanceCount"] == 2
    targets = realtime.cloud.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert [(t["MinCapacity"], t["MaxCapacity"]) for t in targets["ScalableTargets"]] == [(2, 4)]


# --- bad models ------------------------------------------------------------------------------------------------------------


def _fp32(files: Files, **changes: Any) -> None:
    """The model served from model.onnx, which the faults below are made in."""
    # Without hashes: damage of that kind is refused earlier, and tests/faults/test_artifacts.py has it.
    description = {**json.loads(files["model.json"]), "form": "onnxruntime-fp32", "sha256": {}, **changes}
    files["model.json"] = json.dumps(description).encode()


def does_not_start(files: Files) -> None:
    _fp32(files)
    files["model.onnx"] = files["model.onnx"][:1000]


def answers_with_errors(files: Files) -> None:
    preprocessing = json.loads(files["model.json"])["preprocessing"]
    _fp32(files, preprocessing={**preprocessing, "image_size": 24})


def answers_nonsense(files: Files) -> None:
    _fp32(files)
    model = onnx.load_from_string(files["model.onnx"])
    names = {name for node in model.graph.node if "logits" in node.output for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in names]
    assert weights
    for tensor in weights:
        values = numpy_helper.to_array(tensor)
        axis = values.shape.index(10)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.roll(values, 3, axis=axis)), tensor.name))
    files["model.onnx"] = model.SerializeToString()


def is_slow(files: Files) -> None:
    _fp32(files)
    model = onnx.load_from_string(files["model.onnx"])
    graph = model.graph
    for node in graph.node:
        for position, name in enumerate(node.output):
            if name == "logits":
                node.output[position] = "true_logits"
    side = 3000
    graph.initializer.append(numpy_helper.from_array(np.array([side, side], dtype=np.int64), "slow_shape"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "slow_zero"))
    graph.node.extend([
        helper.make_node("ReduceMean", ["input"], ["slow_mean"], keepdims=0),
        helper.make_node("Mul", ["slow_mean", "slow_zero"], ["slow_nothing"]),
        helper.make_node("Expand", ["slow_nothing", "slow_shape"], ["slow_0"]),
        *[helper.make_node("MatMul", [f"slow_{n}", "slow_0"], [f"slow_{n + 1}"]) for n in range(16)],
        helper.make_node("ReduceMean", ["slow_16"], ["slow_end"], keepdims=0),
        helper.make_node("Add", ["true_logits", "slow_end"], ["logits"]),
    ])  # fmt: skip
    onnx.checker.check_model(model)
    files["model.onnx"] = model.SerializeToString()


def package_of(deployed: Any, good: str, name: str, spoil: Callable[[Files], None]) -> str:
    """A model package whose artifact is a good one's, spoiled."""
    s3, bucket = deployed.cloud.client("s3"), deployed.outputs["DataBucket"]
    sagemaker = deployed.cloud.client("sagemaker")
    known = sagemaker.describe_model_package(ModelPackageName=good)
    container = known["InferenceSpecification"]["Containers"][0]
    key = container["ModelDataUrl"].removeprefix(f"s3://{bucket}/")
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(s3.get_object(Bucket=bucket, Key=key)["Body"].read())) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name] = content.read()
    spoil(files)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    s3.put_object(Bucket=bucket, Key=f"models/{name}/model.tar.gz", Body=packed.getvalue())
    return str(
        sagemaker.create_model_package(
            ModelPackageGroupName=NAME,
            ModelApprovalStatus="Approved",
            InferenceSpecification={
                "Containers": [{"Image": container["Image"], "ModelDataUrl": f"s3://{bucket}/models/{name}/model.tar.gz"}],
                "SupportedContentTypes": ["image/png"],
                "SupportedResponseMIMETypes": ["application/json"],
            },
            CustomerMetadataProperties={**known["CustomerMetadataProperties"], "run": name},
        )["ModelPackageArn"]
    )


@pytest.mark.parametrize("spoil", [does_not_start, answers_with_errors, answers_nonsense, is_slow])
def test_a_bad_model_is_taken_back_and_no_request_fails(finished, realtime, digits, spoil):
    before = champion(realtime)
    package = package_of(realtime, finished.output["model_package"], spoil.__name__.replace("_", "-"), spoil)
    with load(realtime, digits) as seen:
        _, ended = realtime.execute({"action": "deploy", "model_package": package})
    assert ended["status"] == "FAILED"
    assert "expected InService with" in ended["cause"]
    assert champion(realtime) == before
    assert set(seen) == {200}
    assert seen[200] > 50
    described = realtime.cloud.client("sagemaker").describe_endpoint(EndpointName=NAME)
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("InService", before["endpoint_config"])


# --- sleep -----------------------------------------------------------------------------------------------------------------


def test_fifty_posts_wake_a_sleeping_endpoint_with_one_deployment(realtime, digits, request):
    rules = Rules(realtime.cloud.root)
    functions = realtime.cloud.client("lambda").list_functions()["Functions"]
    (idle,) = [function["FunctionName"] for function in functions if function["Handler"] == "idle.handle"]
    answer = json.loads(realtime.cloud.client("lambda").invoke(FunctionName=idle)["Payload"].read())
    assert answer["asleep"] is False  # it was changed a minute ago
    asleep(realtime)
    picture = typical(digits, "6").read_bytes()
    # A fast machine wakes the endpoint before the last of fifty functions has started; this one wakes when all have asked.
    obeyed = rules.obeyed()
    request.addfinalizer(rules.set)
    rules.set({"call": "^sagemaker:CreateEndpoint$", "delay_s": 30})
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: realtime.post(picture, **realtime.authorized), range(50)))
    assert {status for status, _ in answers} == {503}
    # Fifty functions start at once on this machine's few cores: some are too slow to ask, and say so.
    assert {body["error"]["code"] for _, body in answers} <= {"waking_up", "unavailable", "model_starting"}
    states = realtime.cloud.client("stepfunctions")
    machine = realtime.outputs["StateMachineArn"]
    woken = [e for e in states.list_executions(stateMachineArn=machine)["executions"] if e["name"].startswith("wake-")]
    assert len(woken) == 1
    deadline = time.monotonic() + 120
    while (status := realtime.post(picture, **realtime.authorized)[0]) != 200 and time.monotonic() < deadline:
        time.sleep(1)
    assert status == 200
    assert rules.obeyed() == obeyed + 1
    while states.describe_execution(executionArn=woken[0]["executionArn"])["status"] == "RUNNING":
        time.sleep(0.5)
    assert states.describe_execution(executionArn=woken[0]["executionArn"])["status"] == "SUCCEEDED"
    history = states.get_execution_history(executionArn=woken[0]["executionArn"], maxResults=1000)["events"]
    created = [e for e in history if e.get("stateEnteredEventDetails", {}).get("name") == "CreateEndpoint"]
    assert len(created) == 1
