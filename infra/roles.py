"""Roles: one per kind of job, one for the state machine. Each may do what its job does, on this stage's names only."""

from __future__ import annotations

from typing import Any

from aws_cdk import Aws, CfnMapping, Stack
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_s3_assets as assets
from constructs import Construct

from infra import images
from infra.config import StageConfig
from infra.machines import has_local_storage
from infra.requests import rollback_alarms

ROLES = ("PrepareRole", "FeaturesRole", "TrainingRole", "EvaluateRole", "ReportRole", "BatchRole")

READS: dict[str, tuple[str, ...]] = {
    "PrepareRole": ("incoming/*", "datasets/*", "runs/*/prepare-parts/*"),
    "FeaturesRole": ("datasets/*", "incoming/*", "pretrained/*"),
    "TrainingRole": ("datasets/*", "incoming/*", "pretrained/*", "runs/*/features/*", "runs/*/checkpoints/*"),
    "EvaluateRole": ("datasets/*", "runs/*/training/*", "models/*", "champion.json"),
    "ReportRole": ("runs/*",),
    "BatchRole": ("incoming/*", "models/*"),
}
"""Keys of the data bucket that each kind of job reads."""

WRITES: dict[str, tuple[str, ...]] = {
    "PrepareRole": ("datasets/*", "runs/*/prepare/*", "runs/*/prepare-parts/*"),
    "FeaturesRole": ("runs/*/features/*",),
    "TrainingRole": (
        "runs/*/tuning/*",
        "runs/*/training/*",
        "runs/*/checkpoints/*",
        "runs/*/debug-output/*",
        "runs/*/profiler-output/*",
        "runs/*/rule-output/*",
    ),
    "EvaluateRole": ("runs/*/evaluation/*", "models/*"),
    "ReportRole": ("runs/*/report/*", "runs/*/rule-output/*"),
    "BatchRole": ("runs/*/batch/*",),
}
"""Keys of the data bucket that each kind of job writes."""


UPLOADED = ("runs/*/debug-output/*", "runs/*/profiler-output/*", "runs/*/rule-output/*")
"""What a training writes while it goes on, beside what SageMaker uploads for it."""

MANAGED = ("runs/*/managed/*",)
"""What the managed debugger writes, and its rules read, where a stage has it."""

REPORTED: dict[str, tuple[str, ...]] = {
    "training-job": ("DescribeTrainingJob",),
    "processing-job": ("DescribeProcessingJob",),
    "hyper-parameter-tuning-job": ("DescribeHyperParameterTuningJob", "ListTrainingJobsForHyperParameterTuningJob"),
}
"""Kind of job -> what the report asks of those of its stage."""

PULL = ["ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"]


def allow(role: iam.Role, actions: list[str], resources: list[str], conditions: dict[str, Any] | None = None) -> None:
    """Grant actions on resources."""
    role.add_to_policy(iam.PolicyStatement(actions=actions, resources=resources, conditions=conditions))


def service_role(scope: Construct, construct_id: str, service: str, description: str) -> iam.Role:
    """A role that only ``service`` may assume, and only on behalf of this account (no confused deputy)."""
    principal = iam.ServicePrincipal(service, conditions={"StringEquals": {"aws:SourceAccount": Aws.ACCOUNT_ID}})
    return iam.Role(scope, construct_id, assumed_by=principal, description=description)


def sagemaker_arns(prefix: str, kinds: list[str]) -> list[str]:
    """ARNs of this stage's SageMaker resources: ``<kind>/<prefix>-*``."""
    return [f"arn:{Aws.PARTITION}:sagemaker:{Aws.REGION}:{Aws.ACCOUNT_ID}:{kind}/{prefix}-*" for kind in kinds]


def sagemaker_arn(resource: str) -> str:
    """ARN of one SageMaker resource. IAM compares endpoint ARNs in lower case; our names are lower case throughout."""
    return f"arn:{Aws.PARTITION}:sagemaker:{Aws.REGION}:{Aws.ACCOUNT_ID}:{resource}"


def read_keys(role: iam.Role, bucket: s3.IBucket, keys: tuple[str, ...]) -> None:
    """Read objects under keys, and list exactly those prefixes."""
    allow(role, ["s3:GetObject"], [bucket.arn_for_objects(key) for key in keys])
    allow(role, ["s3:ListBucket"], [bucket.bucket_arn], {"StringLike": {"s3:prefix": [_listed(key) for key in keys]}})


def _listed(key: str) -> str:
    """The listing pattern for a key pattern: SageMaker lists a folder with and without the slash at its end."""
    return f"{key.removesuffix('*').removesuffix('/')}*"


