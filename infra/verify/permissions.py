"""IAM both ways: every call is allowed by its role and its trust policy, and nothing is granted that no call needs.

A *need* is an action on a pattern of resources, with the facts that AWS puts into the request's context. Needs come from the
requests of the state machine (walked through), from the source of the Lambdas and the jobs, and from what AWS's services do on a
role's behalf, each with the page that says so. A grant is too wide when an instance of it lies outside every need of the same
action.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from infra.config import StageConfig
from infra.inputs import UPLOADS
from infra.verify import contracts
from infra.verify.deployment import ACCOUNT, REGION, Deployment, Statement
from infra.verify.findings import Finding, shown
from infra.verify.language import Call, call_of

Json = dict[str, Any]

LOGS = ("logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams")
PULL = ("ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage")
PUSH = ("ecr:CompleteLayerUpload", "ecr:InitiateLayerUpload", "ecr:PutImage", "ecr:UploadLayerPart")
DELIVERY = (
    "logs:CreateLogDelivery", "logs:GetLogDelivery", "logs:UpdateLogDelivery", "logs:DeleteLogDelivery", "logs:ListLogDeliveries",
    "logs:PutResourcePolicy", "logs:DescribeResourcePolicies", "logs:DescribeLogGroups",
)  # fmt: skip
"""https://docs.aws.amazon.com/step-functions/latest/dg/cw-logs.html"""
TRACES = ("xray:PutTraceSegments", "xray:PutTelemetryRecords", "xray:GetSamplingRules", "xray:GetSamplingTargets")
"""https://docs.aws.amazon.com/step-functions/latest/dg/xray-iam.html"""

CDKS_OWN = ("CustomS3AutoDeleteObjects", "PredictApiCloudWatchRole", "CustomVpc", "CustomECRAuto")
"""Roles that constructs of the CDK make for themselves, with policies of their own."""

EXPLAINED: dict[tuple[str, str], str] = {
    ("lambda:InvokeFunction", ":*"): "CDK grants a function and its versions together; ours has none",
}
"""(action, end of the resource) -> why it is granted although no call needs it."""


class Need(NamedTuple):
    """A call that somebody makes: role (logical id), action, pattern of its resource, facts of the request, who makes it."""

    role: str
    action: str
    resource: str
    context: tuple[tuple[str, str], ...]
    why: str


# --- evaluation ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=50_000)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(text.replace("[", "[[]")), re.DOTALL)


def matches(pattern: str, value: str) -> bool:
    """IAM's wildcards: ``*`` is any text, slashes and colons included, ``?`` one character."""
    return pattern == value or _pattern(pattern).match(value) is not None


def _conditions_hold(conditions: Json, context: dict[str, str]) -> bool:
    for operator, tests in conditions.items():
        for key, wanted in tests.items():
            if key not in context:
                return False
            values = [str(one) for one in (wanted if isinstance(wanted, list) else [wanted])]
            actual = context[key]
            if operator in ("StringEquals", "Bool", "ArnEquals", "ForAnyValue:StringEquals"):
                fine = actual in values
            elif operator in ("StringLike", "ArnLike"):
                fine = any(matches(value, actual) for value in values)
            else:
                raise NotImplementedError(f"condition {operator} is not evaluated; add it to infra/verify/permissions.py")
            if not fine:
                return False
    return True


def grants(statement: Statement, action: str, resource: str, context: dict[str, str]) -> bool:
    """Whether the statement allows the call."""
    return (
        statement.effect == "Allow"
        and any(matches(one.lower(), action.lower()) for one in statement.actions)
        and any(matches(one, resource) for one in statement.resources)
        and _conditions_hold(statement.conditions, context)
    )


def instance(pattern: str, gap: str = "zz/Zz") -> str:
    """A resource that the pattern covers, with something in every gap that no narrower pattern would have there."""
    return pattern.replace("*", gap).replace("?", "z")


# --- the check -------------------------------------------------------------------------------------------------------------


def check(deployment: Deployment, needs: list[Need], policies: dict[str, list[Statement]] | None = None) -> list[Finding]:
    """Needs without a grant, grants without a need, and conditions that let others in."""
    policies = deployment.policies if policies is None else policies
    return [*_refused(policies, needs), *_unneeded(policies, needs), *_unguarded(policies, needs)]


def _refused(policies: dict[str, list[Statement]], needs: list[Need]) -> Iterator[Finding]:
    for need in needs:
        resource = instance(need.resource, "a1")
        context = dict(need.context)
        if not any(grants(one, need.action, resource, context) for one in policies.get(need.role, [])):
            yield Finding("iam", need.role, f"{need.action} on {need.resource} is not allowed", f"grant it: {need.why} needs it")


