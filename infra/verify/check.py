"""All of our own checks over one stage: the language, the expressions, the walks, the requests, the permissions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from infra.config import StageConfig
from infra.verify import language, permissions, rules
from infra.verify.deployment import Deployment
from infra.verify.findings import Finding, shown
from infra.verify.walk import Account, Walk, Walked, walks

Json = dict[str, Any]

# What AWS wants to be different in every execution, state and retry.
NAMES = ("ProcessingJobName", "TrainingJobName", "HyperParameterTuningJobName", "ModelName", "EndpointConfigName")
STABLE = ("EndpointName", "ModelPackageGroupName")


def check(config: StageConfig, deployment: Deployment) -> list[Finding]:
    """Every finding of our own checks."""
    machine = deployment.machine
    found = check_machine(config, deployment, machine)
    if found:
        return found
    walked = walks(config, machine, bucket_of(machine))
    needs = permissions.needs(deployment, config, walked.asked)
    return [*permissions.check(deployment, needs), *permissions.check_trust(deployment)]


def check_machine(config: StageConfig, deployment: Deployment, machine: Json) -> list[Finding]:
    """The definition alone: whether it is one, whether it can be walked, and what it asks for on the way."""
    found = language.check(machine)
    if found:
        # A definition that is none cannot be walked.
        return found
    if "Bucket" not in machine["States"]["WriteChampion"]["Arguments"]:
        return [Finding("request", "WriteChampion", "Bucket is missing", "see s3's PutObject")]
    walked = walks(config, machine, bucket_of(machine))
    found = [*walked.findings, *_requests(deployment, machine, walked)]
    # Only an execution that ends well tells all names.
    return found or list(_distinct(config, machine))


def bucket_of(machine: Json) -> str:
    """The data bucket's name."""
    return str(machine["States"]["WriteChampion"]["Arguments"]["Bucket"])


def _requests(deployment: Deployment, machine: Json, walked: Walked) -> Iterator[Finding]:
    handlers, alarms = functions(deployment), frozenset(alarm_names(deployment))
    said: set[Finding] = set()
    for state, request in walked.asked:
        for finding in rules.check(machine, state, request, handlers, alarms):
            if finding not in said:
                said.add(finding)
                yield finding


def functions(deployment: Deployment) -> dict[str, str]:
    """Function ARN -> handler."""
    return {
        deployment.arn(name): str(item.get("Handler", "")) for name, item in deployment.of_type("AWS::Lambda::Function").items()
    }


def alarm_names(deployment: Deployment) -> list[str]:
    """Names of the template's alarms."""
    return [str(item.get("AlarmName", "")) for item in deployment.of_type("AWS::CloudWatch::Alarm").values()]


def _distinct(config: StageConfig, machine: Json) -> Iterator[Finding]:
    """Two executions, two tries of a state, and two states never ask for the same name; what must be stable is."""
    made = [_names(config, machine, **how) for how in ({}, {"run": "run-2"}, {"retry": 1}, {"redrive": 1})]
    first = made[0]
    for other, what in zip(made[1:], ("execution", "retry", "redrive"), strict=True):
        for where, name in first.items():
            field = where.rpartition(".")[2]
            same = other.get(where) == name
            if field in NAMES and same:
                yield Finding(
                    "names", where, shown(name), f"expected another name in another {what}: AWS refuses one that was used"
                )
            if field in STABLE and not same:
                yield Finding("names", where, shown(name), "expected one name for ever: users and the API know it")
    ours = [name for where, name in first.items() if where.rpartition(".")[2] in NAMES and where.count(".") == 1]
    for name in ours:
        if not re.fullmatch(rf"{re.escape(config.prefix)}(-[a-z]+)?-[0-9a-f]{{16}}", name):
            yield Finding("names", name, "name", f"expected {config.prefix}-…-<16 hex digits>, which roles and the clean-up know")


def _names(config: StageConfig, machine: Json, *, run: str = "run-1", retry: int = 0, redrive: int = 0) -> dict[str, str]:
    """``<state>.<field>`` -> name, for one whole execution that ends well."""
    walk = _Again(machine, Account(bucket=bucket_of(machine), prefix=config.prefix), run)
    walk.retry, walk.redrive = retry, redrive
    walk.run({})
    return {
        f"{state}.{field}": str(request[field])
        for state, request in walk.requests.items()
        if isinstance(request, dict)
        for field in (*NAMES, *STABLE)
        # An endpoint takes the configuration's name from where it was made.
        if field in request
        and state.startswith(("Prepare", "Cache", "Tune", "Train", "Evaluate", "Report", "CreateModel", "CreateEndpoint", "Find"))
    }


class _Again(Walk):
    """An execution whose states are tried again."""

    retry, redrive = 0, 0

    def _context(self, name: str) -> Json:
        context = super()._context(name)
        context["State"]["RetryCount"] = self.retry
        context["Execution"]["RedriveCount"] = self.redrive
        return context