def write_keys(role: iam.Role, bucket: s3.IBucket, keys: tuple[str, ...]) -> None:
    """Write objects under keys."""
    allow(role, ["s3:PutObject", "s3:AbortMultipartUpload"], [bucket.arn_for_objects(key) for key in keys])


LOOKS = [f"ec2:Describe{what}" for what in ("DhcpOptions", "NetworkInterfaces", "SecurityGroups", "Subnets", "Vpcs")]
"""What SageMaker looks up in a VPC. EC2 knows no resource for these."""


def join_network(role: iam.Role) -> None:
    """Let SageMaker put the role's jobs into a VPC: https://docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html"""
    interfaces, subnets, groups = (
        f"arn:{Aws.PARTITION}:ec2:{Aws.REGION}:{Aws.ACCOUNT_ID}:{kind}/*"
        for kind in ("network-interface", "subnet", "security-group")
    )
    allow(role, ["ec2:CreateNetworkInterface"], [interfaces, subnets, groups])
    permission = ["ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterfacePermission"]
    allow(role, [*permission, "ec2:DeleteNetworkInterface"], [interfaces])
    allow(role, LOOKS, ["*"])


def grant_key(role: iam.Role, key: kms.IKey) -> None:
    """Let SageMaker's machines use a key, by a grant that SageMaker makes with the role's rights."""
    allow(role, ["kms:DescribeKey"], [key.key_arn])
    allow(role, ["kms:CreateGrant"], [key.key_arn], {"Bool": {"kms:GrantIsForAWSResource": "true"}})


class JobRoles(Construct):
    """The roles that SageMaker's jobs and endpoint take."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        config: StageConfig,
        bucket: s3.IBucket,
        code: assets.Asset,
        key: kms.IKey | None = None,
    ) -> None:
        super().__init__(scope, construct_id)
        self.roles = {name: self._job_role(name, bucket, code, config) for name in ROLES}
        for source in config.source_buckets:
            theirs = s3.Bucket.from_bucket_name(self, f"Source-{source}", source)
            for name in ("PrepareRole", "BatchRole"):
                allow(self.roles[name], ["s3:GetObject"], [theirs.arn_for_objects("*")])
                allow(self.roles[name], ["s3:ListBucket"], [theirs.bucket_arn])
                if config.source_keys:
                    allow(self.roles[name], ["kms:Decrypt"], list(config.source_keys))
        # What the run's jobs took and how they ended.
        for kind, actions in REPORTED.items():
            allow(self.roles["ReportRole"], [f"sagemaker:{action}" for action in actions], sagemaker_arns(config.prefix, [kind]))
        if config.managed_debugger:
            self._grant_managed_debugger(self.roles["TrainingRole"], bucket)
        # Checkpoints are overwritten and the oldest removed while a spot job runs.
        allow(self.roles["TrainingRole"], ["s3:DeleteObject"], [bucket.arn_for_objects("runs/*/checkpoints/*")])
        self.endpoint = self._sagemaker_role("EndpointRole", "Serves a model")
        read_keys(self.endpoint, bucket, ("models/*",))
        for role in [*self.roles.values(), self.endpoint] if config.network.own else ():
            join_network(role)
        if key is not None:
            self._grant_keys(config, key)
        if config.network.wheels:
            for role in self.roles.values():
                read_keys(role, bucket, (f"{config.network.wheels}*",))

    def _grant_keys(self, config: StageConfig, key: kms.IKey) -> None:
        """All read and the jobs write what is encrypted with it; so are volumes, where machines have no disks of their own."""
        allow(self.endpoint, ["kms:Decrypt"], [key.key_arn])
        for name, role in self.roles.items():
            allow(role, ["kms:Decrypt", "kms:GenerateDataKey*"], [key.key_arn])
            if any(not has_local_storage(one) for one in self._machines(name, config)):
                grant_key(role, key)

    def _machines(self, name: str, config: StageConfig) -> list[str]:
        """Instance types of the jobs that take a role."""
        if name == "TrainingRole":
            return [config.tuning_jobs.instance_type, config.training.instance_type]
        return [config.processing.instance_type]

    def _grant_managed_debugger(self, role: iam.Role, bucket: s3.IBucket) -> None:
        """SageMaker Debugger's rules take the training's role: they read what its hook wrote, and write what they found."""
        read_keys(role, bucket, MANAGED)
        write_keys(role, bucket, MANAGED)
        account = region_account(self, "DebuggerRules", images.DEBUGGER_ACCOUNTS)
        repository = f"arn:{Aws.PARTITION}:ecr:{Aws.REGION}:{account}:repository/{images.DEBUGGER_REPOSITORY}"
        allow(role, PULL, [repository])

    def _sagemaker_role(self, name: str, description: str) -> iam.Role:
        """A role for SageMaker with what every container needs: logs, metrics, and a registry login."""
        role = service_role(self, name, "sagemaker.amazonaws.com", description)
        logs = f"arn:{Aws.PARTITION}:logs:{Aws.REGION}:{Aws.ACCOUNT_ID}:log-group:/aws/sagemaker/*"
        allow(
            role,
            ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"],
            [logs],
        )
        allow(
            role,
            ["cloudwatch:PutMetricData"],
            ["*"],
            {"StringLike": {"cloudwatch:namespace": ["/aws/sagemaker/*", "aws/sagemaker/*", "AWS/SageMaker"]}},
        )
        allow(role, ["ecr:GetAuthorizationToken"], ["*"])
        return role

    def _job_role(self, name: str, bucket: s3.IBucket, code: assets.Asset, config: StageConfig) -> iam.Role:
        """A role for one kind of job: its keys, our code, AWS's container."""
        role = self._sagemaker_role(name, f"SageMaker jobs: {name.removesuffix('Role').lower()}")
        allow(role, PULL, [training_repository(self)])
        read_keys(role, bucket, READS[name])
        # What has no network uploads nothing by itself.
        hidden = UPLOADED if name == "TrainingRole" and config.network.isolation else ()
        write_keys(role, bucket, tuple(key for key in WRITES[name] if key not in hidden))
        read_keys(role, code.bucket, (code.s3_object_key,))
        return role