def _unneeded(policies: dict[str, list[Statement]], needs: list[Need]) -> Iterator[Finding]:
    by_role: dict[str, list[Need]] = {}
    for need in needs:
        by_role.setdefault(need.role, []).append(need)
    for role, statements in policies.items():
        if role.startswith(CDKS_OWN):
            continue
        for statement in statements:
            for action in statement.actions:
                known = [need for need in by_role.get(role, []) if matches(action.lower(), need.action.lower())]
                if not known:
                    yield Finding("iam", role, f"{action} is granted", "no call needs it; remove it")
                    continue
                for resource in statement.resources:
                    # Grants that CDK makes a little wider than the call.
                    ends = [end for name, end in EXPLAINED if action == name and resource.endswith(end)]
                    narrow = resource.removesuffix(ends[0]) if ends else resource
                    if not any(matches(need.resource, instance(narrow)) for need in known):
                        scopes = ", ".join(sorted({need.resource for need in known}))
                        yield Finding(
                            "iam", role, f"{action} on {resource} is granted", f"wider than any call needs: {shown(scopes)}"
                        )


def _unguarded(policies: dict[str, list[Statement]], needs: list[Need]) -> Iterator[Finding]:
    """Where a condition limits a call, the same call with other facts must be refused."""
    for need in needs:
        if not need.context:
            continue
        resource = instance(need.resource, "a1")
        for key, _ in need.context:
            foreign = dict(need.context) | {key: "zz.example"}
            if any(grants(one, need.action, resource, foreign) for one in policies.get(need.role, [])):
                yield Finding("iam", need.role, f"{need.action} is granted whatever {key} is", "limit it with a condition")


# --- trust -----------------------------------------------------------------------------------------------------------------


def check_trust(deployment: Deployment) -> list[Finding]:
    """Each role is taken by the one service that uses it, on this account's behalf."""
    findings = []
    users = _users(deployment)
    for name, role in deployment.of_type("AWS::IAM::Role").items():
        if name.startswith(CDKS_OWN):
            continue
        entries = role["AssumeRolePolicyDocument"]["Statement"]
        services = [entry.get("Principal", {}).get("Service") for entry in entries]
        if services != [users.get(name)]:
            findings.append(Finding("iam", name, f"{services} may take it", f"expected {users.get(name)} alone"))
        needs_account = users.get(name) not in ("lambda.amazonaws.com", "apigateway.amazonaws.com")
        guarded = all(entry.get("Condition", {}).get("StringEquals", {}).get("aws:SourceAccount") == ACCOUNT for entry in entries)
        if needs_account and not guarded:
            findings.append(Finding("iam", name, "any account's service may take it", "add the condition aws:SourceAccount"))
    return findings


def _users(deployment: Deployment) -> dict[str, str]:
    """Role -> the service that takes it, by the resources that name it."""
    found = {}
    kinds = {
        "AWS::Lambda::Function": ("Role", "lambda.amazonaws.com"),
        "AWS::StepFunctions::StateMachine": ("RoleArn", "states.amazonaws.com"),
        "AWS::CodeBuild::Project": ("ServiceRole", "codebuild.amazonaws.com"),
        "AWS::Scheduler::Schedule": ("Target", "scheduler.amazonaws.com"),
        "AWS::EC2::FlowLog": ("DeliverLogsPermissionArn", "vpc-flow-logs.amazonaws.com"),
    }
    for kind, (field, service) in kinds.items():
        for item in deployment.of_type(kind).values():
            arn = item[field]["RoleArn"] if field == "Target" else item[field]
            found[deployment.role_named(str(arn))] = service
    text = json.dumps(deployment.machine)
    for name in deployment.of_type("AWS::IAM::Role"):
        if f'"{deployment.arn(name)}"' in text:
            found[name] = "sagemaker.amazonaws.com"
    for item in deployment.of_type("AWS::Events::Rule").values():
        for target in item.get("Targets", []):
            if "RoleArn" in target:
                found[deployment.role_named(str(target["RoleArn"]))] = "events.amazonaws.com"
    return found


# --- needs -----------------------------------------------------------------------------------------------------------------


def needs(deployment: Deployment, config: StageConfig, asked: list[tuple[str, Any]]) -> list[Need]:
    """Everything that a deployed stage calls."""
    collected = _Needs(deployment, config)
    collected.of_machine(asked)
    collected.of_jobs(asked)
    collected.of_functions()
    collected.of_build()
    collected.of_others()
    return list(dict.fromkeys(collected.found))


