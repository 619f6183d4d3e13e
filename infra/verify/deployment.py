"""A stage as CloudFormation would make it: the template synthesised, its functions replaced by the values they would have.

``synthesise_all`` runs ``app.py`` as the CDK's command line does. ``Deployment`` resolves ``Ref``, ``Fn::GetAtt``, ``Fn::Join``,
``Fn::Sub`` and ``Fn::FindInMap`` for one account and region, so that policies hold ARNs and the definition holds names.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT = "111122223333"
REGION = "us-east-1"

Json = dict[str, Any]

_PSEUDO = {
    "AWS::AccountId": ACCOUNT,
    "AWS::Region": REGION,
    "AWS::Partition": "aws",
    "AWS::URLSuffix": "amazonaws.com",
    "AWS::NoValue": None,
}

# Type -> (property that holds its name, its ARN, whether Ref gives the ARN).
_NAMED: dict[str, tuple[str, str, bool]] = {
    "AWS::IAM::Role": ("RoleName", "arn:aws:iam::{account}:role/{name}", False),
    "AWS::S3::Bucket": ("BucketName", "arn:aws:s3:::{name}", False),
    "AWS::Lambda::Function": ("FunctionName", "arn:aws:lambda:{region}:{account}:function:{name}", False),
    "AWS::Logs::LogGroup": ("LogGroupName", "arn:aws:logs:{region}:{account}:log-group:{name}:*", False),
    "AWS::KMS::Key": ("KeyId", "arn:aws:kms:{region}:{account}:key/{name}", False),
    "AWS::SNS::Topic": ("TopicName", "arn:aws:sns:{region}:{account}:{name}", True),
    "AWS::StepFunctions::StateMachine": ("StateMachineName", "arn:aws:states:{region}:{account}:stateMachine:{name}", True),
    "AWS::SecretsManager::Secret": ("Name", "arn:aws:secretsmanager:{region}:{account}:secret:{name}-AbCdEf", True),
    "AWS::ECR::Repository": ("RepositoryName", "arn:aws:ecr:{region}:{account}:repository/{name}", False),
    "AWS::CodeBuild::Project": ("Name", "arn:aws:codebuild:{region}:{account}:project/{name}", False),
    "AWS::Events::Rule": ("Name", "arn:aws:events:{region}:{account}:rule/{name}", False),
    "AWS::SQS::Queue": ("QueueName", "arn:aws:sqs:{region}:{account}:{name}", False),
}


_IDS = {"AWS::EC2::Subnet": "subnet", "AWS::EC2::SecurityGroup": "sg", "AWS::EC2::VPC": "vpc"}


class Statement(NamedTuple):
    """One statement of a policy, with lists where IAM allows one element alone."""

    effect: str
    actions: tuple[str, ...]
    resources: tuple[str, ...]
    conditions: Json


class SynthesisError(Exception):
    """``app.py`` refused the configuration, or CDK or cdk-nag found a fault; the message is theirs."""


def synthesise_all(folder: Path, contexts: dict[str, dict[str, str]]) -> dict[str, Json]:
    """Name -> template. Two processes share the work, each with one CDK engine: starting it is most of what a stage costs.

    Raises SynthesisError for the first configuration that is refused.
    """
    names = list(contexts)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: _synthesise(folder, {name: contexts[name] for name in part}), (names[::2], names[1::2])))
    return {name: _template(folder / name) for name in names}


def _synthesise(folder: Path, contexts: dict[str, dict[str, str]]) -> None:
    """Several stages in one process, as ``app.py`` makes them."""
    if not contexts:
        return
    program = [sys.executable, "-m", "infra.verify.deployment", str(folder)]
    done = subprocess.run(program, cwd=ROOT, input=json.dumps(contexts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SynthesisError((done.stdout + done.stderr).strip())


def _template(out: Path) -> Json:
    (path,) = out.glob("*.template.json")
    template: Json = json.loads(path.read_text())
    return template


def listed(value: Any) -> list[Any]:
    """CloudFormation and IAM write one-element lists as the element."""
    return value if isinstance(value, list) else [value]


class Deployment:
    """A template with its values filled in."""

    def __init__(self, template: Json) -> None:
        self.template = template
        self.types = {name: str(item["Type"]) for name, item in template["Resources"].items()}

    @cached_property
    def resources(self) -> dict[str, Json]:
        """Logical id -> resolved properties."""
        return {name: self.resolve(item.get("Properties", {})) for name, item in self.template["Resources"].items()}

    def of_type(self, kind: str) -> dict[str, Json]:
        """Logical id -> resolved properties of the resources of one type."""
        return {name: self.resources[name] for name, found in self.types.items() if found == kind}

    @cached_property
    def machine(self) -> Json:
        """The state machine's definition, resolved."""
        (machine,) = self.of_type("AWS::StepFunctions::StateMachine").values()
        text = str(machine["DefinitionString"])
        for name, value in machine["DefinitionSubstitutions"].items():
            text = text.replace(f"${{{name}}}", str(value))
        definition: Json = json.loads(text)
        return definition

    @cached_property
    def machine_role(self) -> str:
        """Logical id of the state machine's role."""
        (machine,) = self.of_type("AWS::StepFunctions::StateMachine").values()
        return self.role_named(str(machine["RoleArn"]))

    def role_named(self, arn: str) -> str:
        """Logical id of the role with this ARN; the ARN itself when it is none of this stack's."""
        known = {self.arn(name): name for name, kind in self.types.items() if kind == "AWS::IAM::Role"}
        return str(known.get(arn, arn))

    @cached_property
    def policies(self) -> dict[str, list[Statement]]:
        """Role's logical id -> its statements, from policies of its own and inline ones."""
        found: dict[str, list[Statement]] = {name: [] for name in self.of_type("AWS::IAM::Role")}
        # What is too long for a role's own policy CDK moves into a managed one.
        for item in [*self.of_type("AWS::IAM::Policy").values(), *self.of_type("AWS::IAM::ManagedPolicy").values()]:
            for role in item.get("Roles", []):
                found.setdefault(self._role_by_name(str(role)), []).extend(statements(item["PolicyDocument"]))
        for name, role in self.of_type("AWS::IAM::Role").items():
            for inline in role.get("Policies", []):
                found[name].extend(statements(inline["PolicyDocument"]))
        return found

    def _role_by_name(self, name: str) -> str:
        known = {self._name(role): role for role in self.of_type("AWS::IAM::Role")}
        return known.get(name, name)

    # -- CloudFormation's functions --

    def resolve(self, value: Any) -> Any:
        """``value`` with every function replaced."""
        if isinstance(value, list):
            return [item for item in (self.resolve(one) for one in value) if item is not None]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((function, given),) = value.items()
            if function == "Ref" or function.startswith("Fn::"):
                return self._function(function, given)
        resolved = {key: self.resolve(item) for key, item in value.items()}
        return {key: item for key, item in resolved.items() if item is not None}

    def _function(self, function: str, given: Any) -> Any:
        match function:
            case "Ref":
                return _PSEUDO[given] if given in _PSEUDO else self._ref(given)
            case "Fn::GetAtt":
                name, attribute = given if isinstance(given, list) else given.split(".", 1)
                return self._attribute(name, attribute)
            case "Fn::Join":
                return str(given[0]).join(str(part) for part in self.resolve(given[1]))
            case "Fn::Sub":
                return self._sub(given)
            case "Fn::FindInMap":
                table, row, column = (self.resolve(part) for part in given)
                return self.template["Mappings"][table][row][column]
            case "Fn::Select":
                return self.resolve(given[1])[int(given[0])]
            case "Fn::Split":
                return str(self.resolve(given[1])).split(given[0])
            case "Fn::GetAZs":
                return [f"{REGION}{letter}" for letter in "abc"]
        raise NotImplementedError(f"{function} is not resolved; add it to infra/verify/deployment.py")

    def _sub(self, given: Any) -> str:
        text, values = (given, {}) if isinstance(given, str) else given
        known = {name: self.resolve(item) for name, item in values.items()}

        def replaced(match: re.Match[str]) -> str:
            name = match.group(1)
            if name in known:
                return str(known[name])
            target, _, attribute = name.partition(".")
            return str(self._function("Fn::GetAtt", [target, attribute]) if attribute else self._function("Ref", name))

        return re.sub(r"\$\{([^!}][^}]*)\}", replaced, text)

    def _name(self, logical_id: str) -> str:
        """The resource's own name, or one as CloudFormation would make it."""
        kind = _NAMED.get(self.types[logical_id])
        given = self.template["Resources"][logical_id].get("Properties", {})
        if kind and kind[0] in given:
            return str(self.resolve(given[kind[0]]))
        start = _IDS.get(self.types[logical_id])
        if start:
            return f"{start}-{hashlib.sha256(logical_id.encode()).hexdigest()[:17]}"
        return logical_id.lower() if self.types[logical_id] == "AWS::S3::Bucket" else logical_id

    def arn(self, logical_id: str) -> str:
        """The resource's ARN."""
        kind = self.types[logical_id]
        pattern: str = _NAMED[kind][1] if kind in _NAMED else "arn:aws:other:{region}:{account}:{name}"
        return str(pattern).format(account=ACCOUNT, region=REGION, name=self._name(logical_id))

    def _ref(self, logical_id: str) -> Any:
        if logical_id in self.template.get("Parameters", {}):
            return self.template["Parameters"][logical_id].get("Default", logical_id)
        kind = _NAMED.get(self.types[logical_id])
        return self.arn(logical_id) if kind and kind[2] else self._name(logical_id)

    def _attribute(self, logical_id: str, attribute: str) -> str:
        if attribute in ("Arn", "TopicArn"):
            return self.arn(logical_id)
        if attribute == "RepositoryUri":
            return f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/{self._name(logical_id)}"
        if attribute in ("Name", "GroupId", "VpcId"):
            return self._name(logical_id)
        return f"{logical_id}.{attribute}"


def statements(document: Json) -> list[Statement]:
    """A policy document's statements."""
    return [
        Statement(
            str(item["Effect"]),
            tuple(listed(item["Action"])),
            tuple(str(one) for one in listed(item.get("Resource", []))),
            item.get("Condition", {}),
        )
        for item in listed(document["Statement"])
    ]


if __name__ == "__main__":
    import aws_cdk

    from app import synthesise

    known = json.loads((ROOT / "cdk.json").read_text())["context"]
    for name, context in json.load(sys.stdin).items():
        print(f"configuration {name}")
        synthesise(aws_cdk.App(context=known | context, outdir=str(Path(sys.argv[1]) / name)))
