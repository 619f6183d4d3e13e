"""A Lambda as all of ours are: Python, its own role, its own log group, only the standard library and boto3."""

from __future__ import annotations

from pathlib import Path

from aws_cdk import CfnResource, Duration, RemovalPolicy
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.config import StageConfig

RUNTIME = lambda_.Runtime.PYTHON_3_13


def log_group(scope: Construct, construct_id: str, *, config: StageConfig, name: str | None = None) -> logs.LogGroup:
    """A log group whose entries expire; it goes with the stack unless the stage keeps its data."""
    group = logs.LogGroup(
        scope,
        construct_id,
        log_group_name=name,
        removal_policy=RemovalPolicy.DESTROY if config.destroys_data else RemovalPolicy.RETAIN,
    )
    child = group.node.default_child
    if isinstance(child, CfnResource):
        child.add_property_override("RetentionInDays", config.retention_days)
    return group


class Function(Construct):
    """A Lambda with a role that may do nothing but write its log; further rights are granted by the stack."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        config: StageConfig,
        code: Path,
        handler: str,
        description: str,
        environment: dict[str, str],
        timeout_s: int,
        memory_mb: int = 256,
    ) -> None:
        super().__init__(scope, construct_id)
        group = log_group(self, "Log", config=config)
        self.role = iam.Role(self, "Role", assumed_by=iam.ServicePrincipal("lambda.amazonaws.com"), description=description)
        group.grant_write(self.role)
        self.function = lambda_.Function(
            self,
            "Function",
            runtime=RUNTIME,
            architecture=lambda_.Architecture.ARM_64,
            code=lambda_.Code.from_asset(str(code)),
            handler=handler,
            description=description,
            environment={**environment, "LOG_LEVEL": config.log_level},
            timeout=Duration.seconds(timeout_s),
            memory_size=memory_mb,
            role=self.role,
            log_group=group,
        )

    def allow(self, actions: list[str], resources: list[str], conditions: dict[str, object] | None = None) -> None:
        """Grant actions on resources to this function alone."""
        self.role.add_to_policy(iam.PolicyStatement(actions=actions, resources=resources, conditions=conditions))
