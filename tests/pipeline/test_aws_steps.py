"""The README's part on AWS, followed to the letter: its commands and its console steps, in a new copy, against the local cloud.

Nothing else is done, and nothing is set but what stands for the account: credentials, region, addresses.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from deployment import Account, copy_few

from local_cloud import run

pytestmark = [pytest.mark.pipeline, pytest.mark.slow, pytest.mark.timeout(3600)]

README = (run.PROJECT / "README.md").read_text()
PER_CLASS = 20
"""Pictures of each digit and split that are uploaded: the steps are under test here, not the accuracy."""
INPUT = {
    "source": "incoming/my-pictures/",
    "recipe": "scratch",
    "backbone": "resnet18",
    "pretrained": "none",
    "image_size": 32,
    "hyperparameters": {"epochs": 3, "horizontal_flip": False},
    "tuning": {"max_jobs": 2, "batch_size": [64]},
    "quality_gate": {"min_top1": 0.1},
}


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str) -> list[list[str]]:
    """The commands of each block of shell, without their comments."""
    found = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [[line.split("  #")[0].strip() for line in block.splitlines()] for block in found]


class Terminal:
    """One shell, as a person keeps it open; questions are answered with the ``y`` that the README names."""

    READY = re.compile(r"\[ended with (\d+)\] ")

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        environment = {**environment, "PS1": r"[ended with $?] ", "TERM": "dumb"}
        self._bash = pexpect.spawn("bash", ["--norc", "--noediting"], cwd=str(folder), env=environment, encoding="utf-8")
        self._bash.setwinsize(50, 250)
        self._bash.expect(self.READY, timeout=30)
        self.seconds: dict[str, float] = {}
        self.asked: list[str] = []

    def run(self, command: str) -> str:
        """What it printed. Fails when it ends with another code than 0."""
        started_s, said = time.monotonic(), ""
        self._bash.sendline(command)
        while self._bash.expect([self.READY, re.compile(r"\(y/n\)[^\n]*? ")], timeout=1200):
            said += self._bash.before + self._bash.after
            self.asked.append(command)
            self._bash.sendline("y")
        code, said = int(self._bash.match.group(1)), said + self._bash.before
        self.seconds[command] = round(time.monotonic() - started_s, 1)
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said).replace("\r", "")
        assert code == 0, f"{command}\n{said[-3000:]}"
        return said

    def close(self) -> None:
        self._bash.close(force=True)


@pytest.fixture
def shell_environment(cloud: Any) -> dict[str, str]:
    """A shell with credentials of an account, which the local cloud stands for; without the environment of these tests."""
    port = int(cloud.url.rsplit(":", 1)[1])
    environment = run.cdk_environment(port, cloud.root)
    ours = str(Path(sys.executable).parent)
    environment["PATH"] = ":".join(part for part in environment["PATH"].split(":") if part != ours)
    for name in ("TMPDIR", "VIRTUAL_ENV", "CDK_DEFAULT_ACCOUNT", "CDK_DEFAULT_REGION", "STATE_DIR"):
        environment.pop(name, None)
    for command in ("aws", "curl", "npm"):
        if shutil.which(command, path=environment["PATH"]) is None:
            pytest.skip(f"{command} is not on this machine")
    return environment


@pytest.fixture
def terminal(tmp_path: Path, cloud: Any, shell_environment: dict[str, str]) -> Iterator[Terminal]:
    """In a new copy of the project."""
    folder = tmp_path / "project"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=run.PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.PROJECT / name, folder / name)
    # On AWS an API's address follows from its id; the local cloud's own begins otherwise.
    address = {"api_url": f"{cloud.url}/restapis/{{api}}/{{stage}}/_user_request_"}
    (folder / "cdk.context.json").write_text(json.dumps(address))
    opened = Terminal(folder, shell_environment)
    yield opened
    opened.close()


def outputs_of(said: str) -> dict[str, str]:
    return dict(re.findall(r"^ImageClassifier-dogs-dev\.(\w+) = (\S+)$", said, re.MULTILINE))


def ended(cloud: Any, machine: str, machine_input: dict[str, Any]) -> dict[str, Any]:
    """**Start execution** in the console, and wait."""
    states = cloud.client("stepfunctions")
    arn = states.start_execution(stateMachineArn=machine, input=json.dumps(machine_input))["executionArn"]
    deadline_s = time.monotonic() + 1800
    while (found := states.describe_execution(executionArn=arn))["status"] == "RUNNING":
        assert time.monotonic() < deadline_s
        time.sleep(1)
    assert found["status"] == "SUCCEEDED", f"{found.get('error')}: {found.get('cause')}"
    return dict(json.loads(found["output"]))


def fill(command: str, outputs: dict[str, str]) -> str:
    return re.sub(r"<(\w+)>", lambda name: outputs[name.group(1)].rstrip("/"), command)


def test_somebody_who_follows_the_readme_meets_no_other_step(
    terminal: Terminal, tmp_path: Path, cloud: Any, digits: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    account, project = Account(cloud), tmp_path / "project"
    before, ran_before = account.stacks(), account.runs()
    deploy, ask, upload = blocks(section("Deploy on AWS"))
    (destroy,) = blocks(section("Cleanup"))
    said = "".join(terminal.run(command) for command in deploy)
    outputs = outputs_of(said)
    (named,) = re.findall(r"prints four outputs: (.*?)\. Then", section("Deploy on AWS"))
    assert set(re.findall(r"`(\w+)`", named)) == set(outputs)

    copy_few(digits, project / "my-pictures", PER_CLASS)
    shutil.copy(next(digits.glob("test/3/*.png")), project / "dog.png")
    for command in upload:
        terminal.run(fill(command, outputs))

    rehearsed = ended(cloud, outputs["StateMachineArn"], {**INPUT, "dry_run": True})
    assert rehearsed["checks"]
    assert cloud.client("sagemaker").list_processing_jobs(NameContains="dogs-dev")["ProcessingJobSummaries"] == []
    result = ended(cloud, outputs["StateMachineArn"], INPUT)
    assert {"report_uri", "endpoint", "test_top1"} <= set(result)
    assert "Publish" in terminal.run("make logs STAGE=dev")

    # The pictures at hand are PNG files; the README's is a JPEG.
    answers = [terminal.run(fill(c, outputs).replace("jpeg", "png").replace("dog.jpg", "dog.png")) for c in ask]
    assert '"predictions"' in answers[-1]
    assert len(re.findall(r"^ [01]\.\d{4}  \d$", terminal.run("make predict STAGE=dev IMAGE=dog.png"), re.MULTILINE)) == 5
    assert all(
        f"`{command}`" in section("Deploy on AWS") for command in ("make logs STAGE=dev", "make predict STAGE=dev IMAGE=dog.jpg")
    )

    assert set(account.runs()) - set(ran_before), "the endpoint has a process and files"
    for command in destroy:
        terminal.run(command)
    assert set(account.runs()) <= set(ran_before)
    assert account.stacks() <= before | {"CDKToolkit"}
    # API Gateway's log role belongs to the account.
    assert {kind for kind in account.holds("dogs-dev") if kind != "role"} == set(), account.holds("dogs-dev")
    told = [line for line in [*deploy, *destroy] if re.search(rf"^{re.escape(line)} +#.*asks: y$", README, re.MULTILINE)]
    assert terminal.asked == told, "the questions that the README says will be asked, and no others"
    print(json.dumps(terminal.seconds, indent=1))
