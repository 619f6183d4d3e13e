"""Findings of cdk-nag that we accept, each with its reason, each on the construct and the very permission it is about.

A new wildcard is therefore a new finding, and ends synthesis with an error until somebody has judged it.
"""

from __future__ import annotations

from collections.abc import Iterable

import aws_cdk as cdk
from aws_cdk import aws_s3 as s3
from constructs import IConstruct

from infra.config import StageConfig
from infra.roles import MANAGED, READS, WRITES

KEYS = "Keys carry the name of a run or a hash of contents, both unknown when the stack is deployed; the prefix is exact."
NAMES = "Each execution names what it makes with this stage's prefix and a hash of its own."
NO_RESOURCE = "These actions know no resource: registry login, metrics (limited to SageMaker's namespaces)."
CONTAINER_LOGS = "SageMaker's job logs: one stream per job, in log groups that SageMaker makes."
OTHER_KEYS = ("runs/*/prepare/result.json", "runs/*/evaluation/summary.json", "models/*/labels.json")
SMOKE_KEYS = ("models/*/smoke/*",)

_ARN = "arn:<AWS::Partition>:{0}:<AWS::Region>:<AWS::AccountId>:{1}"


def accept(scope: IConstruct, rule: str, reason: str, details: Iterable[str] = ("",)) -> None:
    """Accept findings of one rule below ``scope``: only those with one of ``details``, where the rule gives any."""
    for detail in details:
        name = f"AwsSolutions::AwsSolutions-{rule}" + (f"[{detail}]" if detail else "")
        cdk.Validations.of(scope).acknowledge(cdk.Acknowledgment(id=name, reason=reason))


def accept_in_stack(stack: cdk.Stack, *, config: StageConfig, data: s3.IBucket) -> None:
    """Findings that concern the whole stack: names and keys that end in something an execution decides."""
    bucket = data.node.default_child
    name = (
        f"<{stack.get_logical_id(bucket)}.Arn>"
        if isinstance(bucket, cdk.CfnElement)
        else f"arn:<AWS::Partition>:s3:::{config.data_bucket}"
    )
    keys = {key for table in (READS, WRITES) for group in table.values() for key in group if "*" in key}
    managed = MANAGED if config.managed_debugger else ()
    if config.network.wheels:
        keys.add(f"{config.network.wheels}*")
    accept(stack, "IAM5", KEYS, [f"Resource::{name}/{key}" for key in sorted(keys | {*OTHER_KEYS, *SMOKE_KEYS, *managed})])
    kinds = ("training-job", "processing-job", "hyper-parameter-tuning-job", "model", "endpoint-config")
    arns = [_ARN.format("sagemaker", f"{kind}/{config.prefix}-*") for kind in kinds]
    arns.append(_ARN.format("sagemaker", f"model-package/{config.prefix}/*"))
    accept(stack, "IAM5", NAMES, [f"Resource::{arn}" for arn in arns])
    accept(
        stack,
        "L1",
        "Python 3.13 is supported until 2029-10 and is what the code is tested with; a newer runtime is a decision, not a default.",
    )


def accept_for_jobs(jobs: IConstruct) -> None:
    """The jobs' roles."""
    accept(jobs, "IAM5", NO_RESOURCE, ["Resource::*"])
    accept(jobs, "IAM5", CONTAINER_LOGS, [f"Resource::{_ARN.format('logs', 'log-group:/aws/sagemaker/*')}"])


def accept_for_machine(role: IConstruct, functions: list[str]) -> None:
    """The state machine's role; ``functions`` are logical ids of the Lambdas it calls."""
    accept(role, "IAM5", "Log delivery and X-Ray know no resource.", ["Resource::*"])
    accept(role, "IAM5", "Any version of exactly this function.", [f"Resource::<{name}.Arn>:*" for name in functions])
    accept(role, "IAM5", "GenerateDataKey and GenerateDataKeyWithoutPlaintext of one key.", ["Action::kms:GenerateDataKey*"])


def accept_for_build(role: IConstruct, project: str) -> None:
    """CodeBuild's role; ``project`` is the project's logical id."""
    accept(role, "IAM5", "A registry login knows no resource.", ["Resource::*"])
    accept(
        role,
        "IAM5",
        "CDK's read grant on the single object with the image's source.",
        ["Action::s3:GetBucket*", "Action::s3:GetObject*", "Action::s3:List*"],
    )
    group = _ARN.format("logs", f"log-group:/aws/codebuild/<{project}>:*")
    accept(role, "IAM5", "The project's own log streams.", [f"Resource::{group}"])


def accept_for_server(project: IConstruct) -> None:
    """The CodeBuild project."""
    accept(project, "CB4", "The build makes no artifact that a key could protect; the image lies in an encrypted repository.")


