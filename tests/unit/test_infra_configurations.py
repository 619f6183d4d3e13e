"""What companies ask for: the template and the requests of each configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra.config import ConfigError, StageConfig
from infra.operations import quotas
from infra.verify.check import bucket_of
from infra.verify.configurations import CONFIGURATIONS, config_of
from infra.verify.deployment import Deployment, listed
from infra.verify.walk import Account, Walk

Json = dict[str, Any]
JOBS = ("PrepareData", "CacheFeatures", "Evaluate", "Report", "ReportFailure", "ClassifyBatch")


class Stage:
    """A configuration's template, resolved, and the requests of its executions."""

    def __init__(self, name: str, template: Json) -> None:
        self.config = config_of(CONFIGURATIONS[name])
        self.template = template
        self.deployment = Deployment(template)

    def requests(self, given: Any | None = None) -> Json:
        """State -> request of an execution that ends well."""
        bucket = bucket_of(self.deployment.machine)
        walk = Walk(self.deployment.machine, Account(bucket=bucket, prefix=self.config.prefix))
        last, _ = walk.run(given or {})
        assert last in ("Done", "BatchDone")
        return walk.requests

    def of_type(self, kind: str) -> list[Json]:
        return list(self.deployment.of_type(kind).values())


@pytest.fixture
def stage(templates: dict[str, Json], request: pytest.FixtureRequest) -> Stage:
    return Stage(request.param, templates[request.param])