_JOBS = {
    "CreateTrainingJob": ("training-job", "TrainingJobName", "Training"),
    "CreateProcessingJob": ("processing-job", "ProcessingJobName", "Processing"),
    "CreateHyperParameterTuningJob": ("hyper-parameter-tuning-job", "HyperParameterTuningJobName", "Tuning"),
}
# Operation -> the kinds of resource it is checked on, by
# https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonsagemaker.html
_KINDS = {
    **{name: (kind,) for name, (kind, _, _) in _JOBS.items()},
    "ListTrainingJobsForHyperParameterTuningJob": ("hyper-parameter-tuning-job",),
    "DescribeTrainingJob": ("training-job",),
    "DescribeProcessingJob": ("processing-job",),
    "DescribeHyperParameterTuningJob": ("hyper-parameter-tuning-job",),
    "StopTrainingJob": ("training-job",),
    "StopProcessingJob": ("processing-job",),
    "StopHyperParameterTuningJob": ("hyper-parameter-tuning-job",),
    "CreateModel": ("model",),
    "DeleteModel": ("model",),
    "CreateEndpointConfig": ("endpoint-config",),
    "DescribeEndpointConfig": ("endpoint-config",),
    "DeleteEndpointConfig": ("endpoint-config",),
    "CreateEndpoint": ("endpoint", "endpoint-config"),
    "UpdateEndpoint": ("endpoint", "endpoint-config"),
    "DescribeEndpoint": ("endpoint",),
    "DeleteEndpoint": ("endpoint",),
    "InvokeEndpoint": ("endpoint",),
    "CreateModelPackage": ("model-package", "model-package-group"),
    "DescribeModelPackage": ("model-package",),
    "DeleteModelPackage": ("model-package",),
}
_PREFIX = {"sagemaker-runtime": "sagemaker", "stepfunctions": "states", "service-quotas": "servicequotas"}
_SCALING = (("application-autoscaling:service-namespace", "sagemaker"),)


