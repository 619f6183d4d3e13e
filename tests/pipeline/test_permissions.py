"""Granted minus used: what a run does not use of its roles' grants is explained, one by one, in docs/verification.md."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from infra.verify.configurations import CONFIGURATIONS
from infra.verify.deployment import Deployment, synthesise_all

pytestmark = pytest.mark.pipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
STACK = "ImageClassifier-dogs-local-"


def explained() -> list[tuple[list[str], list[str]]]:
    """(roles, actions) of each row of the table, as patterns."""
    section = PAGE.read_text().partition("## What a run on the local cloud does not use")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \| ([^|]+) \|$", section, re.MULTILINE)
    assert len(rows) > 10
    return [(re.findall(r"`([^`]+)`", roles), re.findall(r"`([^`]+)`", actions)) for roles, actions, _ in rows]


def role_of(name: str, roles: list[str]) -> str:
    """Logical id of a role by its name, which CloudFormation makes of the stack's name and the start of the id."""
    own = name.removeprefix(STACK)
    return max(roles, key=lambda role: len(_common(role, own)))


def _common(one: str, other: str) -> str:
    return one[: next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))]


def test_what_a_run_does_not_use_is_explained(finished: Any, deployed: Any, tmp_path: Path):
    deployment = Deployment(synthesise_all(tmp_path, {"local": CONFIGURATIONS["local"]})["local"])
    roles = list(deployment.policies)
    used: set[tuple[str, str]] = set()
    for line in (deployed.cloud.root / "decisions.jsonl").read_text().splitlines():
        found = json.loads(line)
        name = found["principal"].split("/")[1] if "assumed-role/" in found["principal"] else ""
        if name.startswith(STACK) and found["decision"] == "Allow":
            used.add((role_of(name, roles), found["action"]))
    assert {action for role, action in used if role.startswith("StateMachine")} >= {"sagemaker:CreateTrainingJob", "iam:PassRole"}
    granted = {(role, action) for role, made in deployment.policies.items() for one in made for action in one.actions}
    unused = {(role, action) for role, action in granted if not any(r == role and fnmatch(a, action) for r, a in used)}
    assert len(granted) - len(unused) > 50
    table = explained()
    unexplained = [
        f"{role} {action}"
        for role, action in sorted(unused)
        if not any(
            any(fnmatch(role, pattern) for pattern in names) and any(fnmatch(action, pattern) for pattern in actions)
            for names, actions in table
        )
    ]
    assert unexplained == []
