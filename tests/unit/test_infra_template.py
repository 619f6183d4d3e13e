"""The templates of all stages: promises about encryption, access and names, cfn-lint, and cdk-nag (which runs at synthesis)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cfnlint import ManualArgs
from cfnlint import lint as cfn_lint

from infra import code, images
from infra.roles import ROLES
from infra.verify.configurations import OWN_IMAGE

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("dev", "prod", "local")
# CDK names dependencies that references already imply: harmless, and not ours to change.
IGNORED = ["W3005"]


def of_type(template: dict[str, Any], kind: str) -> dict[str, Any]:
    """Logical id -> resource."""
    return {name: item for name, item in template["Resources"].items() if item["Type"] == kind}


def statements(template: dict[str, Any]) -> list[dict[str, Any]]:
    """All Allow statements of all roles' policies."""
    policies = [*of_type(template, "AWS::IAM::Policy").values(), *of_type(template, "AWS::IAM::ManagedPolicy").values()]
    return [entry for policy in policies for entry in policy["Properties"]["PolicyDocument"]["Statement"]]


def listed(value: Any) -> list[Any]:
    """CloudFormation writes one-element lists as the element."""
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("stage", STAGES)
def test_outputs(templates: dict[str, Any], stage: str):
    assert set(templates[stage]["Outputs"]) == {"ApiUrl", "StateMachineArn", "DataBucket", "TokenSecretArn"}


@pytest.mark.parametrize("stage", STAGES)
def test_buckets_are_private_encrypted_versioned_and_logged(templates: dict[str, Any], stage: str):
    buckets = of_type(templates[stage], "AWS::S3::Bucket")
    assert len(buckets) == 2
    for bucket in buckets.values():
        properties = bucket["Properties"]
        assert properties["BucketEncryption"]
        assert all(properties["PublicAccessBlockConfiguration"].values())
        assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
        rules = properties["LifecycleConfiguration"]["Rules"]
        assert any("AbortIncompleteMultipartUpload" in rule for rule in rules)
        assert bucket["DeletionPolicy"] == ("Retain" if stage == "prod" else "Delete")
    assert sum("LoggingConfiguration" in bucket["Properties"] for bucket in buckets.values()) == 1
    for policy in of_type(templates[stage], "AWS::S3::BucketPolicy").values():
        denied = [entry for entry in policy["Properties"]["PolicyDocument"]["Statement"] if entry["Effect"] == "Deny"]
        assert any(entry["Condition"] == {"Bool": {"aws:SecureTransport": "false"}} for entry in denied)


