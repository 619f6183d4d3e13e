"""Tables of the documents that are made from the templates. ``python -m infra.verify.table --write``.

docs/permissions.md says who may do what on what, and which call needs it. It is made from the needs that the verification
finds, not from the policies; that both agree is what ``make verify`` proves. docs/architecture.md says what a deployment holds.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from infra.verify import check, permissions
from infra.verify.configurations import CONFIGURATIONS, config_of
from infra.verify.deployment import ACCOUNT, REGION, ROOT, Deployment, synthesise_all
from infra.verify.walk import walks

PAGE = ROOT / "docs" / "permissions.md"
START, END = "<!-- permissions:{0} -->", "<!-- /permissions -->"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
RESOURCES, RESOURCES_END = "<!-- resources -->", "<!-- /resources -->"
STAGES = ("dev", "prod")

PARTS = {
    "Storage": "data bucket, bucket of its access log",
    "Custom": "empties the buckets on `cdk destroy`",
    "Jobs": "a role for each kind of job, one for the endpoint",
    "ModelPackages": "registered models",
    "BuildRole": "may push the serving image",
    "Server": "serving image: repository, build, its log",
    "Notifications": "where alarms and results are told",
    "PredictApi": "routes, stage, answers to errors",
    "PredictAuthorize": "checks the bearer token",
    "PredictToken": "the token, and the authorizer that asks for it",
    "Predict": "the API's function, the page, logs",
    "SmokeTest": "known pictures through the real API",
    "CleanUp": "what a failed run leaves",
    "DryRun": "quotas, data and images, before anything starts",
    "OnDestroy": "what executions made, on `cdk destroy`",
    "StateMachine": "what the state machine may do",
    "Pipeline": "the state machine and its log",
    "Watch": "dashboard and alarms",
}
"""Construct, as its resources' logical ids begin -> what it is for; in the order of ``infra/stack.py``."""


def rows(name: str, deployment: Deployment) -> list[str]:
    """Markdown rows of one stage: role, actions, resource, reasons."""
    config = config_of(CONFIGURATIONS[name])
    walked = walks(config, deployment.machine, check.bucket_of(deployment.machine))
    grouped: dict[tuple[str, str, str], set[str]] = {}
    for need in permissions.needs(deployment, config, walked.asked):
        condition = ", ".join(f"{key} = {value}" for key, value in need.context if key != "s3:prefix")
        resource = readable(need.resource, deployment) + (f" where {condition}" if condition else "")
        reason = need.why.split(":")[0].replace("'s .sync", "")
        grouped.setdefault((short(need.role), need.action, resource), set()).add(reason)
    merged: dict[tuple[str, str, str], list[str]] = {}
    for (role, action, resource), reasons in sorted(grouped.items()):
        merged.setdefault((role, resource, ", ".join(sorted(reasons))), []).append(action)
    return [
        f"| {role} | {', '.join(actions)} | `{resource}` | {reasons} |" for (role, resource, reasons), actions in merged.items()
    ]


def short(role: str) -> str:
    """The role's name without the hash that CDK adds."""
    return role[:-8].removeprefix("Jobs").removesuffix("Role") or role


def readable(resource: str, deployment: Deployment) -> str:
    """An ARN without what is the same everywhere."""
    text = resource.replace(f":{REGION}:{ACCOUNT}:", ":").replace(f"::{ACCOUNT}:", ":").removeprefix("arn:aws:")
    text = text.replace(check.bucket_of(deployment.machine), "DATA")
    head, _, tail = text.partition("cdk-hnb659fds-assets-")
    return f"{head}ASSETS{tail[tail.find('/') :] and '/…'}" if tail else text


def page(text: str, templates: dict[str, Deployment]) -> str:
    """The page with its tables written anew."""
    for name, deployment in templates.items():
        start = START.format(name)
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(END)
        table = ["| role | actions | resource | needed by |", "| --- | --- | --- | --- |", *rows(name, deployment)]
        text = f"{before}{start}\n" + "\n".join(table) + f"\n{END}{after}"
    return text


def part(logical_id: str) -> str:
    """The construct that a resource belongs to. Raises LookupError for one that ``PARTS`` does not name."""
    for name in PARTS:
        if logical_id.startswith(name):
            return name
    raise LookupError(f"{logical_id} belongs to no part: add its construct to infra/verify/table.py")


def counted(template: Deployment, construct: str) -> str:
    """``3 IAM Role, 2 S3 Bucket``: the resources of a construct, by their type."""
    kinds = Counter(kind for name, kind in template.types.items() if part(name) == construct)
    return ", ".join(f"{count} {re.sub('^AWS::|^Custom::', '', kind).replace('::', ' ')}" for kind, count in sorted(kinds.items()))


def architecture(text: str, templates: dict[str, Deployment]) -> str:
    """docs/architecture.md with its table of resources written anew: one row for each construct, one column for each stage."""
    before, _, rest = text.partition(RESOURCES)
    _, _, after = rest.partition(RESOURCES_END)
    first, other = (templates[name] for name in STAGES)
    lines = [f"| construct | for | `{STAGES[0]}` | `{STAGES[1]}`, where it differs |", "|---|---|---|---|"]
    for name, purpose in PARTS.items():
        one, two = counted(first, name), counted(other, name)
        lines.append(f"| {name} | {purpose} | {one} | {'' if one == two else two or 'none'} |")
    lines.append(f"| **all** | | {len(first.types)} resources | {len(other.types)} resources |")
    return f"{before}{RESOURCES}\n" + "\n".join(lines) + f"\n{RESOURCES_END}{after}"


def main(argv: list[str]) -> int:
    """Print the pages, or write them with ``--write``."""
    with tempfile.TemporaryDirectory() as folder:
        templates = synthesise_all(Path(folder), {name: CONFIGURATIONS[name] for name in STAGES})
    deployments = {name: Deployment(template) for name, template in templates.items()}
    for path, made in ((PAGE, page), (ARCHITECTURE, architecture)):
        text = made(path.read_text(), deployments)
        if "--write" in argv:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
        else:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
