"""Other people's verifiers over a stage: cfn-lint, asl-validator, moto's parser, parliament, and checkov's secret scan.

CDK's own validation and cdk-nag run when the stage is synthesised. What a tool says wrongly is listed here with the reason; all
else it says is a fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.verify.deployment import REGION, ROOT, Deployment
from infra.verify.findings import Finding, shown

Json = dict[str, Any]

ASL_VALIDATOR = ROOT / "node_modules" / ".bin" / "asl-validator"
CHECKOV = ROOT / ".checkov" / "bin" / "checkov"

IGNORED_CFN_LINT = ["W3005"]
"""W3005: CDK names dependencies that references already imply: harmless, and not ours to change."""

# parliament's issue -> actions of which it says so wrongly.
MISJUDGED = {
    # The service asks for one of two kinds of resource (a state machine or a map run, a standard or an express execution);
    # parliament wants both.
    "RESOURCE_MISMATCH": {"states:ListExecutions", "states:DescribeExecution"},
}
CDKS_WILDCARDS = ("s3:GetObject", "s3:GetBucket", "s3:List")
"""CDK's read grant on an asset names actions by wildcard; some of those that match know other resources."""

_NOT_SCANNED = (".png", ".lock", "package-lock.json", "checkov.txt", ".ico")


def check(deployment: Deployment) -> list[Finding]:
    """Findings of the tools that look at one stage."""
    return [*cfn_lint(deployment), *moto_parser(deployment.machine), *parliament(deployment)]


def cfn_lint(deployment: Deployment) -> Iterator[Finding]:
    """cfn-lint over the template, and over the state machine as it will be: substitutions would hide faults from it."""
    from cfnlint import ManualArgs, lint

    config = ManualArgs(regions=[REGION], ignore_checks=IGNORED_CFN_LINT)
    resolved = {
        "Resources": {
            "StateMachine": {
                "Type": "AWS::StepFunctions::StateMachine",
                "Properties": {
                    "RoleArn": "arn:aws:iam::111122223333:role/machine",
                    "DefinitionString": json.dumps(deployment.machine),
                },
            }
        }
    }
    for text in (json.dumps(deployment.template), json.dumps(resolved)):
        for match in lint(text, config=config):
            path = ".".join(str(part) for part in match.path or ())
            yield Finding("cfn-lint", path or "template", f"{match.rule.id} {match.message}", f"see {match.rule.source_url}")


def moto_parser(machine: Json) -> Iterator[Finding]:
    """moto's parser of the language: the one that runs the state machine on the local cloud."""
    from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser, ASLParserException

    logging.getLogger("moto").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            AmazonStateLanguageParser.parse(json.dumps(machine))
    except ASLParserException as error:
        yield Finding("moto", "definition", shown(error), "correct the definition")


def asl_validator(machines: dict[str, Json]) -> Iterator[Finding]:
    """asl-validator over several stages' definitions at once. It takes no empty texts, which the language allows: they get one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, machine in machines.items():
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(_without_empty(machine)))
            paths += ["--json-path", str(path)]
        done = subprocess.run([str(ASL_VALIDATOR), *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).replace(folder, "").split())
            yield Finding("asl-validator", "definition", shown(said), "correct the definition")


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return "-" if value == "" else value


def parliament(deployment: Deployment) -> Iterator[Finding]:
    """parliament over every policy: unknown actions, resources and conditions that do not fit them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources, which warns
        from parliament import analyze_policy_string

        kinds = ("AWS::IAM::Policy", "AWS::IAM::ManagedPolicy")
        policies = {name: item for kind in kinds for name, item in deployment.of_type(kind).items()}
        for name, item in policies.items():
            for found in analyze_policy_string(json.dumps(item["PolicyDocument"])).findings:
                detail = _misjudgements_removed(found.issue, found.detail)
                if detail:
                    yield Finding("parliament", name, shown(f"{found.issue} {detail}"), "correct the statement in infra/")


def _misjudgements_removed(issue: str, detail: Any) -> Any:
    """What remains of a finding."""
    if not isinstance(detail, list) or not all(isinstance(one, dict) for one in detail):
        return detail or issue
    known = MISJUDGED.get(issue, set())
    return [one for one in detail if str(one.get("action")) not in known and not str(one.get("action")).startswith(CDKS_WILDCARDS)]


def secrets() -> Iterator[Finding]:
    """checkov's secret scan over every file that git knows or would take. Given one by one: of a folder it reads only some."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    yield from scan([ROOT / name for name in names if name and not name.endswith(_NOT_SCANNED) and (ROOT / name).is_file()])


def scan(files: list[Path]) -> Iterator[Finding]:
    """checkov's secret scan over files. It runs in an environment of its own: it pins an old boto3."""
    command = [str(CHECKOV), "--framework", "secrets", "--compact", "--quiet", "--skip-download", "--output", "json", "--file"]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    for failed in report.get("results", {}).get("failed_checks", []):
        first, last = failed["file_line_range"]
        yield Finding(
            "checkov", f"{Path(failed['file_path']).name}:{first}-{last}", failed["check_name"], "remove it, and replace the secret"
        )
