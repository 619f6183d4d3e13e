"""One deployment and one execution of the whole state machine, shared by all tests that need them; what an account holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from rich.console import Console

from local_cloud import run
from local_cloud.digits import write_digits
from local_cloud.source import Source

# A lighter network, fewer and shorter trials than `make run`: the chain is under test here, not the accuracy.
OVERRIDE = {
    "input": {
        "backbone": "shufflenet_v2_x1_0",
        "hyperparameters": {"epochs": 5, "horizontal_flip": False},
        "tuning": {"max_jobs": 3, "max_parallel_jobs": 2},
        "quality_gate": {"min_top1": 0.7},
    }
}


LONGER = {"hyperparameters": {**OVERRIDE["input"]["hyperparameters"], "epochs": 8}}
"""An execution's input where its model meets one that serves: after five epochs two models can differ by more than the quality
gate allows (top1 0.91 to 0.99, by the learning rate that was drawn), after eight none is so weak (0.97 to 0.99)."""
TWO_TRIALS = {"tuning": {"max_jobs": 2, "max_parallel_jobs": 2, "batch_size": [64]}}
"""And where what it finds does not matter: trials run side by side, and with small batches every one does well."""
STOPPED = {**TWO_TRIALS, "hyperparameters": {"epochs": 2}}
"""And where it is stopped on its way: no gate judges it, and it is soon where it shall be stopped."""


@dataclass
class Deployment:
    """A deployed stack and what a test needs to use it as a person would."""

    cloud: Any
    outputs: dict[str, str]
    token: str
    quiet: Console = field(default_factory=lambda: Console(quiet=True))

    def post(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        """POST to /predict; (status, JSON)."""
        return self.request("predict", body, {"Content-Type": "image/png", **headers})

    def request(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        url = f"{self.outputs['ApiUrl'].rstrip('/')}/{path}"
        asked = urllib.request.Request(url, data=body, headers=headers or {})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                content, status = answer.read(), answer.status
        except urllib.error.HTTPError as error:
            with error:
                content, status = error.read(), error.code
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode("utf-8", "replace")

    def fetch(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, Any]:
        """POST; the answer's bytes and headers. Raises HTTPError."""
        url = f"{self.outputs['ApiUrl'].rstrip('/')}/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=60) as answer:
            return answer.read(), answer.headers

    @property
    def authorized(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def execute(self, machine_input: dict[str, Any]) -> tuple[run.Follower, dict[str, Any]]:
        follower, ended = run.execute(self.outputs, machine_input, self.cloud.root, self.quiet)
        return follower, ended

    def denied(self) -> list[str]:
        """Calls that IAM has refused so far."""
        path = self.cloud.root / "denied.jsonl"
        return path.read_text().splitlines() if path.exists() else []


def destroy(cloud: Any, stage: str, override: dict[str, Any]) -> None:
    """``cdk destroy`` of the stack that a stage and an override give."""
    port = int(cloud.url.rsplit(":", 1)[1])
    context = ["-c", f"stage={stage}", "-c", f"override={json.dumps(override)}"]
    command = [str(run.PROJECT / "node_modules" / ".bin" / "cdk"), "destroy", "--all", "--force", *context]
    done = subprocess.run(
        command, cwd=run.PROJECT, env=run.cdk_environment(port, cloud.root), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


class Account:
    """What an account holds, by the name of a stage."""

    def __init__(self, cloud: Any) -> None:
        self.cloud = cloud

    def stacks(self) -> set[str]:
        found = self.cloud.client("cloudformation").describe_stacks()["Stacks"]
        return {one["StackName"] for one in found if not one["StackStatus"].startswith("DELETE_COMPLETE")}

    def holds(self, prefix: str) -> dict[str, list[str]]:
        """Kind -> names of everything that belongs to a stage and costs money or holds data."""
        client = self.cloud.client
        sagemaker, logs, iam = client("sagemaker"), client("logs"), client("iam")
        found = {
            "endpoint": [one["EndpointName"] for one in sagemaker.list_endpoints()["Endpoints"]],
            "endpoint config": [one["EndpointConfigName"] for one in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
            "model": [one["ModelName"] for one in sagemaker.list_models()["Models"]],
            "bucket": [one["Name"] for one in client("s3").list_buckets()["Buckets"]],
            "function": [one["FunctionName"] for one in client("lambda").list_functions()["Functions"]],
            "state machine": [one["name"] for one in client("stepfunctions").list_state_machines()["stateMachines"]],
            "repository": [one["repositoryName"] for one in client("ecr").describe_repositories()["repositories"]],
            "log group": [one["logGroupName"] for one in logs.describe_log_groups()["logGroups"]],
            "secret": [one["Name"] for one in client("secretsmanager").list_secrets()["SecretList"]],
            "topic": [one["TopicArn"] for one in client("sns").list_topics()["Topics"]],
            "alarm": [one["AlarmName"] for one in client("cloudwatch").describe_alarms()["MetricAlarms"]],
            "API": [one["name"] for one in client("apigateway").get_rest_apis()["items"]],
            "role": [one["RoleName"] for one in iam.list_roles()["Roles"]],
        }
        marks = (prefix, f"ImageClassifier-{prefix}", f"imageclassifier-{prefix}")
        return {kind: mine for kind, names in found.items() if (mine := sorted(n for n in names if any(m in n for m in marks)))}

    def runs(self) -> list[str]:
        """Processes and files of jobs, endpoints, functions and images: what goes with a stack on AWS."""
        folders = [self.cloud.root / kind for kind in ("jobs", "endpoints", "tmp", "images")]
        files = [str(path) for folder in folders for path in folder.rglob("*") if not path.is_dir()]
        return [*files, *(f"{one.pid} {one.name()}" for one in psutil.process_iter() if inside(one, folders))]


class Rules:
    """The local cloud's faults on demand (``local_cloud/faults.py``), and what came of them."""

    def __init__(self, root: Path) -> None:
        self._file, self._log, self._calls = root / "faults.json", root / "faults.jsonl", root / "calls.jsonl"

    def set(self, *rules: dict[str, Any]) -> None:
        """From now on these; none end all faults."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(rules))
        partial.replace(self._file)

    def obeyed(self) -> int:
        """How many faults there were so far."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    def calls(self) -> list[tuple[str, str]]:
        """All calls so far: (name, role)."""
        found = [json.loads(line) for line in self._calls.read_text().splitlines()]
        return [(one["call"], one["caller"].split("/")[1]) for one in found if "/" in one["caller"]]


def inside(process: psutil.Process, folders: list[Path]) -> bool:
    """Whether a process works in one of the folders: told by its command line or environment."""
    try:
        words = [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
    return any(str(folder) in word for folder in folders for word in words)


def copy_few(pictures: Path, target: Path, per_class: int) -> None:
    """The first ``per_class`` pictures of each ``<split>/<class>/`` folder, where the chain is under test and not the accuracy."""
    for folder in pictures.glob("*/*"):
        (target / folder.relative_to(pictures)).mkdir(parents=True)
        for picture in sorted(folder.glob("*.png"))[:per_class]:
            shutil.copy(picture, target / picture.relative_to(pictures))


def typical(digits: Path, label: str) -> Path:
    """The test picture nearest to the mean of its class: of others, a network trained as briefly as here misreads one in thirty."""
    paths = sorted((digits / "test" / label).glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(path), dtype=np.float32) for path in paths])
    return paths[int(np.square(pictures - pictures.mean(axis=0)).sum(axis=(1, 2)).argmin())]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as class folders."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def deployed(cloud: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The stack, deployed with the real CDK command line; the digits uploaded."""
    from local_cloud import source

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", cloud.url)
        quiet = Console(quiet=True)
        outputs = run.deploy(int(cloud.url.rsplit(":", 1)[1]), "local", OVERRIDE, cloud.root, quiet)
        packed = source._zip(digits, tmp_path_factory.mktemp("packed"))
        run.upload(Source("local", packed, None), None, outputs["DataBucket"], quiet)
        token = cloud.client("secretsmanager").get_secret_value(SecretId=outputs["TokenSecretArn"])["SecretString"]
        yield Deployment(cloud, outputs, token)


@dataclass
class Finished:
    """The execution that all tests look at."""

    name: str
    output: dict[str, Any]
    states: list[str]
    denied: list[str]
    seconds: float


@pytest.fixture(scope="session")
def finished(deployed: Deployment) -> Finished:
    """One whole execution started with ``{}``."""
    before, started_s = deployed.denied(), time.monotonic()
    follower, ended = deployed.execute({})
    assert ended["status"] == "SUCCEEDED", f"{ended.get('error')}: {ended.get('cause')}"
    denied = deployed.denied()[len(before) :]
    states = [visit.name for visit in follower.visits]
    return Finished(ended["name"], json.loads(ended["output"]), states, denied, time.monotonic() - started_s)