def images_account(scope: Construct) -> str:
    """The account that owns AWS's training containers in the region of the deployment."""
    return region_account(scope, "TrainingContainers", images.ACCOUNTS)


def region_account(scope: Construct, name: str, accounts: dict[str, str]) -> str:
    """The one of ``accounts`` (region -> account) for the region of the deployment, looked up in the template's table ``name``."""
    stack = Stack.of(scope)
    table = stack.node.try_find_child(name)
    if not isinstance(table, CfnMapping):
        rows = {region: {"account": account} for region, account in accounts.items()}
        table = CfnMapping(stack, name, mapping=rows, lazy=True)
    return table.find_in_map(Aws.REGION, "account")


def debugger_image(scope: Construct) -> str:
    """URI of the container with SageMaker Debugger's rules."""
    account = region_account(scope, "DebuggerRules", images.DEBUGGER_ACCOUNTS)
    return f"{account}.dkr.ecr.{Aws.REGION}.{Aws.URL_SUFFIX}/{images.DEBUGGER_REPOSITORY}:{images.DEBUGGER_TAG}"


def training_repository(scope: Construct) -> str:
    """ARN of the repository with AWS's PyTorch training containers."""
    return f"arn:{Aws.PARTITION}:ecr:{Aws.REGION}:{images_account(scope)}:repository/{images.REPOSITORY}"


def repository_of(image: str) -> str:
    """ARN of the repository of a container image such as ``<account>.dkr.ecr.<region>.amazonaws.com/<name>:<tag>``."""
    registry, _, name = image.partition("/")
    account, _, _, region = registry.split(".")[:4]
    return f"arn:{Aws.PARTITION}:ecr:{region}:{account}:repository/{name.partition('@')[0].partition(':')[0]}"


def training_image(scope: Construct, gpu: bool) -> str:
    """URI of AWS's PyTorch training container."""
    registry = f"{images_account(scope)}.dkr.ecr.{Aws.REGION}.{Aws.URL_SUFFIX}"
    return f"{registry}/{images.REPOSITORY}:{images.tag(gpu)}"


