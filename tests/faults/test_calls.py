"""Row 4: each API call fails once. The run recovers, or cleans up and says why; the old endpoint answers throughout."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deployment import LONGER, TWO_TRIALS, Rules, typical
from fault_table import Landed

pytestmark = [pytest.mark.fault(4), pytest.mark.pipeline]

FAULTS: dict[str, dict[str, Any]] = {
    "throttling": {"code": "ThrottlingException", "status": 400},
    "internal error": {"code": "InternalFailure", "status": 500},
    "lost answer": {"code": "InternalFailure", "status": 500, "after": True},
    "no quota": {"code": "ResourceLimitExceeded", "status": 400},
    "no permission": {"code": "AccessDeniedException", "status": 400},
}
SPELLED = {
    ("s3", "ThrottlingException"): {"code": "SlowDown", "status": 503},
    ("s3", "AccessDeniedException"): {"code": "AccessDenied", "status": 403},
    ("lambda", "ThrottlingException"): {"code": "TooManyRequestsException", "status": 429},
    ("lambda", "InternalFailure"): {"code": "ServiceException", "status": 500},
    ("sns", "ThrottlingException"): {"code": "Throttled", "status": 429},
    ("sns", "AccessDeniedException"): {"code": "AuthorizationError", "status": 403},
}
"""What a service calls the same fault."""


def fault_of(call: str, role: str, name: str) -> dict[str, Any]:
    fault = FAULTS[name]
    spelled = SPELLED.get((call.partition(":")[0], fault["code"]), {})
    return {"call": f"^{re.escape(call)}$", "caller": f"/{re.escape(role)}/", **fault, **spelled}


@contextmanager
def load(deployed: Any, digits: Path) -> Iterator[Counter[Any]]:
    """One client that posts a picture again and again; counts statuses, or -1 for a wrong label."""
    picture = typical(digits, "6").read_bytes()
    seen: Counter[Any] = Counter()
    stopped = threading.Event()

    def post() -> None:
        while not stopped.is_set():
            status, answer = deployed.post(picture, **deployed.authorized)
            right = status == 200 and answer["predictions"][0]["label"] == "6"
            seen[status if right or status != 200 else -1] += 1
            time.sleep(0.2)

    thread = threading.Thread(target=post)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


class State:
    """What an account holds of the stage's endpoint."""

    def __init__(self, deployed: Any) -> None:
        sagemaker = deployed.cloud.client("sagemaker")
        self.endpoint = sagemaker.describe_endpoint(EndpointName="dogs-local")
        self.configs = {one["EndpointConfigName"] for one in sagemaker.list_endpoint_configs()["EndpointConfigs"]}
        self.models = {one["ModelName"] for one in sagemaker.list_models()["Models"]}
        body = deployed.cloud.client("s3").get_object(Bucket=deployed.outputs["DataBucket"], Key="champion.json")["Body"].read()
        self.champion = json.loads(body)
        config = sagemaker.describe_endpoint_config(EndpointConfigName=self.endpoint["EndpointConfigName"])
        self.serving = config["ProductionVariants"][0]["ModelName"]

    def problems(self) -> list[str]:
        """What is not as it must be whatever happened."""
        found = []
        if self.endpoint["EndpointStatus"] != "InService":
            found.append(f"the endpoint is {self.endpoint['EndpointStatus']}")
        if self.champion["endpoint_config"] != self.endpoint["EndpointConfigName"]:
            found.append("the champion is not what serves")
        if self.serving not in self.models:
            found.append("the model that serves is gone")
        return found


