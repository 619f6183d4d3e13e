"""The GitHub workflow: no long-lived keys, no more rights than a job needs, commands that exist."""

from __future__ import annotations

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_conformance import SUPPORTED

PROJECT = Path(__file__).resolve().parents[2]
TEXT = (PROJECT / ".github/workflows/deploy.yml").read_text()
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
STAGES = set(json.loads((PROJECT / "cdk.json").read_text())["context"]["stages"])
DOCUMENT = (PROJECT / "docs/deployment.md").read_text()


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


@pytest.mark.parametrize("job", JOBS)
def test_every_command_is_a_target_of_the_makefile(job: str):
    assert commands(job)
    for command in commands(job):
        subprocess.run([*command.split(), "-n"], cwd=PROJECT, capture_output=True, check=True)


def test_no_key_is_kept_and_only_jobs_that_speak_to_aws_may_ask_for_one():
    assert "secrets." not in TEXT
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for name, job in JOBS.items():
        speaks = any("configure-aws-credentials" in step.get("uses", "") for step in job["steps"])
        assert (job.get("permissions", {}).get("id-token") == "write") is speaks, name
        assert all(
            step["with"].get("persist-credentials") is False
            for step in job["steps"]
            if step.get("uses", "").startswith("actions/checkout@")
        )


def test_pull_requests_read_and_main_deploys_after_the_tests():
    assert commands("test") == ["make check", "make test"]
    assert JOBS["test"]["strategy"]["matrix"]["python"] == list(SUPPORTED)
    assert JOBS["diff"]["needs"] == JOBS["deploy"]["needs"] == "test"
    assert "AWS_DIFF_ROLE" in json.dumps(JOBS["diff"])
    assert "AWS_DEPLOY_ROLE" not in json.dumps(JOBS["diff"])
    assert "refs/heads/main" in JOBS["deploy"]["if"]
    assert "head.repo.full_name == github.repository" in JOBS["diff"]["if"]
    assert JOBS["deploy"]["concurrency"]["cancel-in-progress"] is False


def test_the_stages_to_choose_are_those_of_the_configuration_that_live_on_aws():
    trigger = WORKFLOW[True]  # YAML 1.1 reads "on" so
    assert set(trigger["workflow_dispatch"]["inputs"]["stage"]["options"]) == STAGES - {"local"}


def test_input_of_others_never_becomes_a_part_of_a_command():
    assert not any("${{" in command for name in JOBS for command in commands(name))


def test_the_policies_of_the_document_fit_the_workflow():
    github = DOCUMENT.partition("## From GitHub")[2]
    trust, policy = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", github, re.DOTALL))
    subjects = trust["Statement"][0]["Condition"]["StringEquals"]["token.actions.githubusercontent.com:sub"]
    assert {subject.rpartition(":")[2] for subject in subjects} == STAGES - {"local"}
    assert not any("*" in subject for subject in subjects)
    allowed = policy["Statement"][0]["Resource"].rpartition("/")[2]
    assert fnmatch("cdk-hnb659fds-deploy-role-111122223333-us-east-1", allowed)
    for name in re.findall(r"vars\.(AWS_[A-Z_]+)", TEXT):
        assert f"`{name}`" in DOCUMENT


def test_dependabot_watches_every_lock_file():
    watched = yaml.safe_load((PROJECT / ".github/dependabot.yml").read_text())["updates"]
    assert {item["package-ecosystem"] for item in watched} == {"uv", "npm", "docker", "github-actions"}
    for ecosystem, file in {"uv": "uv.lock", "npm": "package-lock.json", "docker": "Dockerfile"}.items():
        (folder,) = [item["directory"] for item in watched if item["package-ecosystem"] == ecosystem]
        assert (PROJECT / folder.strip("/") / file).is_file()