def grant_orchestration(role: iam.Role, *, config: StageConfig, bucket: s3.IBucket, job_roles: list[str]) -> None:
    """What the state machine needs to start, watch and stop this stage's jobs and to change its endpoint."""
    prefix = config.prefix
    jobs = {
        "training-job": "TrainingJob",
        "processing-job": "ProcessingJob",
        "hyper-parameter-tuning-job": "HyperParameterTuningJob",
    }
    for kind, call in jobs.items():
        allow(
            role,
            [f"sagemaker:Create{call}", f"sagemaker:Describe{call}", f"sagemaker:Stop{call}"],
            sagemaker_arns(prefix, [kind]),
        )
    # Why a search failed stands with its trials.
    allow(
        role,
        ["sagemaker:ListTrainingJobsForHyperParameterTuningJob"],
        sagemaker_arns(prefix, ["hyper-parameter-tuning-job"]),
    )
    _grant_serving_changes(role, prefix)
    taggable = [*sagemaker_arns(prefix, [*jobs, "model", "endpoint-config"]), sagemaker_arn(f"endpoint/{prefix}")]
    allow(role, ["sagemaker:AddTags"], taggable)
    allow(role, ["sagemaker:ListTags"], sagemaker_arns(prefix, [*jobs]))
    allow(role, ["iam:PassRole"], job_roles, {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}})
    names = [f"StepFunctionsGetEventsForSageMaker{kind}JobsRule" for kind in ("Training", "Tuning", "Processing")]
    if not config.serving_image_uri:
        names.append("StepFunctionsGetEventForCodeBuildStartBuildRule")
    allow(
        role,
        ["events:PutTargets", "events:PutRule", "events:DescribeRule"],
        [f"arn:{Aws.PARTITION}:events:{Aws.REGION}:{Aws.ACCOUNT_ID}:rule/{name}" for name in names],
    )
    read_keys(role, bucket, ("runs/*/prepare/result.json", "runs/*/evaluation/summary.json", "champion.json"))
    allow(role, ["s3:PutObject"], [bucket.arn_for_objects("champion.json")])
    if config.endpoint.mode == "realtime":
        _grant_scaling(role, config)


def _grant_serving_changes(role: iam.Role, prefix: str) -> None:
    """Models, configurations, packages and the endpoint of this stage."""
    endpoint = sagemaker_arn(f"endpoint/{prefix}")
    configs = sagemaker_arns(prefix, ["endpoint-config"])
    group, packages = sagemaker_arn(f"model-package-group/{prefix}"), sagemaker_arn(f"model-package/{prefix}/*")
    allow(role, ["sagemaker:CreateModel"], sagemaker_arns(prefix, ["model"]))
    allow(role, ["sagemaker:CreateEndpointConfig"], configs)
    allow(role, ["sagemaker:DescribeEndpoint", "sagemaker:DeleteEndpoint"], [endpoint])
    allow(role, ["sagemaker:CreateEndpoint", "sagemaker:UpdateEndpoint"], [endpoint, *configs])
    allow(role, ["sagemaker:CreateModelPackage"], [group, packages])
    allow(role, ["sagemaker:DescribeModelPackage"], [packages])


def tracking_alarms(prefix: str) -> str:
    """ARN of the alarms that Application Auto Scaling makes and deletes for the endpoint, with its caller's rights."""
    return f"arn:{Aws.PARTITION}:cloudwatch:{Aws.REGION}:{Aws.ACCOUNT_ID}:alarm:TargetTracking-endpoint/{prefix}/*"


def _grant_scaling(role: iam.Role, config: StageConfig) -> None:
    """Rollback alarms while an update goes on, and target tracking afterwards.

    Application Auto Scaling makes its alarms and asks for the endpoint with its caller's rights, and the first time in an account
    its own role: https://docs.aws.amazon.com/autoscaling/application/userguide/security_iam_id-based-policy-examples.html
    """
    alarm = f"arn:{Aws.PARTITION}:cloudwatch:{Aws.REGION}:{Aws.ACCOUNT_ID}:alarm"
    allow(role, ["cloudwatch:DescribeAlarms"], [f"{alarm}:{name}" for name in rollback_alarms(config)])
    target = f"arn:{Aws.PARTITION}:application-autoscaling:{Aws.REGION}:{Aws.ACCOUNT_ID}:scalable-target/*"
    only = {"StringEquals": {"application-autoscaling:service-namespace": "sagemaker"}}
    allow(role, ["application-autoscaling:DeregisterScalableTarget"], [target], only)
    allow(role, ["cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms"], [tracking_alarms(config.prefix)])
    if not config.endpoint.scales:
        return
    allow(role, ["application-autoscaling:RegisterScalableTarget", "application-autoscaling:PutScalingPolicy"], [target], only)
    allow(role, ["cloudwatch:PutMetricAlarm"], [tracking_alarms(config.prefix)])
    # https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-prerequisites.html
    allow(role, ["sagemaker:DescribeEndpointConfig"], sagemaker_arns(config.prefix, ["endpoint-config"]))
    allow(role, ["sagemaker:UpdateEndpointWeightsAndCapacities"], [sagemaker_arn(f"endpoint/{config.prefix}")])
    service = "sagemaker.application-autoscaling.amazonaws.com"
    linked = f"arn:{Aws.PARTITION}:iam::{Aws.ACCOUNT_ID}:role/aws-service-role/{service}/*"
    allow(role, ["iam:CreateServiceLinkedRole"], [linked], {"StringLike": {"iam:AWSServiceName": service}})
