"""Operations: messages, alarms, a dashboard, and the clean-up of what executions made when the stack is deleted."""

from __future__ import annotations

from pathlib import Path

from aws_cdk import Aws, CustomResource, Duration, RemovalPolicy
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_events as events
from aws_cdk import aws_events_targets as targets
from aws_cdk import aws_iam as iam
from aws_cdk import aws_kms as kms
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from aws_cdk import aws_stepfunctions as sfn
from constructs import Construct

from infra.config import StageConfig
from infra.functions import Function
from infra.requests import rollback_alarms
from infra.roles import sagemaker_arn, sagemaker_arns, tracking_alarms

IDLE_CHECK_MINUTES = 15


class Notifications(Construct):
    """The topic for results and alarms, encrypted with a key that CloudWatch may use (AWS's own SNS key does not allow it)."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id)
        self.key = kms.Key(
            self,
            "Key",
            description=f"Messages of {config.prefix}",
            enable_key_rotation=True,
            pending_window=Duration.days(7),
            removal_policy=RemovalPolicy.DESTROY,
        )
        self.key.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.ServicePrincipal("cloudwatch.amazonaws.com")],
                actions=["kms:Decrypt", "kms:GenerateDataKey*"],
                resources=["*"],
                # AWS's own example has no condition here either: SNS asks for the key, and an alarm that cannot be sent is
                # silent. Whose alarms may use the topic is the topic's policy.
            )
        )
        self.topic = sns.Topic(self, "Topic", display_name=config.prefix, master_key=self.key, enforce_ssl=True)
        self.topic.add_to_resource_policy(
            iam.PolicyStatement(
                principals=[iam.ServicePrincipal("cloudwatch.amazonaws.com")],
                actions=["sns:Publish"],
                resources=[self.topic.topic_arn],
                conditions={"StringEquals": {"aws:SourceAccount": Aws.ACCOUNT_ID}},
            )
        )
        if config.alarm_email:
            self.topic.add_subscription(subscriptions.EmailSubscription(config.alarm_email))


class Watch(Construct):
    """Alarms on what users notice, and a dashboard to look at when one rings."""

    def __init__(
        self,
        scope: Construct,
        construct_id: str,
        *,
        config: StageConfig,
        api: apigateway.RestApi,
        machine: sfn.StateMachine,
        topic: sns.ITopic,
    ) -> None:
        super().__init__(scope, construct_id)
        minutes = Duration.minutes(5)
        server_errors = api.metric_server_error(statistic="Sum", period=minutes)
        failed = machine.metric_failed(period=minutes)
        endpoint = self._endpoint_metric(config, "Invocation5XXErrors", "Sum")
        self._alarm("ApiErrors", f"{config.prefix}-api-errors", server_errors, 5, topic, "The API answers with errors (5xx).")
        self._alarm("RunFailed", f"{config.prefix}-run-failed", failed, 1, topic, "A run of the state machine failed.")
        self._alarm(
            "EndpointErrors", f"{config.prefix}-endpoint-errors", endpoint, 5, topic, "The model's server answers with errors."
        )
        if config.endpoint.mode == "realtime":
            self._rollback_alarms(config)
        latency = api.metric_latency(statistic="p99", period=minutes)
        rows = [
            [self._graph("Requests", [api.metric_count(period=minutes)]), self._graph("Latency p99 (ms)", [latency])],
            [self._graph("API errors", [server_errors, api.metric_client_error(period=minutes)]), self._graph("Runs", [failed])],
            [
                self._graph("Model latency p99 (µs)", [self._endpoint_metric(config, "ModelLatency", "p99")]),
                self._graph("Endpoint errors", [endpoint]),
            ],
        ]
        cloudwatch.Dashboard(self, "Dashboard", dashboard_name=config.prefix, widgets=rows)

    def _endpoint_metric(self, config: StageConfig, name: str, statistic: str, minutes: int = 5) -> cloudwatch.Metric:
        """A metric of the endpoint; it exists as soon as the state machine has made the endpoint."""
        return cloudwatch.Metric(
            namespace="AWS/SageMaker",
            metric_name=name,
            dimensions_map={"EndpointName": config.prefix, "VariantName": "main"},
            statistic=statistic,
            period=Duration.minutes(minutes),
        )

    def _rollback_alarms(self, config: StageConfig) -> None:
        """What SageMaker watches while a new model takes over. They send no message: the execution says what happened."""
        errors, latency, invalid = rollback_alarms(config)
        nonsense = cloudwatch.Metric(
            namespace=metric_namespace(config),
            metric_name="InvalidAnswers",
            dimensions_map={"Endpoint": config.prefix},
            statistic="Sum",
            period=Duration.minutes(1),
        )
        watched = (
            ("RollbackErrors", errors, self._endpoint_metric(config, "Invocation5XXErrors", "Sum", 1), 1.0, "answers with errors"),
            (
                "RollbackLatency",
                latency,
                self._endpoint_metric(config, "ModelLatency", "p99", 1),
                config.endpoint.max_latency_ms * 1000.0,
                "is slow (µs)",
            ),
            ("RollbackInvalid", invalid, nonsense, 1.0, "gives answers that make no sense"),
        )
        for construct_id, name, metric, threshold, what in watched:
            self._alarm(construct_id, name, metric, threshold, None, f"The model's server {what}: a new one is taken back.")

    def _alarm(
        self, construct_id: str, name: str, metric: cloudwatch.IMetric, threshold: float, topic: sns.ITopic | None, text: str
    ) -> None:
        """An alarm that rings at ``threshold`` in the metric's period; no data is good news."""
        alarm = cloudwatch.Alarm(
            self,
            construct_id,
            alarm_name=name,
            alarm_description=text,
            metric=metric,
            threshold=threshold,
            evaluation_periods=1,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        if topic is not None:
            alarm.add_alarm_action(actions.SnsAction(topic))

    def _graph(self, title: str, metrics: list[cloudwatch.IMetric]) -> cloudwatch.GraphWidget:
        """One diagram."""
        return cloudwatch.GraphWidget(title=title, left=metrics, width=12)


def clean_up(scope: Construct, construct_id: str, *, config: StageConfig, folder: Path) -> Function:
    """The Lambda that removes what a failed execution made."""
    function = Function(
        scope,
        construct_id,
        config=config,
        code=folder,
        handler="clean_up.handle",
        description="Removes the model and endpoint configuration of a failed run, unless they serve",
        environment={"ENDPOINT_NAME": config.prefix},
        timeout_s=120,
    )
    configs, models = (sagemaker_arns(config.prefix, [kind]) for kind in ("endpoint-config", "model"))
    function.allow(["sagemaker:DescribeEndpoint"], [sagemaker_arn(f"endpoint/{config.prefix}")])
    function.allow(["sagemaker:DescribeEndpointConfig", "sagemaker:DeleteEndpointConfig"], configs)
    function.allow(["sagemaker:DeleteModel"], models)
    return function


def metric_namespace(config: StageConfig) -> str:
    """Where the API counts what it thinks of the model's answers."""
    return f"ImageClassifier/{config.prefix}"


class IdleSwitch(Construct):
    """Removes a real-time endpoint that nobody asks; the API brings it back (lambdas/predict/waking.py)."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig, folder: Path, machine_arn: str) -> None:
        super().__init__(scope, construct_id)
        self.handler = Function(
            self,
            "Handler",
            config=config,
            code=folder,
            handler="idle.handle",
            description=f"Removes the endpoint after {config.endpoint.idle_hours} hours without a request",
            environment={
                "ENDPOINT_NAME": config.prefix,
                "IDLE_HOURS": str(config.endpoint.idle_hours),
                "STATE_MACHINE_ARN": machine_arn,
            },
            timeout_s=60,
        )
        endpoint = sagemaker_arn(f"endpoint/{config.prefix}")
        self.handler.allow(["sagemaker:DescribeEndpoint", "sagemaker:DeleteEndpoint"], [endpoint])
        self.handler.allow(["states:ListExecutions"], [machine_arn])
        self.handler.allow(["cloudwatch:GetMetricStatistics"], ["*"])
        stop_scaling(self.handler, config.prefix)
        rule = events.Rule(
            self,
            "Schedule",
            description=f"Whether {config.prefix} is asked at all",
            schedule=events.Schedule.rate(Duration.minutes(IDLE_CHECK_MINUTES)),
        )
        rule.add_target(targets.LambdaFunction(self.handler.function, retry_attempts=0))


def stop_scaling(function: Function, prefix: str) -> None:
    """Let a function end the scaling of an endpoint, which its deletion needs."""
    target = f"arn:{Aws.PARTITION}:application-autoscaling:{Aws.REGION}:{Aws.ACCOUNT_ID}:scalable-target/*"
    only: dict[str, object] = {"StringEquals": {"application-autoscaling:service-namespace": "sagemaker"}}
    function.allow(["application-autoscaling:DeregisterScalableTarget"], [target], only)
    # The policy goes with its target, and the policy's alarms with it.
    function.allow(["cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms"], [tracking_alarms(prefix)])


class OnDestroy(Construct):
    """On ``cdk destroy``: running executions stop, and the endpoint, configurations, models and packages go.

    CloudFormation does not know them, and an endpoint left behind costs money.
    """

    def __init__(
        self, scope: Construct, construct_id: str, *, config: StageConfig, folder: Path, machine: sfn.StateMachine
    ) -> None:
        super().__init__(scope, construct_id)
        prefix = config.prefix
        function = Function(
            self,
            "Handler",
            config=config,
            code=folder,
            handler="on_destroy.handle",
            description="Removes what executions made when the stack is deleted",
            environment={},
            timeout_s=900,
        )
        function.allow(
            [
                "sagemaker:ListEndpoints",
                "sagemaker:ListEndpointConfigs",
                "sagemaker:ListModels",
            ],
            ["*"],
        )
        packages = [sagemaker_arn(f"model-package-group/{prefix}"), sagemaker_arn(f"model-package/{prefix}/*")]
        function.allow(["sagemaker:ListModelPackages", "sagemaker:DeleteModelPackage"], packages)
        endpoint = sagemaker_arn(f"endpoint/{prefix}")
        function.allow(["sagemaker:DeleteEndpoint", "sagemaker:DescribeEndpoint"], [endpoint])
        function.allow(["sagemaker:DeleteEndpointConfig"], sagemaker_arns(prefix, ["endpoint-config"]))
        function.allow(["sagemaker:DeleteModel"], sagemaker_arns(prefix, ["model"]))
        if config.endpoint.mode == "realtime":
            stop_scaling(function, prefix)
        function.allow(["states:ListExecutions"], [machine.state_machine_arn])
        execution = f"arn:{Aws.PARTITION}:states:{Aws.REGION}:{Aws.ACCOUNT_ID}:execution:{prefix}:*"
        function.allow(["states:StopExecution"], [execution])
        self.resource = CustomResource(
            self,
            "Resource",
            service_token=function.function.function_arn,
            resource_type="Custom::RuntimeResources",
            properties={
                "Prefix": prefix,
                "StateMachineArn": machine.state_machine_arn,
                "DeletePackages": "true" if config.destroys_data else "false",
            },
        )
        # On deletion the policy must still be there when the function runs.
        self.resource.node.add_dependency(function.role)
        self.resource.node.add_dependency(machine)
