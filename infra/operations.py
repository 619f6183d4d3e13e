"""Operations: messages, alarms, a dashboard, and the clean-up of what executions made when the stack is deleted."""

from __future__ import annotations

import json
from pathlib import Path

from aws_cdk import Aws, CustomResource, Duration, RemovalPolicy, Stack
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_budgets as budgets
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

from infra import code
from infra.config import StageConfig
from infra.functions import Function
from infra.requests import rollback_alarms
from infra.roles import sagemaker_arn, sagemaker_arns, tracking_alarms

IDLE_CHECK_MINUTES = 15
IDLE_ALARM_HOURS = 24


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
        latency = api.metric_latency(statistic="p99", period=minutes)
        name = config.prefix
        self._alarm("ApiErrors", f"{name}-api-errors", server_errors, 5, topic, "The API answers with errors (5xx).")
        self._alarm(
            "ApiLatency", f"{name}-api-latency", latency, 10_000, topic, "The API answers slowly (p99 above 10 s).", periods=3
        )
        self._alarm("RunFailed", f"{name}-run-failed", failed, 1, topic, "A run of the state machine failed.")
        stuck = machine.metric_timed_out(period=minutes)
        self._alarm("RunTimedOut", f"{name}-run-timed-out", stuck, 1, topic, "A run of the state machine took too long.")
        self._alarm("EndpointErrors", f"{name}-endpoint-errors", endpoint, 5, topic, "The model's server answers with errors.")
        if config.endpoint.mode == "realtime":
            self._rollback_alarms(config)
            self._idle_alarm(config, topic)
        self._dashboard(config, api, machine, latency)

    def _idle_alarm(self, config: StageConfig, topic: sns.ITopic) -> None:
        """A real-time endpoint costs money also when nobody asks: somebody should know."""
        alarm = cloudwatch.Alarm(
            self,
            "EndpointIdle",
            alarm_name=f"{config.prefix}-endpoint-idle",
            alarm_description=f"Nobody has asked the endpoint for {IDLE_ALARM_HOURS} hours; its machines are paid for.",
            metric=self._idle(config),
            threshold=1,
            evaluation_periods=IDLE_ALARM_HOURS,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            # No machine, no metric, no cost.
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        alarm.add_alarm_action(actions.SnsAction(topic))

    def _idle(self, config: StageConfig) -> cloudwatch.MathExpression:
        """1 for an hour in which machines ran and nobody asked, 0 for one in which somebody did."""
        hour = Duration.hours(1)
        running = cloudwatch.Metric(
            namespace="/aws/sagemaker/Endpoints",
            metric_name="CPUUtilization",
            dimensions_map={"EndpointName": config.prefix, "VariantName": "main"},
            statistic="SampleCount",
            period=hour,
        )
        asked = self._endpoint_metric(config, "Invocations", "Sum", 60)
        return cloudwatch.MathExpression(
            expression="IF(running > 0 AND FILL(asked, 0) < 1, 1, 0)",
            using_metrics={"running": running, "asked": asked},
            label="hours without a request",
            period=hour,
        )

    def _dashboard(
        self, config: StageConfig, api: apigateway.RestApi, machine: sfn.StateMachine, latency: cloudwatch.IMetric
    ) -> None:
        """Runs, jobs, API, endpoint, and what all of it costs."""
        minutes = Duration.minutes(5)
        ends = [
            machine.metric_succeeded(period=minutes),
            machine.metric_failed(period=minutes),
            machine.metric_timed_out(period=minutes),
        ]
        asked = self._endpoint_metric(config, "Invocations", "Sum")
        rows: list[list[cloudwatch.IWidget]] = [
            [self._graph("Runs", [*ends, machine.metric_aborted(period=minutes)]), self._durations(config)],
            [self._graph("Requests", [api.metric_count(period=minutes)]), self._graph("API latency p99 (ms)", [latency])],
            [
                self._graph("API errors", [api.metric_server_error(period=minutes), api.metric_client_error(period=minutes)]),
                self._graph("Endpoint errors", [self._endpoint_metric(config, "Invocation5XXErrors", "Sum")]),
            ],
            [
                self._graph("Endpoint's requests", [asked]),
                self._graph("Model latency p99 (µs)", [self._endpoint_metric(config, "ModelLatency", "p99")]),
            ],
            [self._hours(config), cloudwatch.TextWidget(markdown=cost_text(config), width=12, height=6)],
        ]
        cloudwatch.Dashboard(self, "Dashboard", dashboard_name=config.prefix, widgets=rows)

    def _hours(self, config: StageConfig) -> cloudwatch.IWidget:
        """What an idle endpoint costs in hours; a serverless one costs none, and shows how long it takes to start instead."""
        if config.endpoint.mode == "realtime":
            return self._graph("Hours without a request", [self._idle(config)])
        return self._graph("Cold starts (µs)", [self._endpoint_metric(config, "ModelSetupTime", "Maximum")])

    def _durations(self, config: StageConfig) -> cloudwatch.IWidget:
        """Seconds of each job, from the state machine's own log."""
        return cloudwatch.LogQueryWidget(
            title="Job durations (s)",
            log_group_names=[f"/aws/vendedlogs/states/{config.prefix}"],
            query_lines=[
                'filter type in ["TaskStateEntered", "TaskStateExited"]',
                "stats (max(event_timestamp) - min(event_timestamp)) / 1000 as seconds by details.name as state, execution_arn",
                "filter seconds >= 1",
                "sort seconds desc",
                "limit 50",
            ],
            width=12,
        )

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
        self,
        construct_id: str,
        name: str,
        metric: cloudwatch.IMetric,
        threshold: float,
        topic: sns.ITopic | None,
        text: str,
        *,
        periods: int = 1,
    ) -> None:
        """An alarm that rings at ``threshold`` in the metric's period; no data is good news."""
        alarm = cloudwatch.Alarm(
            self,
            construct_id,
            alarm_name=name,
            alarm_description=text,
            metric=metric,
            threshold=threshold,
            evaluation_periods=periods,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        if topic is not None:
            alarm.add_alarm_action(actions.SnsAction(topic))

    def _graph(self, title: str, metrics: list[cloudwatch.IMetric]) -> cloudwatch.GraphWidget:
        """One diagram."""
        return cloudwatch.GraphWidget(title=title, left=metrics, width=12)


def cost_text(config: StageConfig) -> str:
    """The dashboard's words on money: what is paid for while nothing runs, by the list prices of the report."""
    endpoint = config.endpoint
    where, usd_per_hour = code.prices()
    lines = [f"### What {config.prefix} costs", f"List prices of {where}, before discounts; docs/costs.md has more."]
    if endpoint.mode == "serverless":
        lines.append("* Endpoint: serverless, nothing while nobody asks.")
    else:
        hourly = usd_per_hour.get(endpoint.instance_type)
        many = f"{endpoint.min_instances} to {endpoint.max_instances} × {endpoint.instance_type}"
        known = "no list price here" if hourly is None else f"${endpoint.min_instances * hourly:.2f} an hour at least, asked or not"
        lines.append(f"* Endpoint: {many}: {known}.")
    for what, jobs in (("Trial", config.tuning_jobs), ("Training", config.training), ("Processing", config.processing)):
        hourly = usd_per_hour.get(jobs.instance_type)
        known = "no list price here" if hourly is None else f"${jobs.instance_count * hourly:.2f} an hour on demand"
        lines.append(f"* {what}: {jobs.instance_count} × {jobs.instance_type}: {known}.")
    lines.append(
        f"* What was really paid: Cost Explorer, tag `project` = `{config.prefix}`; each run's report has its own estimate."
    )
    return "\n".join(lines)


class Budget(Construct):
    """A mail when the stage's month becomes dearer than planned. Costs are found by the tag ``project``."""

    def __init__(self, scope: Construct, construct_id: str, *, config: StageConfig) -> None:
        super().__init__(scope, construct_id)
        subscriber = budgets.CfnBudget.SubscriberProperty(address=config.alarm_email, subscription_type="EMAIL")
        told = [
            budgets.CfnBudget.NotificationWithSubscribersProperty(
                notification=budgets.CfnBudget.NotificationProperty(
                    comparison_operator="GREATER_THAN", notification_type=kind, threshold=percent, threshold_type="PERCENTAGE"
                ),
                subscribers=[subscriber],
            )
            for kind, percent in (("ACTUAL", 80), ("FORECASTED", 100))
        ]
        budgets.CfnBudget(
            self,
            "Budget",
            budget=budgets.CfnBudget.BudgetDataProperty(
                budget_name=config.prefix,
                budget_type="COST",
                time_unit="MONTHLY",
                budget_limit=budgets.CfnBudget.SpendProperty(amount=config.monthly_budget_usd, unit="USD"),
                cost_filters={"TagKeyValue": [f"user:project${config.prefix}"]},
            ),
            notifications_with_subscribers=told,
        )


def clean_up(scope: Construct, construct_id: str, *, config: StageConfig, folder: Path) -> Function:
    """The Lambda that stops and removes what an execution made and nobody uses."""
    function = Function(
        scope,
        construct_id,
        config=config,
        code=folder,
        handler="clean_up.handle",
        description="Stops and removes what a run made, unless it serves",
        environment={"ENDPOINT_NAME": config.prefix},
        timeout_s=120,
    )
    configs, models = (sagemaker_arns(config.prefix, [kind]) for kind in ("endpoint-config", "model"))
    function.allow(["sagemaker:DescribeEndpoint"], [sagemaker_arn(f"endpoint/{config.prefix}")])
    function.allow(["sagemaker:DescribeEndpointConfig", "sagemaker:DeleteEndpointConfig"], configs)
    function.allow(["sagemaker:DeleteModel"], models)
    for kind, what in (
        ("hyper-parameter-tuning-job", "HyperParameterTuningJob"),
        ("training-job", "TrainingJob"),
        ("processing-job", "ProcessingJob"),
    ):
        function.allow([f"sagemaker:Stop{what}"], sagemaker_arns(config.prefix, [kind]))
    # IAM knows no resource for lists.
    lists = ("HyperParameterTuningJobs", "TrainingJobs", "ProcessingJobs", "EndpointConfigs", "Models")
    function.allow([f"sagemaker:List{what}" for what in lists], ["*"])
    return function


def dry_run(
    scope: Construct, construct_id: str, *, config: StageConfig, folder: Path, images: list[str], built_image: str
) -> Function:
    """The Lambda that asks for quotas, data and images before anything is started. ``images``: addresses of all containers."""
    function = Function(
        scope,
        construct_id,
        config=config,
        code=folder,
        handler="dry_run.handle",
        description="Checks quotas, data access and images; starts nothing",
        environment={
            "MACHINES": json.dumps(quotas(config)),
            "IMAGES": Stack.of(scope).to_json_string(images),
            "BUILT_IMAGE": built_image,
            "ALLOWED_HOSTS": ",".join(config.allowed_hosts),
        },
        timeout_s=60,
    )
    function.allow(["servicequotas:ListServiceQuotas"], ["*"])
    return function


def quotas(config: StageConfig) -> list[dict[str, object]]:
    """SageMaker's quotas that an execution needs, by their names in Service Quotas, with the number of machines at once."""
    found: list[dict[str, object]] = []
    processing = max(config.prepare_instances, config.batch_instances)
    found.append({"quota": f"{config.processing.instance_type} for processing job usage", "count": processing})
    for jobs, per_trial in ((config.tuning_jobs, True), (config.training, False)):
        kind = "spot training job" if jobs.spot else "training job"
        found.append({"quota": f"{jobs.instance_type} for {kind} usage", "count": jobs.instance_count, "per_trial": per_trial})
    endpoint = config.endpoint
    if endpoint.mode == "realtime":
        # A blue/green update runs the new machines beside the old ones.
        fleets = 1 if endpoint.update == "rolling" else 2
        found.append({"quota": f"{endpoint.instance_type} for endpoint usage", "count": fleets * endpoint.max_instances})
    return found


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
    """On ``cdk destroy``: running executions stop, and the endpoint with its log, configurations, models and packages go.

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
                "sagemaker:ListEndpointConfigs",
                "sagemaker:ListModels",
                # Its resource is optional: without one in the request IAM asks for any.
                *(["sagemaker:ListModelPackages"] if config.destroys_data else []),
            ],
            ["*"],
        )
        if config.destroys_data:
            function.allow(["sagemaker:DeleteModelPackage"], [sagemaker_arn(f"model-package/{prefix}/*")])
            group = f"arn:{Aws.PARTITION}:logs:{Aws.REGION}:{Aws.ACCOUNT_ID}:log-group:/aws/sagemaker/Endpoints/{prefix}"
            # AWS's pages write it both ways: the service's guide with the colon, the authorization reference without.
            function.allow(["logs:DeleteLogGroup"], [group, f"{group}:*"])
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
                "DeleteData": "true" if config.destroys_data else "false",
            },
        )
        # On deletion the policy must still be there when the function runs.
        self.resource.node.add_dependency(function.role)
        self.resource.node.add_dependency(machine)
