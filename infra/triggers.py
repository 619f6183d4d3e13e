"""Triggers: what starts executions by itself, where a stage asks for it."""

from __future__ import annotations

from pathlib import Path

from aws_cdk import Aws
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_scheduler as scheduler
from constructs import Construct

from infra.config import StageConfig
from infra.functions import Function
from infra.roles import allow, service_role


class Triggers(Construct):
    """A schedule, and new data: each starts the state machine with the stage's defaults."""

    def __init__(
        self, scope: Construct, construct_id: str, *, config: StageConfig, bucket: s3.IBucket, machine_arn: str, folder: Path
    ) -> None:
        super().__init__(scope, construct_id)
        self.config, self.machine_arn = config, machine_arn
        self.role = service_role(self, "Role", "scheduler.amazonaws.com", f"Starts executions of {config.prefix}")
        allow(self.role, ["states:StartExecution"], [machine_arn])
        if config.triggers.schedule:
            self._schedule()
        self.incoming = self._incoming(bucket, folder) if config.triggers.incoming else None

    def _schedule(self) -> None:
        """One execution whenever the schedule says so."""
        scheduler.CfnSchedule(
            self,
            "Schedule",
            name=self.config.prefix,
            description=f"Trains {self.config.prefix} again",
            schedule_expression=self.config.triggers.schedule,
            flexible_time_window=scheduler.CfnSchedule.FlexibleTimeWindowProperty(mode="OFF"),
            target=scheduler.CfnSchedule.TargetProperty(
                arn=self.machine_arn,
                role_arn=self.role.role_arn,
                input="{}",
                # An execution that could not be started is not worth starting a day later.
                retry_policy=scheduler.CfnSchedule.RetryPolicyProperty(maximum_event_age_in_seconds=3600, maximum_retry_attempts=3),
            ),
        )

    def _incoming(self, bucket: s3.IBucket, folder: Path) -> Function:
        """New files push an appointment further; see lambdas/deploy/incoming.py. It goes with its group, that with the stack."""
        config = self.config
        group = scheduler.CfnScheduleGroup(self, "Group", name=config.prefix)
        function = Function(
            self,
            "Incoming",
            config=config,
            code=folder,
            handler="incoming.handle",
            description=f"Starts {config.prefix} once no more data come",
            environment={
                "SCHEDULE_GROUP": config.prefix,
                "SCHEDULE_ROLE_ARN": self.role.role_arn,
                "STATE_MACHINE_ARN": self.machine_arn,
                "QUIET_S": str(config.triggers.quiet_s),
            },
            timeout_s=30,
        )
        function.node.add_dependency(group)
        schedule = f"arn:{Aws.PARTITION}:scheduler:{Aws.REGION}:{Aws.ACCOUNT_ID}:schedule/{config.prefix}/incoming"
        function.allow(["scheduler:CreateSchedule", "scheduler:UpdateSchedule"], [schedule])
        passed: dict[str, object] = {"StringEquals": {"iam:PassedToService": "scheduler.amazonaws.com"}}
        function.allow(["iam:PassRole"], [self.role.role_arn], passed)
        rule = events.Rule(
            self,
            "NewData",
            description=f"New files under incoming/ of {config.prefix}",
            event_pattern=events.EventPattern(
                source=["aws.s3"],
                detail_type=["Object Created"],
                detail={"bucket": {"name": [bucket.bucket_name]}, "object": {"key": [{"prefix": "incoming/"}]}},
            ),
        )
        rule.add_target(targets.LambdaFunction(function.function, retry_attempts=2))
        return function