def accept_for_api(api: IConstruct) -> None:
    """The public API."""
    accept(api, "APIG2", "Bodies are pictures; type, size and header are checked by the Lambda, which a schema cannot do.")
    accept(
        api, "APIG3", "A web ACL costs more per month than this stack; throttling and a token protect it. Add one in production."
    )
    accept(api, "APIG4", "The page, /health and the API description are public on purpose and reveal nothing.")
    accept(api, "COG4", "A Lambda authorizer checks a token, or IAM a signature; there are no user accounts to keep in Cognito.")
    accept(
        api,
        "IAM4",
        "API Gateway accepts this managed policy for its account-wide log role.",
        ["Policy::arn:<AWS::Partition>:iam::aws:policy/service-role/AmazonAPIGatewayPushToCloudWatchLogs"],
    )
    accept(api, "SMG4", "The token is replaced by putting a new value; callers must learn it, so no schedule can rotate it.")


def accept_on_destroy(scope: IConstruct, *, config: StageConfig) -> None:
    """The clean-up on deletion."""
    accept(scope, "IAM5", "List calls know no resource; deletions are limited to this stage's names.", ["Resource::*"])
    execution = _ARN.format("states", f"execution:{config.prefix}:*")
    accept(scope, "IAM5", "Executions of exactly this state machine.", [f"Resource::{execution}"])
    if config.destroys_data:
        group = _ARN.format("logs", f"log-group:/aws/sagemaker/Endpoints/{config.prefix}:*")
        accept(scope, "IAM5", "Log groups are written so in policies: the endpoint's own.", [f"Resource::{group}"])


def accept_for_scaling(scopes: list[IConstruct], *, config: StageConfig) -> None:
    """Who starts and ends the scaling of a real-time endpoint."""
    target = _ARN.format("application-autoscaling", "scalable-target/*")
    alarms = _ARN.format("cloudwatch", f"alarm:TargetTracking-endpoint/{config.prefix}/*")
    service = "arn:<AWS::Partition>:iam::<AWS::AccountId>:role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/*"
    for scope in scopes:
        accept(
            scope,
            "IAM5",
            "A scalable target's id is random; a condition limits the service.",
            [f"Resource::{target}"],
        )
        accept(scope, "IAM5", "Application Auto Scaling names its alarms after the endpoint.", [f"Resource::{alarms}"])
    accept(scopes[0], "IAM5", "The role that scaling makes for itself, once in an account.", [f"Resource::{service}"])
    for scope in scopes[2:]:
        accept(scope, "IAM5", "CloudWatch's metrics know no resource.", ["Resource::*"])


def accept_for_waking(api: IConstruct, *, config: StageConfig) -> None:
    """The API, where it wakes a sleeping endpoint."""
    executions = _ARN.format("states", f"execution:{config.prefix}:wake-*")
    accept(api, "IAM5", "Executions that the API itself has named.", [f"Resource::{executions}"])


def accept_without_tracing(pipeline: IConstruct) -> None:
    """A stage that asked for no traces."""
    accept(pipeline, "SF2", "X-Ray is switched off in this stage's configuration (tracing).")


def accept_for_dry_run(scope: IConstruct) -> None:
    """What only looks."""
    accept(scope, "IAM5", "Service Quotas' lists know no resource.", ["Resource::*"])


def accept_for_clean_up(scope: IConstruct) -> None:
    """What stops and removes."""
    accept(scope, "IAM5", "List calls know no resource; what is stopped and removed has this stage's names.", ["Resource::*"])


def accept_for_key(scopes: list[IConstruct]) -> None:
    """Whoever uses the stage's own key."""
    for scope in scopes:
        accept(scope, "IAM5", "GenerateDataKey and GenerateDataKeyWithoutPlaintext of one key.", ["Action::kms:GenerateDataKey*"])


def accept_for_network(jobs: IConstruct, network: IConstruct | None) -> None:
    """Network interfaces of jobs in a VPC."""
    kinds = ("network-interface", "subnet", "security-group")
    details = [f"Resource::{_ARN.format('ec2', f'{kind}/*')}" for kind in kinds]
    accept(jobs, "IAM5", "SageMaker makes and removes the interfaces; their ids are random.", details)
    if network is not None:
        accept(network, "EC23", "Only the jobs' own security group may ask AWS's endpoints.")


def accept_for_sources(jobs: IConstruct, *, config: StageConfig) -> None:
    """Buckets of others that jobs read."""
    details = [f"Resource::arn:<AWS::Partition>:s3:::{bucket}/*" for bucket in config.source_buckets]
    accept(jobs, "IAM5", "Somebody else's bucket of pictures: which keys is their policy's to say.", details)