@pytest.mark.parametrize("stage", STAGES)
def test_each_kind_of_job_has_a_role_that_only_its_service_takes(templates: dict[str, Any], stage: str):
    roles = of_type(templates[stage], "AWS::IAM::Role")
    services = {"sagemaker.amazonaws.com": len(ROLES) + 1, "states.amazonaws.com": 1, "codebuild.amazonaws.com": 1}
    for service, count in services.items():
        trusting = [role for role in roles.values() if service in json.dumps(role["Properties"]["AssumeRolePolicyDocument"])]
        assert len(trusting) == count
        for role in trusting:
            entries = role["Properties"]["AssumeRolePolicyDocument"]["Statement"]
            assert len(entries) == 1
            assert entries[0]["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}


@pytest.mark.parametrize("stage", STAGES)
def test_roles_are_passed_to_sagemaker_only(templates: dict[str, Any], stage: str):
    passing = [entry for entry in statements(templates[stage]) if "iam:PassRole" in listed(entry["Action"])]
    assert len(passing) == 1
    assert passing[0]["Condition"] == {"StringEquals": {"iam:PassedToService": "sagemaker.amazonaws.com"}}
    assert len(passing[0]["Resource"]) == len(ROLES) + 1
    assert all("Fn::GetAtt" in resource for resource in passing[0]["Resource"])


@pytest.mark.parametrize("stage", STAGES)
def test_no_role_may_do_everything_anywhere(templates: dict[str, Any], stage: str):
    harmless = ("logs:", "xray:", "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "sagemaker:List", "servicequotas:List")
    for entry in statements(templates[stage]):
        actions = listed(entry["Action"])
        assert "*" not in actions
        assert not any(action.endswith(":*") for action in actions)
        if "*" in listed(entry["Resource"]):
            assert all(action.startswith(harmless) for action in actions), actions


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_machine_may_read_its_own_searchs_trials_only(templates: dict[str, Any], stage: str):
    action = "sagemaker:ListTrainingJobsForHyperParameterTuningJob"
    policies = of_type(templates[stage], "AWS::IAM::Policy").values()
    (own,) = [item for item in policies if "StateMachineRole" in json.dumps(item["Properties"]["Roles"])]
    (entry,) = [one for one in own["Properties"]["PolicyDocument"]["Statement"] if action in listed(one["Action"])]
    assert set(listed(entry["Action"])) <= {
        action,
        *(f"sagemaker:{verb}HyperParameterTuningJob" for verb in ("Create", "Describe", "Stop")),
    }
    (resource,) = listed(entry["Resource"])
    assert json.dumps(resource).rstrip('"]}').endswith(f":hyper-parameter-tuning-job/dogs-{stage}-*")


@pytest.mark.parametrize("stage", STAGES)
def test_cfn_lint_is_content(templates: dict[str, Any], stage: str):
    found = cfn_lint(json.dumps(templates[stage]), config=ManualArgs(regions=["us-east-1"], ignore_checks=IGNORED))
    assert [f"{match.rule.id} {match.message}" for match in found] == []


def test_cfn_lint_sees_the_state_machine(templates: dict[str, Any]):
    """A join would hide the definition from it; a seeded fault shows that it looks inside."""
    text = json.dumps(templates["dev"]).replace('\\"StartAt\\": \\"ReadInput\\"', '\\"StartAt\\": \\"Nowhere\\"')
    found = cfn_lint(text, config=ManualArgs(regions=["us-east-1"], ignore_checks=IGNORED))
    assert "E3601" in {match.rule.id for match in found}


@pytest.mark.parametrize("stage", STAGES)
def test_every_place_in_the_definition_is_filled(templates: dict[str, Any], stage: str):
    (machine,) = of_type(templates[stage], "AWS::StepFunctions::StateMachine").values()
    text = machine["Properties"]["DefinitionString"]
    assert isinstance(text, str)
    places = {part.partition("}")[0] for part in text.split("${")[1:]}
    assert places <= set(machine["Properties"]["DefinitionSubstitutions"])
    assert machine["Properties"]["TracingConfiguration"] == {"Enabled": True}
    assert machine["Properties"]["LoggingConfiguration"]["Level"] == "ALL"


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_are_binary_and_only_the_page_is_open(templates: dict[str, Any], stage: str):
    (api,) = of_type(templates[stage], "AWS::ApiGateway::RestApi").values()
    assert {"image/*", "image/jpeg", "image/png", "application/x-image"} <= set(api["Properties"]["BinaryMediaTypes"])
    methods = [item["Properties"] for item in of_type(templates[stage], "AWS::ApiGateway::Method").values()]
    assert sorted(method["HttpMethod"] for method in methods if method["AuthorizationType"] == "CUSTOM") == [
        "GET",
        "POST",
        "POST",
        "POST",
    ]
    assert all(method["HttpMethod"] == "GET" for method in methods if method["AuthorizationType"] == "NONE")
    responses = of_type(templates[stage], "AWS::ApiGateway::GatewayResponse").values()
    kinds = {item["Properties"]["ResponseType"] for item in responses}
    assert {"UNAUTHORIZED", "ACCESS_DENIED", "REQUEST_TOO_LARGE", "THROTTLED", "DEFAULT_4XX", "DEFAULT_5XX"} <= kinds


def test_the_address_of_the_api_is_a_field(templates: dict[str, Any]):
    places = templates["local"]["Outputs"]["ApiUrl"]["Value"]["Fn::Sub"]
    assert places[0] == "http://localhost:4566/restapis/${api}/${stage}/_user_request_"
    assert set(places[1]) == {"api", "stage"}


def test_iam_instead_of_a_token(templates: dict[str, Any]):
    template = templates["variant"]
    assert of_type(template, "AWS::ApiGateway::Authorizer") == {}
    assert of_type(template, "AWS::SecretsManager::Secret") == {}
    kinds = {item["Properties"]["AuthorizationType"] for item in of_type(template, "AWS::ApiGateway::Method").values()}
    assert kinds == {"NONE", "AWS_IAM"}


def test_the_smoke_test_may_sign_its_calls_where_the_api_wants_a_signature(templates: dict[str, Any]):
    def invoking(name: str) -> list[dict[str, Any]]:
        return [entry for entry in statements(templates[name]) if "execute-api:Invoke" in listed(entry["Action"])]

    assert len(invoking("variant")) == 1
    assert "/POST/predict" in json.dumps(invoking("variant")[0]["Resource"])
    assert invoking("dev") == []
    responses = of_type(templates["variant"], "AWS::ApiGateway::GatewayResponse").values()
    (unsigned,) = [item["Properties"] for item in responses if item["Properties"]["ResponseType"] == "MISSING_AUTHENTICATION_TOKEN"]
    assert unsigned["StatusCode"] == "403"


@pytest.mark.parametrize("stage", STAGES)
def test_folders_may_be_listed_with_and_without_the_slash(templates: dict[str, Any], stage: str):
    """SageMaker looks for checkpoints under ``runs/<run>/checkpoints`` before a job starts."""
    listings = [entry for entry in statements(templates[stage]) if listed(entry["Action"]) == ["s3:ListBucket"]]
    prefixes = {prefix for entry in listings for prefix in listed(entry["Condition"]["StringLike"]["s3:prefix"])}
    assert {"datasets*", "runs/*/checkpoints*", "runs/*/features*", "models*"} <= prefixes
    assert "*" not in prefixes


@pytest.mark.parametrize("stage", STAGES)
def test_alarms_may_use_the_topics_key(templates: dict[str, Any], stage: str):
    (key,) = of_type(templates[stage], "AWS::KMS::Key").values()
    entries = key["Properties"]["KeyPolicy"]["Statement"]
    (alarms,) = [entry for entry in entries if entry["Principal"] == {"Service": "cloudwatch.amazonaws.com"}]
    assert "Condition" not in alarms
    (policy,) = of_type(templates[stage], "AWS::SNS::TopicPolicy").values()
    entries = policy["Properties"]["PolicyDocument"]["Statement"]
    (alarms,) = [entry for entry in entries if entry["Principal"] == {"Service": "cloudwatch.amazonaws.com"}]
    assert alarms["Condition"] == {"StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}}


@pytest.mark.parametrize(("stage", "limit", "on_demand"), [("dev", "4000000", "true"), ("prod", "4718592", "false")])
def test_the_api_knows_the_limits_of_its_endpoint(templates: dict[str, Any], stage: str, limit: str, on_demand: str):
    functions = of_type(templates[stage], "AWS::Lambda::Function").values()
    (values,) = [
        item["Properties"]["Environment"]["Variables"]
        for item in functions
        if "MAX_BYTES" in item["Properties"].get("Environment", {}).get("Variables", {})
    ]
    assert (values["MAX_BYTES"], values["ON_DEMAND"]) == (limit, on_demand)


def test_a_given_serving_image_is_used(templates: dict[str, Any]):
    (machine,) = of_type(templates["variant"], "AWS::StepFunctions::StateMachine").values()
    assert machine["Properties"]["DefinitionSubstitutions"]["ServerImage"] == OWN_IMAGE
    assert "BuildServer" not in json.loads(machine["Properties"]["DefinitionString"])["States"]


def test_bad_configuration_is_one_line_without_a_trace():
    values = json.loads((ROOT / "cdk.json").read_text())["context"] | {"override": '{"colour": 1}'}
    environment = os.environ | {"CDK_CONTEXT_JSON": json.dumps(values)}
    done = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "cdk.json stage dev: colour is unknown; expected one of" in done.stderr
    assert "Traceback" not in done.stderr


# --- code and images -------------------------------------------------------------------------------------------------------


def test_the_code_archive_is_the_same_bytes_every_time():
    files = code.files_below(code.MODEL_CODE)
    assert code.pack(files, code.MODEL_CODE) == code.pack(files, code.MODEL_CODE)
    names = [path.relative_to(code.MODEL_CODE).as_posix() for path in files]
    assert {"prepare.py", "hpo.py", "train_model.py", "evaluate.py", "report.py", "requirements.txt"} <= set(names)
    assert not any("__pycache__" in name or "cache/" in name for name in names)


def test_the_image_table_is_that_of_the_sagemaker_sdk():
    """The SDK's own table, read as a file: importing the SDK takes seconds and warns about its own syntax."""
    spec = importlib.util.find_spec("sagemaker")
    assert spec is not None
    assert spec.submodule_search_locations
    table = Path(spec.submodule_search_locations[0]) / "core" / "image_uri_config" / "pytorch-amzn2023.json"
    known = json.loads(table.read_text())["training"]["versions"]["2.13"]
    assert known["repository"] == images.REPOSITORY
    assert f"{known['tag_prefix']}-{known['container_version']['cpu']}" == images.CPU_TAG
    assert f"{known['tag_prefix']}-{known['container_version']['gpu']}" == images.GPU_TAG
    assert images.ACCOUNTS.items() <= known["registries"].items()


def test_the_table_of_rule_images_is_that_of_the_sagemaker_sdk():
    spec = importlib.util.find_spec("sagemaker")
    assert spec is not None
    assert spec.submodule_search_locations
    table = Path(spec.submodule_search_locations[0]) / "core" / "image_uri_config" / "debugger.json"
    known = json.loads(table.read_text())["versions"][images.DEBUGGER_TAG]
    assert known["repository"] == images.DEBUGGER_REPOSITORY
    assert known["registries"] == images.DEBUGGER_ACCOUNTS


# --- the managed debugger and the report's rights --------------------------------------------------------------------------


def policy_of(template: dict[str, Any], role: str) -> list[dict[str, Any]]:
    """The Allow statements of one of the jobs' roles."""
    policies = of_type(template, "AWS::IAM::Policy").values()
    (own,) = [item for item in policies if role in json.dumps(item["Properties"]["Roles"])]
    return list(own["Properties"]["PolicyDocument"]["Statement"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_report_may_describe_its_stages_jobs_and_nothing_more(templates: dict[str, Any], stage: str):
    granted = {
        (action, json.dumps(resource).rstrip('"]}').rsplit(":", 1)[-1])
        for entry in policy_of(templates[stage], "ReportRole")
        for action in listed(entry["Action"])
        for resource in listed(entry["Resource"])
        if action.startswith("sagemaker:")
    }
    assert granted == {
        ("sagemaker:DescribeTrainingJob", f"training-job/dogs-{stage}-*"),
        ("sagemaker:DescribeProcessingJob", f"processing-job/dogs-{stage}-*"),
        ("sagemaker:DescribeHyperParameterTuningJob", f"hyper-parameter-tuning-job/dogs-{stage}-*"),
        ("sagemaker:ListTrainingJobsForHyperParameterTuningJob", f"hyper-parameter-tuning-job/dogs-{stage}-*"),
    }


def test_the_managed_debugger_brings_its_image_and_its_rights(templates: dict[str, Any]):
    (machine,) = of_type(templates["variant"], "AWS::StepFunctions::StateMachine").values()
    image = json.dumps(machine["Properties"]["DefinitionSubstitutions"]["DebuggerImage"])
    assert "/sagemaker-debugger-rules:latest" in image
    assert "DebuggerRules" in image  # the account is looked up by region
    mapping = templates["variant"]["Mappings"]["DebuggerRules"]
    assert {region: row["account"] for region, row in mapping.items()} == images.DEBUGGER_ACCOUNTS
    text = json.dumps(policy_of(templates["variant"], "TrainingRole"))
    assert "/runs/*/managed/*" in text
    assert "repository/sagemaker-debugger-rules" in text
    assert "managed" not in json.dumps(policy_of(templates["dev"], "TrainingRole"))
    assert "DebuggerRules" not in templates["dev"]["Mappings"]


def environment(template: dict[str, Any], handler: str) -> dict[str, Any]:
    """The environment of the Lambda with this handler."""
    (found,) = [f for f in of_type(template, "AWS::Lambda::Function").values() if f["Properties"]["Handler"] == handler]
    return dict(found["Properties"]["Environment"]["Variables"])


def test_a_real_time_endpoint_has_the_alarms_that_its_updates_name(templates: dict[str, Any]):
    alarms = {a["Properties"]["AlarmName"]: a["Properties"] for a in of_type(templates["prod"], "AWS::CloudWatch::Alarm").values()}
    watched = {name: alarm for name, alarm in alarms.items() if "-rollback-" in name}
    assert set(watched) == {f"dogs-prod-rollback-{what}" for what in ("errors", "latency", "invalid")}
    assert all(alarm["Period"] == 60 and alarm["TreatMissingData"] == "notBreaching" for alarm in watched.values())
    assert watched["dogs-prod-rollback-latency"]["Threshold"] == 1_000_000  # µs
    invalid = watched["dogs-prod-rollback-invalid"]
    assert invalid["Namespace"] == environment(templates["prod"], "handler.handle")["METRIC_NAMESPACE"]
    assert invalid["Dimensions"] == [{"Name": "Endpoint", "Value": "dogs-prod"}]
    assert not any(
        "-rollback-" in a["Properties"]["AlarmName"] for a in of_type(templates["dev"], "AWS::CloudWatch::Alarm").values()
    )


def test_the_idle_switch_is_there_only_where_it_is_wanted(templates: dict[str, Any]):
    (rule,) = of_type(templates["idle"], "AWS::Events::Rule").values()
    assert rule["Properties"]["ScheduleExpression"] == "rate(15 minutes)"
    assert environment(templates["idle"], "idle.handle")["IDLE_HOURS"] == "2"
    assert environment(templates["idle"], "handler.handle")["WAKES"] == "true"
    waking = [entry for entry in statements(templates["idle"]) if "states:StartExecution" in listed(entry["Action"])]
    assert len(waking) == 1
    assert "wake-*" in json.dumps([e for e in statements(templates["idle"]) if "states:DescribeExecution" in listed(e["Action"])])
    for stage in STAGES:
        assert of_type(templates[stage], "AWS::Events::Rule") == {}
        assert environment(templates[stage], "handler.handle")["WAKES"] == "false"
        assert not any("states:StartExecution" in listed(entry["Action"]) for entry in statements(templates[stage]))


def test_other_origins_are_let_in_by_name_only(templates: dict[str, Any]):
    asked = [
        m["Properties"]
        for m in of_type(templates["idle"], "AWS::ApiGateway::Method").values()
        if m["Properties"]["HttpMethod"] == "OPTIONS"
    ]
    assert len(asked) == 4
    assert all(method["AuthorizationType"] == "NONE" for method in asked)
    assert all("https://www.example.com" in json.dumps(method) and "'*'" not in json.dumps(method) for method in asked)
    plain = of_type(templates["dev"], "AWS::ApiGateway::Method").values()
    assert not any(method["Properties"]["HttpMethod"] == "OPTIONS" for method in plain)


def test_scaling_is_limited_to_sagemaker(templates: dict[str, Any]):
    for name in ("prod", "idle"):
        found = [
            e for e in statements(templates[name]) if any(a.startswith("application-autoscaling:") for a in listed(e["Action"]))
        ]
        assert found
        only = {"StringEquals": {"application-autoscaling:service-namespace": "sagemaker"}}
        assert all(entry["Condition"] == only for entry in found)
    assert "application-autoscaling:" not in json.dumps(templates["dev"])


def test_whoever_ends_the_scaling_may_delete_its_alarms(templates: dict[str, Any]):
    """Application Auto Scaling deletes a policy's alarms with its caller's rights."""
    for name in ("prod", "idle"):
        ending = [p for p in of_type(templates[name], "AWS::IAM::Policy").values() if "DeregisterScalableTarget" in json.dumps(p)]
        assert len(ending) == (3 if name == "idle" else 2)
        for policy in ending:
            (entry,) = [
                e for e in policy["Properties"]["PolicyDocument"]["Statement"] if "cloudwatch:DeleteAlarms" in listed(e["Action"])
            ]
            assert json.dumps(entry["Resource"]).rstrip('"]}').endswith(":alarm:TargetTracking-endpoint/dogs-prod/*")


def test_machines_with_a_gpu_get_the_image_with_torch():
    cpu, gpu = code.server_folder(), code.server_folder(gpu=True)
    assert cpu[1] != gpu[1]
    assert "requirements-server-gpu.txt" in (gpu[0] / "Dockerfile").read_text()
    assert {"Dockerfile", "requirements-server-gpu.txt", "server.py", "classifier/torch_engine.py"} <= {
        path.relative_to(gpu[0]).as_posix() for path in gpu[0].rglob("*") if path.is_file()
    }
    assert not (cpu[0] / "classifier" / "torch_engine.py").exists()
