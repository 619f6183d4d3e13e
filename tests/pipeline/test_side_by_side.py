"""Two whole executions of one state machine, started in the same second on a fresh stack."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from deployment import Account, Deployment, copy_few, destroy, typical
from rich.console import Console

from local_cloud import run, source

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

PER_CLASS = 20
"""Pictures of each digit and split: what two executions do to each other is under test here, not the accuracy."""
OVERRIDE = {
    "name": "twins",
    "input": {
        "hyperparameters": {"epochs": 3, "horizontal_flip": False},
        "tuning": {"max_jobs": 2, "batch_size": [64]},
        "quality_gate": {"min_top1": 0.1},
    },
}
NAMES = ("first", "second")
LIMIT_S = 2400


@pytest.fixture
def twins(cloud: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    quiet, few = Console(quiet=True), tmp_path / "digits"
    copy_few(digits, few, PER_CLASS)
    outputs = run.deploy(int(cloud.url.rsplit(":", 1)[1]), "local", OVERRIDE, cloud.root, quiet)
    run.upload(source.Source("local", source._zip(few, tmp_path), None), None, outputs["DataBucket"], quiet)
    token = cloud.client("secretsmanager").get_secret_value(SecretId=outputs["TokenSecretArn"])["SecretString"]
    yield Deployment(cloud, outputs, token)
    destroy(cloud, "local", OVERRIDE)


def jobs(cloud: Any) -> list[str]:
    """Names of all jobs of the stack, of whatever kind."""
    sagemaker = cloud.client("sagemaker")
    found = [
        *(one["ProcessingJobName"] for one in sagemaker.list_processing_jobs(MaxResults=100)["ProcessingJobSummaries"]),
        *(one["TrainingJobName"] for one in sagemaker.list_training_jobs(MaxResults=100)["TrainingJobSummaries"]),
        *(
            one["HyperParameterTuningJobName"]
            for one in sagemaker.list_hyper_parameter_tuning_jobs(MaxResults=100)["HyperParameterTuningJobSummaries"]
        ),
    ]
    return [name for name in found if name.startswith("twins-local-")]


def test_two_whole_executions_in_the_same_second_end_well(twins: Deployment, digits: Path):
    """Each prepares, tunes and trains under its own names; one deploys, the other waits for it or says that it was overtaken."""
    cloud, outputs = twins.cloud, twins.outputs
    states, sagemaker = cloud.client("stepfunctions"), cloud.client("sagemaker")
    machine = outputs["StateMachineArn"]
    with ThreadPoolExecutor(len(NAMES)) as starters:
        started = starters.map(lambda name: states.start_execution(stateMachineArn=machine, name=name, input="{}"), NAMES)
        arns = [one["executionArn"] for one in started]
    deadline_s = time.monotonic() + LIMIT_S
    both = [states.describe_execution(executionArn=arn) for arn in arns]
    while any(one["status"] == "RUNNING" for one in both):
        assert time.monotonic() < deadline_s
        time.sleep(1)
        both = [states.describe_execution(executionArn=arn) for arn in arns]
    assert "SUCCEEDED" in [one["status"] for one in both], "\n".join(one.get("cause", "") for one in both)
    for one in both:
        assert one["status"] == "SUCCEEDED" or "Another execution deployed meanwhile" in one["cause"], one["cause"]
    assert abs((both[0]["startDate"] - both[1]["startDate"]).total_seconds()) < 1

    made = jobs(cloud)
    assert len(made) == len(set(made))
    owners = {re.search(r"-([0-9a-f]{8})[0-9a-f]{8}(?:-|$)", name)[1] for name in made}
    assert len(owners) == len(NAMES), f"two executions, so two sets of names: {made}"
    work = [name for name in made if "-report-" not in name]  # who was overtaken reports once more
    assert len({sum(owner in name for name in work) for owner in owners}) == 1, f"as many jobs each: {work}"
    results = [json.loads(one["output"]) for one in both if one["status"] == "SUCCEEDED"]
    assert len({one["dataset_hash"] for one in results}) == 1, "both prepared the same pictures"
    assert len({one["model_package"] for one in results}) == len(results)

    endpoint = sagemaker.describe_endpoint(EndpointName="twins-local")
    assert endpoint["EndpointStatus"] == "InService"
    champion = json.loads(cloud.client("s3").get_object(Bucket=outputs["DataBucket"], Key="champion.json")["Body"].read())
    assert champion["endpoint_config"] == endpoint["EndpointConfigName"], "what serves is what the notes say"
    status, answer = twins.post(typical(digits, "6").read_bytes(), **twins.authorized)
    assert status == 200, answer
    held = Account(cloud).holds("twins-local")
    served = [one for one in both if one["status"] == "SUCCEEDED" or "The smoke test passed." in one["cause"]]
    assert len(held["endpoint config"]) == len(served), "what served well stays for the way back; other things are taken back"
    print(f"{[one['status'] for one in both]} in {max(one['stopDate'] for one in both) - both[0]['startDate']}, {len(made)} jobs")
