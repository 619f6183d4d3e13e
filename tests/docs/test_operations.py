"""The run book knows every alarm and every state that can fail; the table of permissions is the one that the calls make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from infra.pipeline import ADVICE
from infra.verify import contracts, table
from infra.verify.deployment import Deployment

DOCS = Path(__file__).resolve().parents[2] / "docs"
RUN_BOOK = (DOCS / "operations.md").read_text()


@pytest.fixture(scope="module")
def deployments(templates: dict[str, Any]) -> dict[str, Deployment]:
    return {name: Deployment(templates[name]) for name in table.STAGES}


def test_every_alarm_has_its_remedy(deployments: dict[str, Deployment]):
    rows = re.findall(r"^\| (`.*?) \|", RUN_BOOK, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    for stage, deployment in deployments.items():
        for alarm in deployment.of_type("AWS::CloudWatch::Alarm").values():
            assert alarm["AlarmName"].removeprefix(f"dogs-{stage}-") in told


def fails(state: dict[str, Any]) -> bool:
    return any("failure" in entry.get("Assign", {}) for entry in state.get("Catch", []))


def test_every_state_that_can_fail_is_in_the_run_book(deployments: dict[str, Deployment]):
    """A message names a state: here stands what to do."""
    states = {name for d in deployments.values() for name, state in d.machine["States"].items() if fails(state)}
    # Failures of these are told as the deployment's.
    told_otherwise = {"CreateModel", "CreateEndpointConfig", "CreateEndpoint", "UpdateEndpoint", "DeleteFailedEndpoint"}
    told_otherwise |= {"ReadPrepared", "ReadEvaluation", "Register", "FindServerImage"}
    assert states - told_otherwise <= set(re.findall(r"`([A-Z]\w+)`", RUN_BOOK))
    assert set(ADVICE) <= set(re.findall(r"`([A-Z]\w+)`", RUN_BOOK))
    assert told_otherwise <= states


def test_the_output_of_an_execution_is_told():
    section = RUN_BOOK.partition("## What an execution tells")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))))
    assert told == set(contracts.OUTPUT_FACTS)


def test_the_table_of_permissions_is_the_one_that_the_calls_make(deployments: dict[str, Deployment]):
    """Hashes in names of log groups and of code aside: they change with what they are made of."""

    def plain(text: str) -> str:
        return re.sub(r"[0-9A-F]{8}", "#", text)

    written = table.PAGE.read_text()
    assert plain(table.page(written, deployments)) == plain(written), "run make permissions"


def test_the_table_of_resources_is_the_one_of_the_templates(deployments: dict[str, Deployment]):
    written = table.ARCHITECTURE.read_text()
    assert table.architecture(written, deployments) == written, "run make permissions"