def settled(deployed: Any) -> None:
    sagemaker = deployed.cloud.client("sagemaker")
    while sagemaker.describe_endpoint(EndpointName="dogs-local")["EndpointStatus"] not in ("InService", "Failed"):
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_call_of_a_deployment_fails_once_in_each_way(finished, deployed, digits, landed: Landed):
    rules, package = Rules(deployed.cloud.root), finished.output["model_package"]
    given = {"action": "deploy", "model_package": package}
    before = len(rules.calls())
    assert deployed.execute(given)[1]["status"] == "SUCCEEDED"
    calls = list(dict.fromkeys(one for one in rules.calls()[before:] if re.search(r"(StateMachine|SmokeTest|CleanUp)", one[1])))
    assert {"sagemaker:CreateModel", "sagemaker:UpdateEndpoint", "sagemaker:DescribeEndpoint"} <= {name for name, _ in calls}
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    with load(deployed, digits) as seen:
        for call, role in calls:
            for name in FAULTS:
                was, obeyed = State(deployed), rules.obeyed()
                rules.set(fault_of(call, role, name))
                _, ended = deployed.execute(given)
                rules.set()
                settled(deployed)
                what = f"{call} by {role}, {name}: {ended['status']} {str(ended.get('cause'))[:400]}"
                print(what)
                if rules.obeyed() == obeyed:
                    problems.append(f"{what}: the fault never came")
                    continue
                landed()
                outcomes[ended["status"]] += 1
                now = State(deployed)
                problems += [f"{what}: {problem}" for problem in now.problems()]
                new = (len(now.models - was.models), len(now.configs - was.configs))
                if new != ((1, 1) if ended["status"] == "SUCCEEDED" else (0, 0)):
                    problems.append(f"{what}: left {new} models and configurations")
                if ended["status"] == "FAILED":
                    if not re.search(r"a fault on demand|[Ff]ault|Throttl|Exception|expected", ended["cause"]):
                        problems.append(f"{what}: the cause is not named")
                    if now.endpoint["EndpointConfigName"] != was.endpoint["EndpointConfigName"]:
                        problems.append(f"{what}: a failed run changed the endpoint")
    assert problems == []
    assert set(seen) == {200}, seen
    assert outcomes["SUCCEEDED"] > outcomes["FAILED"] / 4, outcomes
    print(outcomes, seen)


# --- a whole run -------------------------------------------------------------------------------------------------------------


def kind_of(call: str) -> str:
    """A call without the names in it: service and operation, or method."""
    return call.split(" ")[0]


def running(deployed: Any) -> list[str]:
    sagemaker = deployed.cloud.client("sagemaker")
    found = [one["TrainingJobName"] for one in sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]]
    found += [
        one["ProcessingJobName"] for one in sagemaker.list_processing_jobs(StatusEquals="InProgress")["ProcessingJobSummaries"]
    ]
    listed = sagemaker.list_hyper_parameter_tuning_jobs(StatusEquals="InProgress")["HyperParameterTuningJobSummaries"]
    return found + [one["HyperParameterTuningJobName"] for one in listed]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throttling", "internal error"])
def test_a_run_in_which_the_first_call_of_each_kind_fails_recovers(finished, deployed, digits, landed: Landed, name: str):
    """Of the machine, of every job and of the Lambdas: the first call of each kind that each role makes."""
    rules = Rules(deployed.cloud.root)
    kinds = {(kind_of(call), role) for call, role in rules.calls() if role.startswith("ImageClassifier") and "Predict" not in role}
    # SageMaker itself writes a job's log, and the API's own Lambdas serve the load.
    kinds = {(kind, role) for kind, role in kinds if not kind.startswith("logs:") and not re.search("Authoriz|Api|Build", role)}
    assert len(kinds) > 20
    rules.set(*({**fault_of(kind, role, name), "call": f"^{re.escape(kind)}( |$)"} for kind, role in sorted(kinds)))
    before = rules.obeyed()
    try:
        with load(deployed, digits) as seen:
            _, ended = deployed.execute({**LONGER, **TWO_TRIALS})
    finally:
        rules.set()
    landed(rules.obeyed() - before)
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    assert State(deployed).problems() == []
    assert set(seen) == {200}, seen
    assert running(deployed) == []


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["CreateProcessingJob", "CreateHyperParameterTuningJob", "CreateTrainingJob"])
def test_a_job_whose_start_was_never_heard_of_does_not_run_on(finished, deployed, landed: Landed, operation: str):
    rules = Rules(deployed.cloud.root)
    before = rules.obeyed()
    rules.set({"call": f"^sagemaker:{operation}$", "caller": "StateMachine", **FAULTS["lost answer"]})
    try:
        _, ended = deployed.execute({**LONGER, **TWO_TRIALS})
    finally:
        rules.set()
    landed(rules.obeyed() - before)
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    deadline = time.monotonic() + 30
    while running(deployed) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert running(deployed) == []
    assert State(deployed).problems() == []
