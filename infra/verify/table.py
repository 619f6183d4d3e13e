"""The table of least privilege: who may do what on what, and which call needs it. ``python -m infra.verify.table --write``.

It is made from the needs that the verification finds, not from the policies; that both agree is what ``make verify`` proves.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from infra.verify import check, permissions
from infra.verify.configurations import CONFIGURATIONS, config_of
from infra.verify.deployment import ACCOUNT, REGION, ROOT, Deployment, synthesise_all
from infra.verify.walk import walks

PAGE = ROOT / "docs" / "permissions.md"
START, END = "<!-- permissions:{0} -->", "<!-- /permissions -->"
STAGES = ("dev", "prod")


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


def main(argv: list[str]) -> int:
    """Print the page, or write it with ``--write``."""
    with tempfile.TemporaryDirectory() as folder:
        templates = synthesise_all(Path(folder), {name: CONFIGURATIONS[name] for name in STAGES})
    text = page(PAGE.read_text(), {name: Deployment(template) for name, template in templates.items()})
    if "--write" in argv:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