class _Needs:
    """Collects needs."""

    def __init__(self, deployment: Deployment, config: StageConfig) -> None:
        self.deployment, self.config, self.prefix = deployment, config, config.prefix
        self.found: list[Need] = []

    def add(
        self, role: str, actions: Iterable[str], resources: Iterable[str], why: str, context: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Every action on every resource."""
        self.found += [Need(role, action, resource, tuple(context), why) for action in actions for resource in resources]

    def arn(self, service: str, resource: str) -> str:
        """An ARN of this account."""
        return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{resource}"

    def sagemaker(self, kind: str) -> str:
        """This stage's resources of a kind: executions name theirs ``<prefix>-…``; there is one endpoint, and one group."""
        if kind in ("endpoint", "model-package-group"):
            return self.arn("sagemaker", f"{kind}/{self.prefix}")
        return self.arn("sagemaker", f"{kind}/{self.prefix}{'/' if kind == 'model-package' else '-'}*")

    def one_of_type(self, kind: str) -> list[str]:
        """ARNs of the template's resources of a type."""
        return [self.deployment.arn(name) for name in self.deployment.of_type(kind)]

    # -- the state machine --

    def of_machine(self, asked: list[tuple[str, Any]]) -> None:
        """Requests, what ``.sync`` adds, logging and tracing."""
        role = self.deployment.machine_role
        for state, request in asked:
            call = call_of(self.deployment.machine["States"][state]["Resource"])
            self._request(role, state, call, request)
        (machine,) = self.deployment.of_type("AWS::StepFunctions::StateMachine").values()
        if machine.get("LoggingConfiguration", {}).get("Level", "OFF") != "OFF":
            self.add(role, DELIVERY, ["*"], "the state machine's log")
        if machine.get("TracingConfiguration", {}).get("Enabled"):
            self.add(role, TRACES, ["*"], "the state machine's traces")
        if "EncryptionConfiguration" in machine:
            # https://docs.aws.amazon.com/step-functions/latest/dg/encryption-at-rest.html
            key = str(machine["EncryptionConfiguration"]["KmsKeyId"])
            self.add(role, ["kms:Decrypt", "kms:GenerateDataKey*"], [key], "the state machine's encrypted history")

    def _request(self, role: str, state: str, call: Call, request: Json) -> None:
        match call.service:
            case "sagemaker":
                self._sagemaker(role, state, call, request)
            case "s3":
                uri = f"s3://{request['Bucket']}/{request['Key']}"
                if call.operation == "PutObject":
                    self._object(role, "s3:PutObject", uri, state)
                else:
                    # With the right to list, S3 says that an object is missing instead of that it is forbidden.
                    self._reads(role, uri, state)
            case "ecr":
                self.add(role, [f"ecr:{call.operation}"], [self.arn("ecr", f"repository/{request['RepositoryName']}")], state)
            case "lambda":
                self.add(role, ["lambda:InvokeFunction"], [request["FunctionName"]], state)
            case "sns":
                self.add(role, ["sns:Publish"], [request["TopicArn"]], state)
                # https://docs.aws.amazon.com/sns/latest/dg/sns-key-management.html
                self.add(role, ["kms:Decrypt", "kms:GenerateDataKey*"], self._topic_keys(), f"{state}'s encrypted topic")
            case "codebuild":
                actions = ["codebuild:StartBuild", "codebuild:StopBuild", "codebuild:BatchGetBuilds"]
                self.add(role, actions, [self.arn("codebuild", f"project/{request['ProjectName']}")], state)
                self._events(role, "StepFunctionsGetEventForCodeBuildStartBuildRule", state)
            case "application-autoscaling":
                self._scaling(role, state, call)
            case other:
                # Questions without a resource: service quotas and the like.
                self.add(role, [f"{_PREFIX.get(other, other)}:{call.operation}"], ["*"], state)

    def _topic_keys(self) -> list[str]:
        return [
            str(topic["KmsMasterKeyId"])
            for topic in self.deployment.of_type("AWS::SNS::Topic").values()
            if "KmsMasterKeyId" in topic
        ]

    def _events(self, role: str, rule: str, state: str) -> None:
        """https://docs.aws.amazon.com/step-functions/latest/dg/service-integration-iam-templates.html"""
        self.add(
            role,
            ["events:PutTargets", "events:PutRule", "events:DescribeRule"],
            [self.arn("events", f"rule/{rule}")],
            f"{state}'s .sync",
        )

    def _sagemaker(self, role: str, state: str, call: Call, request: Json) -> None:
        kinds = _KINDS.get(call.operation)
        resources = [self.sagemaker(kind) for kind in kinds] if kinds else ["*"]
        self.add(role, [f"sagemaker:{call.operation}"], resources, state)
        if request.get("Tags"):
            self.add(role, ["sagemaker:AddTags"], resources[:1], f"{state}'s tags")
        definition = request.get("TrainingJobDefinition", {})
        for arn in (request.get("RoleArn"), request.get("ExecutionRoleArn"), definition.get("RoleArn")):
            if arn:
                self.add(role, ["iam:PassRole"], [arn], state, [("iam:PassedToService", "sagemaker.amazonaws.com")])
        if call.operation in _JOBS and call.sync:
            kind, _, event = _JOBS[call.operation]
            what = call.operation.removeprefix("Create")
            # https://docs.aws.amazon.com/step-functions/latest/dg/connect-sagemaker.html
            self.add(
                role,
                [f"sagemaker:Describe{what}", f"sagemaker:Stop{what}", "sagemaker:ListTags"],
                [self.sagemaker(kind)],
                f"{state}'s .sync",
            )
            self._events(role, f"StepFunctionsGetEventsForSageMaker{event}JobsRule", state)
        if call.operation == "DeleteEndpoint" and self.config.endpoint.mode == "realtime":
            self._ends_scaling(role, state)
        if call.operation == "CreateModelPackage":
            # Registration resolves the image's digest and looks at the artifact with its caller's rights.
            container = request["InferenceSpecification"]["Containers"][0]
            self.add(
                role, ["ecr:BatchGetImage", "ecr:DescribeImages"], [_repository(container["Image"])], f"{state}: the image's digest"
            )
            self._object(role, "s3:GetObject", container["ModelDataUrl"], f"{state}: the artifact")
        alarms = request.get("DeploymentConfig", {}).get("AutoRollbackConfiguration", {}).get("Alarms", [])
        # https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-configuration.html
        names = [self.arn("cloudwatch", f"alarm:{one['AlarmName']}") for one in alarms]
        self.add(role, ["cloudwatch:DescribeAlarms"], names, f"{state}'s alarms")
        if call.operation == "CreateEndpointConfig" and "KmsKeyId" in request:
            # https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateEndpointConfig.html#KmsKeyId
            self._grants_key(role, request["KmsKeyId"], state)

    def _scaling(self, role: str, state: str, call: Call) -> None:
        target = self.arn("application-autoscaling", "scalable-target/*")
        self.add(role, [f"application-autoscaling:{call.operation}"], [target], state, _SCALING)
        alarms = self.arn("cloudwatch", f"alarm:TargetTracking-endpoint/{self.prefix}/*")
        # https://docs.aws.amazon.com/autoscaling/application/userguide/security_iam_id-based-policy-examples.html
        # https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-prerequisites.html
        actions = ["cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms"]
        if call.operation != "DeregisterScalableTarget":
            actions.append("cloudwatch:PutMetricAlarm")
            self.add(
                role,
                ["sagemaker:DescribeEndpoint", "sagemaker:UpdateEndpointWeightsAndCapacities"],
                [self.sagemaker("endpoint")],
                state,
            )
            self.add(role, ["sagemaker:DescribeEndpointConfig"], [self.sagemaker("endpoint-config")], state)
            service = "sagemaker.application-autoscaling.amazonaws.com"
            linked = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/{service}/*"
            self.add(role, ["iam:CreateServiceLinkedRole"], [linked], state, [("iam:AWSServiceName", service)])
        self.add(role, actions, [alarms], state)

    def _grants_key(self, role: str, key: str, why: str) -> None:
        """SageMaker lets its machines use a key by a grant, which it makes with the role's rights."""
        self.add(role, ["kms:CreateGrant"], [key], why, [("kms:GrantIsForAWSResource", "true")])
        self.add(role, ["kms:DescribeKey"], [key], why)

    # -- storage --

    def _object(self, role: str, action: str, uri: str, why: str) -> None:
        self.add(role, [action], [_objects(uri)], why)
        # https://docs.aws.amazon.com/AmazonS3/latest/userguide/UsingKMSEncryption.html#require-sse-kms
        if uri.startswith(f"s3://{self._data_bucket()}/") and self.config.kms_key:
            writing = ["kms:GenerateDataKey*"] if action == "s3:PutObject" else []
            self.add(role, ["kms:Decrypt", *writing], [self._key()], f"{why}: encrypted objects")

    def _key(self) -> str:
        """The stage's own key."""
        if self.config.kms_key != "create":
            return self.config.kms_key
        (name,) = [name for name in self.deployment.of_type("AWS::KMS::Key") if name.startswith("StorageKey")]
        return self.deployment.arn(name)

    def _reads(self, role: str, uri: str, why: str) -> None:
        """An object or a folder, and its listing: SageMaker lists what it copies."""
        self._object(role, "s3:GetObject", uri, why)
        bucket, key = _split(_objects(uri))
        folder = key.removesuffix("*").removesuffix("/")
        self.add(role, ["s3:ListBucket"], [bucket], why, [("s3:prefix", instance(folder, "a1"))])

    def _writes(self, role: str, uri: str, why: str) -> None:
        for action in ("s3:PutObject", "s3:AbortMultipartUpload"):
            self._object(role, action, uri, why)

    # -- jobs --

    def of_jobs(self, asked: list[tuple[str, Any]]) -> None:
        """What SageMaker does with a job's role, and what our own code does."""
        for state, request in asked:
            call = call_of(self.deployment.machine["States"][state]["Resource"])
            if call.operation == "CreateProcessingJob":
                self._processing(self.deployment.role_named(request["RoleArn"]), state, request)
            elif call.operation == "CreateTrainingJob":
                self._training(self.deployment.role_named(request["RoleArn"]), state, request, request["HyperParameters"])
            elif call.operation == "CreateHyperParameterTuningJob":
                definition = request["TrainingJobDefinition"]
                self._training(
                    self.deployment.role_named(definition["RoleArn"]), state, definition, definition["StaticHyperParameters"]
                )
            elif call.operation == "CreateModel":
                self._serving(self.deployment.role_named(request["ExecutionRoleArn"]), state, request)

    def _container(self, role: str, image: str, state: str, request: Json) -> None:
        """https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html"""
        self.add(role, LOGS, [self.arn("logs", "log-group:/aws/sagemaker/*")], f"{state}: the container's log")
        self.add(
            role,
            ["cloudwatch:PutMetricData"],
            ["*"],
            f"{state}: the container's metrics",
            [("cloudwatch:namespace", "/aws/sagemaker/TrainingJobs")],
        )
        self.add(role, ["ecr:GetAuthorizationToken"], ["*"], f"{state}: the container's image")
        self._pull(role, image, state)
        vpc = request.get("VpcConfig") or request.get("NetworkConfig", {}).get("VpcConfig")
        if vpc:
            self._network(role, f"{state}: the container's network interfaces")
        for key in sorted(set(_volume_keys(request))):
            self._grants_key(role, key, f"{state}: its volume")
            self.add(role, ["kms:Decrypt", "kms:GenerateDataKey*"], [key], f"{state}: its volume")

    def _network(self, role: str, why: str) -> None:
        """https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazonec2.html"""
        interfaces, subnets, groups = (self.arn("ec2", f"{kind}/*") for kind in ("network-interface", "subnet", "security-group"))
        self.add(role, ["ec2:CreateNetworkInterface"], [interfaces, subnets, groups], why)
        actions = ("CreateNetworkInterfacePermission", "DeleteNetworkInterfacePermission", "DeleteNetworkInterface")
        self.add(role, [f"ec2:{action}" for action in actions], [interfaces], why)
        looks = ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")
        self.add(role, [f"ec2:Describe{what}" for what in looks], ["*"], why)

    def _pull(self, role: str, image: str, state: str) -> None:
        self.add(role, PULL, [_repository(image)], f"{state}: the container's image")

    def _processing(self, role: str, state: str, request: Json) -> None:
        self._container(role, request["AppSpecification"]["ImageUri"], state, request)
        for one in request["ProcessingInputs"]:
            uri = one["S3Input"]["S3Uri"]
            if uri.split("/")[2] in self.config.source_buckets:
                self._flag(role, state, one["InputName"], uri)
            else:
                self._reads(role, uri, f"{state}: input {one['InputName']}")
        for one in request["ProcessingOutputConfig"]["Outputs"]:
            self._writes(role, one["S3Output"]["S3Uri"], f"{state}: output {one['OutputName']}")
        words = request["AppSpecification"]["ContainerArguments"]
        flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        script = request["AppSpecification"]["ContainerEntrypoint"][-1]
        for name, value in flags.items():
            if value.startswith("s3://"):
                self._flag(role, state, name, value)
        if script == "report.py":
            for service, operation in contracts.calls_of(_REPORT, frozenset({"sagemaker"})):
                self.add(
                    role, [f"{service}:{operation}"], [self.sagemaker(kind) for kind in _KINDS[operation]], f"{state}: {script}"
                )

    def _flag(self, role: str, state: str, name: str, value: str) -> None:
        """Addresses that our own code reads or writes by itself (model_code/classifier/storage.py)."""
        bucket = value.split("/")[2]
        if bucket != self._data_bucket():
            # Somebody else's bucket: which keys may be read is their policy's to say.
            self.add(role, ["s3:GetObject"], [f"arn:aws:s3:::{bucket}/*"], f"{state}: --{name}")
            self.add(role, ["s3:ListBucket"], [f"arn:aws:s3:::{bucket}"], f"{state}: --{name}")
            self.add(role, ["kms:Decrypt"], self.config.source_keys, f"{state}: --{name}")
            return
        self._reads(role, value, f"{state}: --{name}")
        if name == "exchange_uri":
            self._writes(role, value, f"{state}: --{name}")
        if name == "champion_uri":
            # The serving model is measured on the same test set.
            self._reads(role, f"s3://{bucket}/models/x/model.tar.gz", f"{state}: the champion's artifact")

    def _training(self, role: str, state: str, request: Json, values: Json) -> None:
        self._container(role, request["AlgorithmSpecification"]["TrainingImage"], state, request)
        for one in request["InputDataConfig"]:
            self._reads(role, one["DataSource"]["S3DataSource"]["S3Uri"], f"{state}: channel {one['ChannelName']}")
        if values["sagemaker_submit_directory"].startswith("s3:"):
            self._reads(role, values["sagemaker_submit_directory"], f"{state}: the code")
        self._writes(role, f"{request['OutputDataConfig']['S3OutputPath']}/", f"{state}: the artifact")
        if "CheckpointConfig" in request:
            uri = f"{request['CheckpointConfig']['S3Uri']}/"
            self._reads(role, uri, f"{state}: checkpoints")
            self._writes(role, uri, f"{state}: checkpoints")
            # The oldest go while the job runs: SageMaker mirrors the folder, deletions included.
            self._object(role, "s3:DeleteObject", uri, f"{state}: checkpoints")
        run = request.get("Environment", {}).get("RUN_OUTPUT_URI")
        for folder in _UPLOADED if run else ():
            self._writes(role, f"{run}/{folder}/", f"{state}: {folder}")
        managed = request.get("DebugHookConfig", {}).get("S3OutputPath")
        if managed:
            self._reads(role, f"{managed}/", f"{state}: SageMaker Debugger")
            self._writes(role, f"{managed}/", f"{state}: SageMaker Debugger")
            self._pull(role, request["DebugRuleConfigurations"][0]["RuleEvaluatorImage"], state)

    def _serving(self, role: str, state: str, request: Json) -> None:
        container = request["PrimaryContainer"]
        if "Image" not in container:
            return
        self._container(role, container["Image"], state, request)
        self._reads(role, container["ModelDataUrl"], f"{state}: the artifact")

    # -- Lambdas --

    def of_functions(self) -> None:
        """Calls in the Lambdas' source, on this stage's names."""
        for name, function in self.deployment.of_type("AWS::Lambda::Function").items():
            role = self.deployment.role_named(str(function["Role"]))
            if role.startswith(CDKS_OWN) or "Handler" not in function or str(function["Runtime"]).startswith("nodejs"):
                continue
            group = str(function["LoggingConfig"]["LogGroup"])
            self.add(
                role, ["logs:CreateLogStream", "logs:PutLogEvents"], [self.arn("logs", f"log-group:{group}:*")], f"{name}'s log"
            )
            self._calls(role, str(function["Handler"]), function.get("Environment", {}).get("Variables", {}))

    def _calls(self, role: str, handler: str, variables: dict[str, Any]) -> None:
        modules = contracts.modules_of(handler)
        services = contracts.clients_of(tuple(modules.values()))
        for module, path in sorted(modules.items()):
            for service, operation in sorted(contracts.calls_of((path,), services)):
                condition = _ONLY_IF.get((module, operation)) or _ONLY_IF.get((module, ""))
                if condition and str(variables.get(condition[0], "")) not in condition[1]:
                    continue
                if module == "clean_up" and handler != "clean_up.handle":
                    continue  # the others take one small function from there, which calls nothing
                if operation in _DATA and not self.config.destroys_data:
                    continue  # a stage that keeps its data keeps its packages and its endpoint's log
                self._call(role, handler, service, operation, variables)
        if handler == "smoke_test.handle" and variables.get("AUTH") == "iam":
            (api,) = self.deployment.of_type("AWS::ApiGateway::RestApi")
            stage = self.prefix.rsplit("-", 1)[-1]
            self.add(role, ["execute-api:Invoke"], [self.arn("execute-api", f"{api}/{stage}/POST/predict")], handler)
        if "TOKEN_SECRET_ARN" in variables:
            # CDK's grant brings the description too; boto3's own caching clients ask for it.
            self.add(role, ["secretsmanager:DescribeSecret"], [str(variables["TOKEN_SECRET_ARN"])], handler)
        if handler in ("idle.handle", "on_destroy.handle") and self.config.endpoint.mode == "realtime":
            self._ends_scaling(role, handler)

    def _ends_scaling(self, role: str, handler: str) -> None:
        """Whoever deletes a scaled endpoint ends its scaling, and so deletes the alarms that scaling made."""
        self.add(
            role,
            ["application-autoscaling:DeregisterScalableTarget"],
            [self.arn("application-autoscaling", "scalable-target/*")],
            handler,
            _SCALING,
        )
        alarms = self.arn("cloudwatch", f"alarm:TargetTracking-endpoint/{self.prefix}/*")
        self.add(role, ["cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms"], [alarms], handler)

    def _call(self, role: str, handler: str, service: str, operation: str, variables: dict[str, Any]) -> None:
        action = f"{_PREFIX.get(service, service)}:{operation}"
        machine = self.one_of_type("AWS::StepFunctions::StateMachine")
        execution = f"{machine[0].replace(':stateMachine:', ':execution:')}:"
        match service, operation:
            case "sagemaker" | "sagemaker-runtime", name if name in _KINDS:
                self.add(role, [action], [self.sagemaker(kind) for kind in _KINDS[name]], handler)
            case "s3", "ListObjectsV2":
                bucket = f"arn:aws:s3:::{self._data_bucket()}"
                for start in UPLOADS:
                    self.add(role, ["s3:ListBucket"], [bucket], handler, [("s3:prefix", f"{start}a1")])
                self.add(role, ["s3:ListBucket"], [f"arn:aws:s3:::{name}" for name in self.config.source_buckets], handler)
            case "s3", _:
                for key in _LAMBDA_KEYS[handler]:
                    uri = f"s3://{self._data_bucket()}/{key}"
                    self._object(role, action, uri, handler)
                    # Without the right to list, a missing object would be told as forbidden.
                    self._reads(role, uri, handler)
            case "secretsmanager", _:
                self.add(role, [action], [str(variables["TOKEN_SECRET_ARN"])], handler)
                if self.config.kms_key:
                    self.add(role, ["kms:Decrypt"], [self._key()], f"{handler}: the encrypted token")
            case "stepfunctions", "ListExecutions" | "StartExecution":
                self.add(role, [action], machine, handler)
            case "stepfunctions", "DescribeExecution":
                self.add(role, [action], [f"{execution}wake-*"], handler)
            case "stepfunctions", "StopExecution":
                self.add(role, [action], [f"{execution}*"], handler)
            case "logs", "DeleteLogGroup":
                group = self.arn("logs", f"log-group:/aws/sagemaker/Endpoints/{self.prefix}")
                self.add(role, [action], [group, f"{group}:*"], handler)
            case "application-autoscaling", _:
                pass  # see _ends_scaling
            case "ecr", _:
                images = json.loads(str(variables["IMAGES"]))
                self.add(role, [action], sorted({_repository(image) for image in images}), handler)
            case "scheduler", _:
                self.add(role, [action], [self.arn("scheduler", f"schedule/{self.prefix}/incoming")], handler)
                self.add(
                    role,
                    ["iam:PassRole"],
                    [str(variables["SCHEDULE_ROLE_ARN"])],
                    handler,
                    [("iam:PassedToService", "scheduler.amazonaws.com")],
                )
            case _:
                self.add(role, [action], ["*"], handler)

    def _data_bucket(self) -> str:
        """The data bucket: the machine's objects lie in it."""
        states = self.deployment.machine["States"]
        return str(states["WriteChampion"]["Arguments"]["Bucket"])

    # -- the image's build --

    def of_build(self) -> None:
        """https://docs.aws.amazon.com/codebuild/latest/userguide/setting-up-service-role.html"""
        for name, project in self.deployment.of_type("AWS::CodeBuild::Project").items():
            role = self.deployment.role_named(str(project["ServiceRole"]))
            repositories = self.one_of_type("AWS::ECR::Repository")
            self.add(role, [*PULL, *PUSH], repositories, f"{name}: docker push")
            self.add(role, ["ecr:GetAuthorizationToken"], ["*"], f"{name}: docker login")
            group = str(project["LogsConfig"]["CloudWatchLogs"]["GroupName"])
            self.add(
                role, ["logs:CreateLogStream", "logs:PutLogEvents"], [self.arn("logs", f"log-group:{group}:*")], f"{name}'s log"
            )
            # CDK's grant for the group that CodeBuild would make by itself.
            for known in (f"log-group:/aws/codebuild/{project['Name']}", f"log-group:/aws/codebuild/{project['Name']}:*"):
                self.add(
                    role,
                    ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"],
                    [self.arn("logs", known)],
                    f"{name}'s log",
                )
            bucket, _, key = str(project["Source"]["Location"]).partition("/")
            # CDK's grant on its own asset: one object, and its bucket's listing.
            for action in ("s3:GetObject*", "s3:GetBucket*", "s3:List*"):
                self.add(role, [action], [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{key}"], f"{name}: the source")

    # -- what is there in some configurations only --

    def of_others(self) -> None:
        """Triggers, the network's log, keys."""
        machine = self.one_of_type("AWS::StepFunctions::StateMachine")
        for name in self.deployment.of_type("AWS::IAM::Role"):
            if name.startswith("TriggersRole"):
                self.add(name, ["states:StartExecution"], machine, "the schedule")
        for item in self.deployment.of_type("AWS::EC2::FlowLog").values():
            role = self.deployment.role_named(str(item["DeliverLogsPermissionArn"]))
            group = self.arn("logs", f"log-group:{item['LogGroupName']}:*")
            # https://docs.aws.amazon.com/vpc/latest/userguide/flow-logs-iam-role.html
            self.add(role, ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"], [group], "the network's log")


_UPLOADED = ("debug-output", "profiler-output", "rule-output")
"""Folders that the training uploads below ``RUN_OUTPUT_URI`` (model_code/classifier/uploads)."""
_REPORT = (contracts.CLASSIFIER / "report_jobs.py", contracts.CLASSIFIER / "reporting.py")
_LAMBDA_KEYS = {
    "handler.handle": ("champion.json", "models/*/labels.json"),
    "smoke_test.handle": ("models/*/smoke/*",),
}
_DATA = ("ListModelPackages", "DeleteModelPackage", "DeleteLogGroup")
# (module, operation) -> (environment variable, the values with which the call is made).
_ONLY_IF: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("waking", ""): ("WAKES", ("true",)),
    ("smoke_test", "GetSecretValue"): ("AUTH", ("token",)),
}