def using(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", [name], indirect=True)


def configured(stage: str = "dev", **override: Any) -> StageConfig:
    return config_of({"stage": stage, "override": json.dumps(override)})


# --- network ---------------------------------------------------------------------------------------------------------------


@using("existing-vpc")
def test_jobs_and_endpoint_live_in_the_companys_vpc(stage: Stage):
    place = {
        "Subnets": ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"],
        "SecurityGroupIds": ["sg-0123456789abcdef0"],
    }
    requests = stage.requests({"recipe": "head"})
    for name in ("PrepareData", "CacheFeatures", "Evaluate", "Report"):
        assert requests[name]["NetworkConfig"] == {"VpcConfig": place}
    assert requests["Train"]["VpcConfig"] == place
    assert requests["Tune"]["TrainingJobDefinition"]["VpcConfig"] == place
    assert requests["CreateModel"]["VpcConfig"] == place
    assert stage.of_type("AWS::EC2::VPC") == []


@using("isolated")
def test_a_vpc_of_the_stacks_own_has_no_way_out(stage: Stage):
    assert len(stage.of_type("AWS::EC2::VPC")) == 1
    assert len(stage.of_type("AWS::EC2::Subnet")) == 2
    for kind in ("AWS::EC2::NatGateway", "AWS::EC2::InternetGateway", "AWS::EC2::EIP"):
        assert stage.of_type(kind) == []
    assert not any(subnet.get("MapPublicIpOnLaunch") for subnet in stage.of_type("AWS::EC2::Subnet"))
    services = {str(one["ServiceName"]).rsplit(".", 1)[-1] for one in stage.of_type("AWS::EC2::VPCEndpoint")}
    assert services == {"s3", "api", "dkr", "logs", "monitoring", "kms", "sts"}
    assert len(stage.of_type("AWS::EC2::FlowLog")) == 1


@using("isolated")
def test_what_runs_a_model_has_no_network_and_gets_everything_by_channel(stage: Stage):
    requests = stage.requests({"recipe": "head"})
    trial, training = requests["Tune"]["TrainingJobDefinition"], requests["Train"]
    for request, values in ((trial, trial["StaticHyperParameters"]), (training, training["HyperParameters"])):
        assert request["EnableNetworkIsolation"] is True
        channels = {one["ChannelName"]: one["DataSource"]["S3DataSource"]["S3Uri"] for one in request["InputDataConfig"]}
        assert set(channels) == {"dataset", "features", "pretrained", "wheels", "code"}
        assert channels["wheels"].endswith("/wheels/")
        archive = channels["code"].rsplit("/", 1)[-1]
        assert values["sagemaker_submit_directory"] == f"/opt/ml/input/data/code/{archive}"
        assert values["pretrained"] == "channel"
        assert request["Environment"]["PIP_NO_INDEX"] == "1"
        assert request["Environment"]["PIP_FIND_LINKS"] == "/opt/ml/input/data/wheels"
        assert "RUN_OUTPUT_URI" not in request["Environment"], "an upload would hang without a network"
    assert requests["CacheFeatures"]["NetworkConfig"]["EnableNetworkIsolation"] is True
    assert requests["CreateModel"]["EnableNetworkIsolation"] is True
    batch = stage.requests({"action": "batch", "input": "incoming/new/"})["ClassifyBatch"]
    assert batch["NetworkConfig"]["EnableNetworkIsolation"] is True
    # These ask S3 and SageMaker themselves.
    for name in ("PrepareData", "Evaluate", "Report"):
        assert "EnableNetworkIsolation" not in requests[name]["NetworkConfig"]
        inputs = {one["InputName"]: one["S3Input"] for one in requests[name]["ProcessingInputs"]}
        assert inputs["wheels"]["LocalPath"] == requests[name]["Environment"]["PIP_FIND_LINKS"]


@using("isolated")
def test_without_a_network_no_weights_are_downloaded_by_name(stage: Stage):
    machine = stage.deployment.machine
    walk = Walk(machine, Account(bucket=bucket_of(machine), prefix=stage.config.prefix))
    last, output = walk.run({"pretrained": "torchvision"})
    assert last == "InvalidInput"
    assert "pretrained is torchvision; expected none or a key in the data bucket" in output["Cause"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"network": {"vpc": "existing"}}, "expected subnet_ids and security_group_ids"),
        ({"network": {"subnet_ids": ["subnet-01234567"], "security_group_ids": ["sg-01234567"]}}, "expected vpc existing"),
        ({"network": {"isolation": True}}, "expected a prefix such as wheels/"),
        ({"network": {"vpc": "create"}}, "expected a prefix such as wheels/"),
        ({"network": {"isolation": True, "wheels": "wheels/"}}, "expected a key such as pretrained/resnet50.pth"),
        (
            {"network": {"vpc": "create", "wheels": "wheels/"}, "input": {"source": "incoming/x/"}},
            "allowed_hosts is",
        ),
        (
            {"network": {"vpc": "create", "wheels": "wheels/"}, "allowed_hosts": [], "input": {"source": "incoming/x/"}},
            "endpoint.mode is serverless",
        ),
        ({"network": {"wheels": "/wheels"}}, "network.wheels is '/wheels'"),
        ({"kms_key": "alias/x"}, "kms_key"),
        ({"source_keys": ["arn:aws:kms:us-east-1:444455556666:key/0123"]}, "source_keys are given without source_buckets"),
        ({"tags": {"project": "x"}}, "tags names project"),
        ({"tags": {"aws:x": "x"}}, "tags names aws:x"),
        ({"permissions_boundary": "boundary"}, "permissions_boundary is 'boundary'"),
        ({"data_bucket": "No Bucket"}, "data_bucket"),
        ({"triggers": {"schedule": "every day"}}, "triggers.schedule is 'every day'"),
        ({"monthly_budget_usd": 10}, "expected an address to tell"),
        ({"serving_image_uri": "nginx:latest"}, "serving_image_uri is 'nginx:latest'"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_a_remedy(override: Json, said: str):
    with pytest.raises(ConfigError) as refused:
        configured(**override)
    assert said in str(refused.value)


# --- keys ------------------------------------------------------------------------------------------------------------------


@using("own-key")
def test_everything_that_is_stored_is_encrypted_with_the_stages_key(stage: Stage):
    keys = {name: stage.deployment.arn(name) for name in stage.deployment.of_type("AWS::KMS::Key")}
    own = next(arn for name, arn in keys.items() if name.startswith("StorageKey"))
    for group in stage.of_type("AWS::Logs::LogGroup"):
        assert group["KmsKeyId"] == own
    for function in stage.of_type("AWS::Lambda::Function"):
        assert function["KmsKeyArn"] == own
    (secret,) = stage.of_type("AWS::SecretsManager::Secret")
    assert secret["KmsKeyId"] == own
    (repository,) = stage.of_type("AWS::ECR::Repository")
    assert repository["EncryptionConfiguration"] == {"EncryptionType": "KMS", "KmsKey": own}
    (machine,) = stage.of_type("AWS::StepFunctions::StateMachine")
    assert machine["EncryptionConfiguration"]["KmsKeyId"] == own
    encrypted = [one["BucketEncryption"]["ServerSideEncryptionConfiguration"][0] for one in stage.of_type("AWS::S3::Bucket")]
    used = [rule["ServerSideEncryptionByDefault"].get("KMSMasterKeyID") for rule in encrypted]
    assert sorted(used, key=str) == [None, own], "S3 takes no customer key for access logs"
    assert all("KmsMasterKeyId" in topic for topic in stage.of_type("AWS::SNS::Topic"))


@using("own-key")
def test_jobs_get_the_key_for_what_they_write_and_for_their_volumes(stage: Stage):
    requests = stage.requests()
    key = requests["PrepareData"]["ProcessingOutputConfig"]["KmsKeyId"]
    assert ":key/StorageKey" in key
    assert requests["PrepareData"]["ProcessingResources"]["ClusterConfig"]["VolumeKmsKeyId"] == key
    assert requests["Train"]["OutputDataConfig"]["KmsKeyId"] == key
    assert requests["Train"]["ResourceConfig"]["VolumeKmsKeyId"] == key
    assert requests["CreateEndpointConfig"]["KmsKeyId"] == key
    trial = requests["Tune"]["TrainingJobDefinition"]
    assert trial["OutputDataConfig"]["KmsKeyId"] == key
    # ml.g5 keeps the data on disks of its own, for which SageMaker takes no key.
    assert "VolumeKmsKeyId" not in trial["ResourceConfig"]


@using("existing-key")
def test_an_existing_key_is_used_and_not_managed(stage: Stage):
    assert not any(name.startswith("StorageKey") for name in stage.deployment.of_type("AWS::KMS::Key"))
    requests = stage.requests()
    assert requests["Train"]["ResourceConfig"]["VolumeKmsKeyId"] == stage.config.kms_key
    # Serverless endpoints have no volume.
    assert "KmsKeyId" not in requests["CreateEndpointConfig"]


# --- boundary, tags, buckets -----------------------------------------------------------------------------------------------


@using("boundary-and-tags")
def test_every_role_has_the_boundary_and_everything_the_tags(stage: Stage):
    roles = stage.of_type("AWS::IAM::Role")
    assert len(roles) > 10
    assert all(role["PermissionsBoundary"] == stage.config.permissions_boundary for role in roles)
    for kind in ("AWS::S3::Bucket", "AWS::Lambda::Function", "AWS::StepFunctions::StateMachine", "AWS::ECR::Repository"):
        for item in stage.of_type(kind):
            if str(item.get("Runtime", "python")).startswith("nodejs"):
                continue  # CDK's own helper, which takes none
            found = {tag["Key"]: tag["Value"] for tag in item["Tags"]}
            assert {"cost-center": "4711", "owner": "vision", "project": "dogs-dev"}.items() <= found.items()
    requests = stage.requests()
    for name in ("PrepareData", "Train", "Tune", "CreateModel", "CreateEndpointConfig"):
        assert {"Key": "cost-center", "Value": "4711"} in requests[name]["Tags"]
        assert {"Key": "run", "Value": "run-1"} in requests[name]["Tags"]
    assert {"Key": "owner", "Value": "vision"} in requests["CreateEndpoint"]["Tags"]


@using("existing-bucket")
def test_an_existing_bucket_is_used_and_left_alone(stage: Stage):
    assert stage.of_type("AWS::S3::Bucket") == []
    assert stage.of_type("Custom::S3AutoDeleteObjects") == []
    requests = stage.requests()
    assert requests["Train"]["OutputDataConfig"]["S3OutputPath"] == "s3://company-pictures/runs/run-1/training"
    assert stage.template["Outputs"]["DataBucket"]["Value"] == "company-pictures"


@using("foreign-data")
def test_another_accounts_bucket_is_read_and_never_written(stage: Stage):
    requests = stage.requests()
    words = requests["PrepareData"]["AppSpecification"]["ContainerArguments"]
    assert words[words.index("--source") + 1] == "s3://their-pictures/dogs/"
    foreign = [
        (role, action)
        for role, statements in stage.deployment.policies.items()
        for one in statements
        for action in one.actions
        if any("their-pictures" in resource for resource in one.resources)
    ]
    assert {action for _, action in foreign} == {"s3:GetObject", "s3:ListBucket"}
    decrypting = {
        role
        for role, statements in stage.deployment.policies.items()
        for one in statements
        if any("444455556666" in resource for resource in one.resources)
    }
    assert {role.split("Role")[0] for role in decrypting} == {"JobsPrepare", "JobsBatch"}


# --- size, quiet, triggers -------------------------------------------------------------------------------------------------


@using("big")
def test_several_machines_with_gpus(stage: Stage):
    requests = stage.requests()
    assert requests["Train"]["ResourceConfig"]["InstanceType"] == "ml.g5.12xlarge"
    assert requests["Train"]["ResourceConfig"]["InstanceCount"] == 2
    assert requests["Train"]["EnableManagedSpotTraining"] is False
    assert "-cu133-" in requests["Train"]["AlgorithmSpecification"]["TrainingImage"]
    assert requests["PrepareData"]["ProcessingResources"]["ClusterConfig"]["InstanceCount"] == 4
    batch = stage.requests({"action": "batch", "input": "incoming/new/"})["ClassifyBatch"]
    assert batch["ProcessingResources"]["ClusterConfig"]["InstanceCount"] == 3


@using("quiet")
def test_traces_logs_and_retention_follow_the_configuration(stage: Stage):
    (machine,) = stage.of_type("AWS::StepFunctions::StateMachine")
    assert machine.get("TracingConfiguration", {}).get("Enabled", False) is False
    assert all(not one.get("TracingEnabled") for one in stage.of_type("AWS::ApiGateway::Stage"))
    assert {group["RetentionInDays"] for group in stage.of_type("AWS::Logs::LogGroup")} == {1}
    assert stage.requests()["Train"]["Environment"]["LOG_LEVEL"] == "ERROR"
    levels = {
        function["Environment"]["Variables"]["LOG_LEVEL"]
        for function in stage.of_type("AWS::Lambda::Function")
        if "LOG_LEVEL" in function.get("Environment", {}).get("Variables", {})
    }
    assert levels == {"ERROR"}
    assert "xray:" not in json.dumps(stage.template)


@using("triggered")
def test_a_schedule_and_new_data_start_executions(stage: Stage):
    (schedule,) = stage.of_type("AWS::Scheduler::Schedule")
    assert schedule["ScheduleExpression"] == "cron(0 3 ? * MON *)"
    assert schedule["Target"]["Input"] == "{}"
    (machine,) = (stage.deployment.arn(name) for name in stage.deployment.of_type("AWS::StepFunctions::StateMachine"))
    assert schedule["Target"]["Arn"] == machine
    (rule,) = stage.of_type("AWS::Events::Rule")
    assert rule["EventPattern"]["detail"]["object"] == {"key": [{"prefix": "incoming/"}]}
    data = stage.deployment.resources[next(n for n in stage.deployment.of_type("AWS::S3::Bucket") if n.startswith("StorageData"))]
    assert data["NotificationConfiguration"] == {"EventBridgeConfiguration": {"EventBridgeEnabled": True}}
    (group,) = stage.of_type("AWS::Scheduler::ScheduleGroup")
    assert group["Name"] == "dogs-dev"


@using("triggered")
def test_a_budget_tells_by_mail(stage: Stage):
    (budget,) = stage.of_type("AWS::Budgets::Budget")
    assert budget["Budget"]["BudgetLimit"] == {"Amount": 100, "Unit": "USD"}
    assert budget["Budget"]["CostFilters"] == {"TagKeyValue": ["user:project$dogs-dev"]}
    told = {one["Notification"]["NotificationType"]: one for one in budget["NotificationsWithSubscribers"]}
    assert set(told) == {"ACTUAL", "FORECASTED"}
    assert all(one["Subscribers"][0]["Address"] == "team@example.com" for one in told.values())


@pytest.mark.parametrize("name", ["dev", "prod", "local"])
def test_nothing_starts_by_itself_unless_it_is_asked_for(templates: dict[str, Json], name: str):
    text = json.dumps(templates[name])
    for kind in ("AWS::Scheduler::Schedule", "AWS::Scheduler::ScheduleGroup", "AWS::Budgets::Budget", "AWS::EC2::VPC"):
        assert kind not in text
    assert "EventBridgeEnabled" not in text


def test_two_stacks_side_by_side_share_no_name(templates: dict[str, Json]):
    """Whatever has a name of its own has another in the other stack, and no role reaches over."""
    here, there = Deployment(templates["dev"]), Deployment(templates["beside"])
    fields = (
        *(
            "StateMachineName",
            "RepositoryName",
            "ModelPackageGroupName",
            "AlarmName",
            "DashboardName",
            "LogGroupName",
            "BucketName",
        ),
    )

    def names(deployment: Deployment) -> set[str]:
        return {
            str(properties[field])
            for logical_id, properties in deployment.resources.items()
            for field in fields
            if isinstance(deployment.template["Resources"][logical_id].get("Properties", {}).get(field), str)
        }

    assert len(names(here)) > 5
    assert not names(here) & names(there)
    for deployment, other in ((here, "cats-dev"), (there, "dogs-dev")):
        reach = [
            resource
            for role, statements in deployment.policies.items()
            for one in statements
            for resource in one.resources
            if other in resource
        ]
        assert reach == []


# --- dashboard and quotas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_dashboard_shows_runs_jobs_api_endpoint_and_money(templates: dict[str, Json], name: str):
    (dashboard,) = Deployment(templates[name]).of_type("AWS::CloudWatch::Dashboard").values()
    body = json.loads(dashboard["DashboardBody"])
    titles = {str(one["properties"].get("title")) for one in body["widgets"]}
    assert {"Runs", "Job durations (s)", "API latency p99 (ms)", "API errors", "Endpoint's requests"} <= titles
    assert ("Hours without a request" in titles) == (name == "prod")
    (words,) = [one["properties"]["markdown"] for one in body["widgets"] if one["type"] == "text"]
    assert ("nothing while nobody asks" in words) == (name == "dev")
    assert "$0.20 an hour at least" in words or name == "dev"
    assert f"`dogs-{name}`" in words


def test_alarms_go_to_the_topic(templates: dict[str, Json]):
    alarms = {one["AlarmName"]: one for one in Deployment(templates["prod"]).of_type("AWS::CloudWatch::Alarm").values()}
    assert {name.removeprefix("dogs-prod-") for name in alarms} == {
        *("api-errors", "api-latency", "run-failed", "run-timed-out", "endpoint-errors", "endpoint-idle"),
        *("rollback-errors", "rollback-latency", "rollback-invalid"),
    }
    for name, alarm in alarms.items():
        assert bool(listed(alarm.get("AlarmActions", []))) == ("-rollback-" not in name)
    assert alarms["dogs-prod-endpoint-idle"]["EvaluationPeriods"] == 24


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            configured(),
            {("ml.m5.xlarge for processing job usage", 1), ("ml.m5.xlarge for training job usage", 1)},
        ),
        (
            configured("prod"),
            {
                ("ml.m5.2xlarge for processing job usage", 1),
                ("ml.g5.xlarge for spot training job usage", 1),
                ("ml.c6i.large for endpoint usage", 12),
            },
        ),
        (
            configured("prod", prepare_instances=4, endpoint={"update": "rolling"}, training={"instance_count": 2, "spot": False}),
            {
                ("ml.m5.2xlarge for processing job usage", 4),
                ("ml.g5.xlarge for spot training job usage", 1),
                ("ml.g5.xlarge for training job usage", 2),
                ("ml.c6i.large for endpoint usage", 6),
            },
        ),
    ],
)
def test_the_quotas_that_an_execution_needs(config: StageConfig, expected: set[tuple[str, int]]):
    assert {(str(one["quota"]), one["count"]) for one in quotas(config)} == expected