def _repository(image: str) -> str:
    """ARN of the repository of a container image."""
    account, _, rest = image.partition(".dkr.ecr.")
    region, _, name = rest.partition(".amazonaws.com/")
    return f"arn:aws:ecr:{region}:{account}:repository/{name.split('@')[0].split(':')[0]}"


def _volume_keys(value: Any) -> Iterator[str]:
    """KMS keys of the volumes that a request names."""
    if isinstance(value, dict):
        if "VolumeKmsKeyId" in value:
            yield str(value["VolumeKmsKeyId"])
        for item in value.values():
            yield from _volume_keys(item)


def _objects(uri: str) -> str:
    """ARN pattern of what an address of one run stands for: any run's, any data set's, any model's."""
    parts = urlsplit(uri)
    words = parts.path.lstrip("/").split("/")
    arn = f"arn:aws:s3:::{parts.netloc}/"
    if words[0] == "runs":
        if len(words) >= 4 and words[-1].endswith(".json"):
            return f"{arn}runs/*/{'/'.join(words[2:])}"
        # RUN_OUTPUT_URI's own folders, or the whole of a run.
        return f"{arn}runs/*/{words[2]}/*" if len(words) > 2 and words[2] else f"{arn}runs/*"
    if words[0] in ("datasets", "models", "incoming", "pretrained", "wheels"):
        return f"{arn}{'/'.join(words)}" if "*" in uri else f"{arn}{words[0]}/*"
    return f"{arn}{'/'.join(words)}"


def _split(arn: str) -> tuple[str, str]:
    """ARN of the bucket, and the key."""
    bucket, _, key = arn.partition("/")
    return bucket, key
