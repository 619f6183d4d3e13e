"""The state machine as data: its expressions evaluated, its paths walked, its requests held against AWS's own models."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from botocore.validate import ParamValidator

from infra import requests
from infra.config import ConfigError, StageConfig
from infra.pipeline import definition
from infra.roles import MANAGED, READS, WRITES
from infra.verify import walk as walking
from infra.verify.configurations import config_of
from infra.verify.walk import TaskError
from local_cloud.interpreter import evaluate_jsonata
from local_cloud.validation import service_model

BUCKET = "data-bucket"
PACKAGE = "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/7"
VALUES = {
    "DataBucket": BUCKET,
    "CodeUri": "s3://assets/abc.tar.gz",
    "CodeHash": "c0de",
    "ProcessingImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cpu-amzn2023-sagemaker",
    "TuningImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cpu-amzn2023-sagemaker",
    "TrainingImage": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cpu-amzn2023-sagemaker",
    "ServerImage": "000000000000.dkr.ecr.us-east-1.amazonaws.com/dogs-dev-server:tag",
    "ServerRepository": "dogs-dev-server",
    "ServerTag": "tag",
    "ServerProject": "dogs-dev-server",
    "DebuggerImage": "503895931360.dkr.ecr.us-east-1.amazonaws.com/sagemaker-debugger-rules:latest",
    "TopicArn": "arn:aws:sns:us-east-1:000000000000:topic",
    "ApiUrl": "https://api.example/dev",
    "SmokeTestFunctionArn": "arn:aws:lambda:us-east-1:000000000000:function:smoke",
    "CleanUpFunctionArn": "arn:aws:lambda:us-east-1:000000000000:function:clean",
    "DryRunFunctionArn": "arn:aws:lambda:us-east-1:000000000000:function:dry",
    "KeyArn": "arn:aws:kms:us-east-1:000000000000:key/0123",
    "CodeFile": "abc.gz",
    "Subnet1": "subnet-1",
    "Subnet2": "subnet-2",
    "SecurityGroup": "sg-1",
    **{
        f"{name}Arn": f"arn:aws:iam::000000000000:role/{name}"
        for name in ("PrepareRole", "FeaturesRole", "TrainingRole", "EvaluateRole", "ReportRole", "BatchRole", "EndpointRole")
    },
}


class Account(walking.Account):
    """The account of these tests."""

    def __init__(self, **faults: Any) -> None:
        super().__init__(bucket=BUCKET, account="000000000000", **faults)


def resolved(chosen: StageConfig) -> dict[str, Any]:
    """The definition with a value in every place."""
    text = json.dumps(definition(chosen))
    for name, value in VALUES.items():
        text = text.replace(f"${{{name}}}", value)
    assert "${" not in text, "a substitution without a value"
    return dict(json.loads(text))


class Walk(walking.Walk):
    """One execution of a stage's definition."""

    def __init__(self, chosen: StageConfig, answers: Callable[[str, dict[str, Any]], Any]) -> None:
        super().__init__(resolved(chosen), answers)


def config(stage: str = "dev", **override: Any) -> StageConfig:
    return config_of({"stage": stage, "override": json.dumps(override)})


def walk(given: Any, *, stage: str = "dev", account: Account | None = None, **override: Any) -> tuple[Walk, str, Any]:
    machine = Walk(config(stage, **override), account or Account())
    name, output = machine.run(given)
    return machine, name, output


def flags(machine: Walk, state: str) -> dict[str, str]:
    """What a job's script is told, by flag."""
    words = machine.requests[state]["AppSpecification"]["ContainerArguments"]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


# --- a run that works ------------------------------------------------------------------------------------------------------


def test_run_visits_every_state_of_the_design_in_order():
    machine, last, output = walk({})
    named = [
        *("ReadInput", "PrepareData", "ReadPrepared", "ChooseFeatures", "CacheFeatures", "Tune", "Train", "Evaluate"),
        *("ReadEvaluation", "Report", "QualityGate", "BuildServer", "Register", "Deploy", "SmokeTest", "WriteChampion"),
        *("Publish", "Done"),
    ]
    assert [name for name in machine.visited if name in named] == named
    assert last == "Done"
    assert output["test_top1"] == 0.97
    assert output["champion_top1"] is None
    assert output["best_hyperparameters"] == {"learning_rate": "0.0421", "batch_size": "128"}
    assert output["model_package"].endswith("/dogs-dev/1")
    assert output["report_uri"] == f"s3://{BUCKET}/runs/run-1/report/report.html"
    assert set(output) == {
        *("run", "api_url", "endpoint", "report_uri", "model_package", "model_data_url", "test_top1", "champion_top1"),
        *("training_job", "tuning_job", "best_hyperparameters", "dataset_hash", "rules_fired"),
    }


def test_features_are_skipped_unless_the_backbone_is_frozen():
    machine, last, _ = walk({}, stage="local")
    assert last == "Done"
    assert "CacheFeatures" not in machine.visited
    channels = [channel["ChannelName"] for channel in machine.requests["Train"]["InputDataConfig"]]
    assert channels == ["dataset"]


@pytest.mark.parametrize(("recipe", "cached"), [("head", True), ("lp-ft", True), ("finetune", False), ("scratch", False)])
def test_recipes_that_train_a_linear_layer_first_get_the_cached_features(recipe: str, cached: bool):
    machine, last, _ = walk({"recipe": recipe})
    assert last == "Done"
    assert ("CacheFeatures" in machine.visited) is cached
    for request in (machine.requests["Tune"]["TrainingJobDefinition"], machine.requests["Train"]):
        names = [channel["ChannelName"] for channel in request["InputDataConfig"]]
        assert names == (["dataset", "features"] if cached else ["dataset"])


def test_features_are_cached_as_the_training_would_see_the_pictures():
    def flags(**given: Any) -> dict[str, str]:
        machine, last, _ = walk(given)
        assert last == "Done"
        words = machine.requests["CacheFeatures"]["AppSpecification"]["ContainerArguments"]
        return dict(zip(words[::2], words[1::2], strict=True))

    defaults = {"--feature_views": "4", "--horizontal_flip": "true", "--random_resized_crop_min_scale": "0.35", "--seed": "0"}
    assert defaults.items() <= flags().items()
    changed = flags(hyperparameters={"horizontal_flip": False, "random_resized_crop_min_scale": 0.5, "seed": 3, "resize_size": 256})
    expected = {"--horizontal_flip": "false", "--random_resized_crop_min_scale": "0.5", "--seed": "3", "--resize_size": "256"}
    assert expected.items() <= changed.items()


def test_weights_from_the_bucket_become_a_channel():
    machine, last, _ = walk({"pretrained": "pretrained/mobilenet_v2.pth"})
    assert last == "Done"
    channels = {channel["ChannelName"]: channel for channel in machine.requests["Tune"]["TrainingJobDefinition"]["InputDataConfig"]}
    assert set(channels) == {"dataset", "features", "pretrained"}
    assert channels["pretrained"]["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/pretrained/mobilenet_v2.pth"
    assert machine.requests["Train"]["HyperParameters"]["pretrained"] == "channel"
    names = [item["InputName"] for item in machine.requests["CacheFeatures"]["ProcessingInputs"]]
    assert names == ["code", "dataset", "pretrained"]


def test_training_uses_the_best_trial_over_the_static_values():
    machine, _, _ = walk({"hyperparameters": {"epochs": 7, "horizontal_flip": False}})
    values = machine.requests["Train"]["HyperParameters"]
    assert values["learning_rate"] == "0.0421"
    assert values["batch_size"] == "128"
    assert values["epochs"] == "7"
    assert values["horizontal_flip"] == "false"
    assert values["sagemaker_program"] == "train_model.py"
    assert "_tuning_objective_metric" not in values
    assert all(isinstance(value, str) for value in values.values())
    trial = machine.requests["Tune"]["TrainingJobDefinition"]["StaticHyperParameters"]
    assert trial["sagemaker_program"] == "hpo.py"
    assert not {"learning_rate", "batch_size"} & set(trial)


def test_tuning_asks_for_the_promised_ranges():
    machine, _, _ = walk({})
    search = machine.requests["Tune"]["HyperParameterTuningJobConfig"]
    rate = search["ParameterRanges"]["ContinuousParameterRanges"][0]
    assert (rate["MinValue"], rate["MaxValue"], rate["ScalingType"]) == ("0.01", "0.1", "Logarithmic")
    assert search["ParameterRanges"]["CategoricalParameterRanges"] == [{"Name": "batch_size", "Values": ["64", "128", "256"]}]


RANGES = {
    "weight_decay": {"min": 0.00001, "max": 0.01, "scale": "Logarithmic"},
    "epochs": {"min": 5, "max": 20, "integer": True},
    "optimizer": ["sgd", "adamw"],
    "label_smoothing": {"min": 0, "max": 0.2},
}


def test_further_ranges_are_searched_in_sagemakers_form():
    machine, last, _ = walk({"tuning": {"ranges": RANGES}, "hyperparameters": {"epochs": 7, "momentum": 0.8}})
    assert last == "Done"
    request = machine.requests["Tune"]
    assert _problems("CreateHyperParameterTuningJob", request) == []
    ranges = request["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert ranges["ContinuousParameterRanges"][1:] == [
        {"Name": "weight_decay", "MinValue": "0.00001", "MaxValue": "0.01", "ScalingType": "Logarithmic"},
        {"Name": "label_smoothing", "MinValue": "0", "MaxValue": "0.2", "ScalingType": "Auto"},
    ]
    assert ranges["IntegerParameterRanges"] == [{"Name": "epochs", "MinValue": "5", "MaxValue": "20", "ScalingType": "Auto"}]
    assert ranges["CategoricalParameterRanges"][1:] == [{"Name": "optimizer", "Values": ["sgd", "adamw"]}]
    static = request["TrainingJobDefinition"]["StaticHyperParameters"]
    assert static["momentum"] == "0.8"
    assert not set(RANGES) & set(static), "SageMaker refuses a hyperparameter that is both static and searched"


def test_defaults_of_the_stage_may_hold_ranges():
    machine, last, _ = walk({}, input={"tuning": {"ranges": RANGES}})
    assert last == "Done"
    ranges = machine.requests["Tune"]["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert ranges["IntegerParameterRanges"] == [{"Name": "epochs", "MinValue": "5", "MaxValue": "20", "ScalingType": "Auto"}]
    machine, _, _ = walk({"tuning": {"ranges": {}}}, input={"tuning": {"ranges": RANGES}})
    ranges = machine.requests["Tune"]["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert ranges["IntegerParameterRanges"] == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"hyperparameters": {"colour": 1}}, "input.hyperparameters names colour; expected names among"),
        ({"tuning": {"ranges": {"learning_rate": [1]}}}, "input.tuning.ranges names learning_rate; expected names among"),
    ],
)
def test_unknown_hyperparameters_in_a_stages_defaults_are_found_before_it_is_deployed(given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        definition(config(input=given))


def test_what_the_search_found_reaches_the_training():
    found = {"learning_rate": "0.02", "batch_size": "64", "epochs": "12", "optimizer": "adamw"}
    tuned = {"HyperParameterTuningJobName": "x", "BestTrainingJob": {"TunedHyperParameters": found}}
    given = {"tuning": {"ranges": RANGES}, "hyperparameters": {"epochs": 7}}
    machine, last, output = walk(given, account=Account(Tune=tuned))
    assert last == "Done"
    assert found.items() <= machine.requests["Train"]["HyperParameters"].items()
    assert output["best_hyperparameters"] == found


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ({}, 30),
        ({"recipe": "scratch"}, 8),
        ({"hyperparameters": {"epochs": 7}}, 7),
        ({"hyperparameters": {"epochs": "7"}}, 7),
        ({"tuning": {"ranges": {"epochs": {"min": 5, "max": 20, "integer": True}}}}, 20),
        ({"tuning": {"ranges": {"epochs": [3, "12", 9]}}}, 12),
    ],
)
def test_hyperband_shares_out_as_many_epochs_as_a_trial_may_train(given: dict[str, Any], epochs: int):
    given = given | {"tuning": {**given.get("tuning", {}), "strategy": "Hyperband"}}
    machine, last, _ = walk(given)
    assert last == "Done"
    chosen = machine.requests["Tune"]["HyperParameterTuningJobConfig"]["StrategyConfig"]
    assert chosen == {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": epochs}}


def test_a_number_of_epochs_that_is_none_is_left_to_the_trials():
    """They refuse it with a sentence; an expression that fails would hide it."""
    machine, last, _ = walk({"hyperparameters": {"epochs": "many"}})
    assert last == "Done"
    assert machine.requests["Train"]["HyperParameters"]["epochs"] == "many"


def test_a_grid_takes_lists_and_no_more_trials_at_once_than_it_has():
    given = {"tuning": {"strategy": "Grid", "batch_size": [64], "max_parallel_jobs": 50, "ranges": {"optimizer": ["sgd", "adamw"]}}}
    machine, last, _ = walk(given)
    assert last == "Done"
    search = machine.requests["Tune"]["HyperParameterTuningJobConfig"]
    assert search["ResourceLimits"] == {"MaxParallelTrainingJobs": 8}
    assert set(search["ParameterRanges"]) == {"CategoricalParameterRanges"}
    assert search["ParameterRanges"]["CategoricalParameterRanges"][-1] == {"Name": "optimizer", "Values": ["sgd", "adamw"]}


def test_a_warm_start_names_its_parents():
    machine, last, _ = walk({"tuning": {"warm_start": ["dogs-dev-1", "dogs-dev-2"]}})
    assert last == "Done"
    assert machine.requests["Tune"]["WarmStartConfig"] == {
        "ParentHyperParameterTuningJobs": [
            {"HyperParameterTuningJobName": "dogs-dev-1"},
            {"HyperParameterTuningJobName": "dogs-dev-2"},
        ],
        "WarmStartType": "TransferLearning",
    }
    machine, _, _ = walk({"tuning": {"warm_start": ["dogs-dev-1"], "warm_start_type": "IdenticalDataAndAlgorithm"}})
    request = machine.requests["Tune"]
    assert request["WarmStartConfig"]["WarmStartType"] == "IdenticalDataAndAlgorithm"
    assert len(request["WarmStartConfig"]["ParentHyperParameterTuningJobs"]) == 1
    assert _problems("CreateHyperParameterTuningJob", request) == []
    assert "WarmStartConfig" not in walk({})[0].requests["Tune"]


@pytest.mark.parametrize(("overall", "chosen"), [(("learning_rate", "batch_size"), "0.09"), (("learning_rate",), "0.02")])
def test_an_earlier_trial_that_is_better_wins_when_it_tells_all_values(overall: tuple[str, ...], chosen: str):
    values = {"learning_rate": "0.09", "batch_size": "256"}
    tuned = {
        "HyperParameterTuningJobName": "x",
        "BestTrainingJob": {"TunedHyperParameters": {"learning_rate": "0.02", "batch_size": "64"}},
        "OverallBestTrainingJob": {"TunedHyperParameters": {name: values[name] for name in overall}},
    }
    machine, last, _ = walk({}, account=Account(Tune=tuned))
    assert last == "Done"
    assert machine.requests["Train"]["HyperParameters"]["learning_rate"] == chosen


# --- batches and data --------------------------------------------------------------------------------------------------------


def prepared(train: int) -> dict[str, Any]:
    result = {"dataset_hash": "abc", "dataset_uri": f"s3://{BUCKET}/datasets/abc/", "num_pictures": {"train": train}}
    return {"Body": json.dumps(result)}


@pytest.mark.parametrize("strategy", ["Bayesian", "Grid"])
@pytest.mark.parametrize(("pictures", "sizes"), [(100, ["64"]), (128, ["64", "128"]), (5000, ["64", "128", "256"])])
def test_batches_larger_than_the_data_set_are_not_tried(strategy: str, pictures: int, sizes: list[str]):
    machine, last, _ = walk({"tuning": {"strategy": strategy}}, account=Account(ReadPrepared=prepared(pictures)))
    assert last == "Done"
    ranges = machine.requests["Tune"]["HyperParameterTuningJobConfig"]["ParameterRanges"]
    (batches,) = [item for item in ranges["CategoricalParameterRanges"] if item["Name"] == "batch_size"]
    assert batches["Values"] == sizes


@pytest.mark.parametrize("recipe", ["head", "scratch"])
def test_a_data_set_that_fills_no_batch_ends_the_run_before_anything_is_trained(recipe: str):
    given = {"recipe": recipe, "tuning": {"batch_size": [512, 64]}}
    machine, last, output = walk(given, account=Account(ReadPrepared=prepared(40)))
    assert last == "Failed"
    assert output["Error"] == "CheckBatchSizeFailed"
    assert "tuning.batch_size is [512,64]; expected at least one value of at most 40" in output["Cause"]
    assert "smaller values in tuning.batch_size" in output["Cause"]
    assert not {"CacheFeatures", "Tune"} & set(machine.visited)


def test_never_more_trials_at_once_than_in_all():
    machine, _, _ = walk({"tuning": {"max_jobs": 1, "max_parallel_jobs": 3}})
    limits = machine.requests["Tune"]["HyperParameterTuningJobConfig"]["ResourceLimits"]
    assert limits == {"MaxParallelTrainingJobs": 1, "MaxNumberOfTrainingJobs": 1}


def test_no_job_has_an_input_that_may_be_empty():
    """SageMaker fails such a job; what a failed upload leaves empty is fetched by the report itself."""
    machine, _, _ = walk({})
    assert [item["InputName"] for item in machine.requests["Report"]["ProcessingInputs"]] == ["code"]
    assert flags(machine, "Report")["run_uri"] == f"s3://{BUCKET}/runs/run-1"


class LongName(Walk):
    """An execution whose name is as long as Step Functions allows."""

    def _context(self, name: str) -> dict[str, Any]:
        context = super()._context(name)
        return context | {"Execution": {"Id": "arn:" + "x" * 200, "Name": "r" * 80}}


def test_the_longest_names_fit_into_the_requests(monkeypatch: pytest.MonkeyPatch):
    bucket = "b" * 63
    for name, value in VALUES.items():
        monkeypatch.setitem(VALUES, name, value.replace(BUCKET, bucket))
    machine = LongName(config(), Account())
    assert machine.run({"source": "incoming/" + "s" * 171})[0] == "Done"
    assert len(flags(machine, "Report")["processing_jobs"]) > 60
    for name in ("PrepareData", "CacheFeatures", "Evaluate", "Report"):
        request = machine.requests[name]
        program = request["AppSpecification"]
        assert max(map(len, [*program["ContainerEntrypoint"], *program["ContainerArguments"]])) <= 256
        assert len(program["ContainerArguments"]) <= 100
        assert max(map(len, request["Environment"].values())) <= 256
    assert max(map(len, machine.requests["Train"]["Environment"].values())) <= 512
    assert max(map(len, machine.requests["Register"]["CustomerMetadataProperties"].values())) <= 256
    for name, operation in OPERATIONS.items():
        if name in machine.requests:
            assert _problems(operation, machine.requests[name]) == []


def test_a_name_that_no_tag_can_hold_is_refused():
    class Odd(Walk):
        def _context(self, name: str) -> dict[str, Any]:
            return super()._context(name) | {"Execution": {"Id": "arn:x", "Name": "try (2)!"}}

    last, output = Odd(config(), Account()).run({})
    assert last == "InvalidInput"
    assert "The execution's name is try (2)!; expected letters" in output["Cause"]


def test_a_short_deadline_stays_within_what_an_update_accepts():
    request = requests.update_endpoint(config("prod", endpoint={"deadline_s": 60}))
    assert request["DeploymentConfig"]["BlueGreenUpdatePolicy"]["MaximumExecutionTimeoutInSeconds"] == 600


def test_an_existing_image_is_not_built_again():
    account = Account()
    account.image_built = True
    machine, last, _ = walk({}, account=account)
    assert last == "Done"
    assert "BuildServer" not in machine.visited


def test_names_fit_their_limits_and_differ_between_retries_and_a_state_machine_deleted_and_made_again():
    machine, _, _ = walk({})
    names = {
        32: machine.requests["Tune"]["HyperParameterTuningJobName"],
        63: machine.requests["PrepareData"]["ProcessingJobName"],
    }
    for limit, name in names.items():
        assert len(name) <= limit
        assert name.startswith("dogs-dev-")
    expression = definition(config())["States"]["Train"]["Arguments"]["TrainingJobName"][2:-2].strip()
    variables = machine.variables
    made = set()
    new_year, later = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
    for retry, attempt, start in ((0, 0, new_year), (1, 0, new_year), (0, 1, new_year), (0, 0, later)):
        execution = {"Id": "x", "Name": "x", "StartTime": start, "RedriveCount": 0}
        context = {"Execution": execution, "State": {"Name": "Train", "RetryCount": retry}}
        made.add(evaluate_jsonata(expression, {**variables, "attempt": attempt, "states": {"context": context}}))
    assert len(made) == 4


# --- requests against AWS's models -----------------------------------------------------------------------------------------

OPERATIONS = {
    "PrepareData": "CreateProcessingJob",
    "CacheFeatures": "CreateProcessingJob",
    "Tune": "CreateHyperParameterTuningJob",
    "Train": "CreateTrainingJob",
    "Evaluate": "CreateProcessingJob",
    "Report": "CreateProcessingJob",
    "ReportFailure": "CreateProcessingJob",
    "Register": "CreateModelPackage",
    "CreateModel": "CreateModel",
    "CreateEndpointConfig": "CreateEndpointConfig",
    "CreateEndpoint": "CreateEndpoint",
    "UpdateEndpoint": "UpdateEndpoint",
    "FindEndpoint": "DescribeEndpoint",
}


def _problems(operation: str, request: Any, service: str = "sagemaker") -> list[str]:
    """Wrong names, types and patterns, by botocore's model of the service."""
    model = service_model(service).operation_model(operation)
    report = ParamValidator().validate(request, model.input_shape)
    return [report.generate_report()] if report.has_errors() else []


@pytest.mark.parametrize("stage", ["dev", "prod", "local"])
@pytest.mark.parametrize("strategy", ["Bayesian", "Random", "Grid", "Hyperband"])
def test_requests_are_what_sagemaker_accepts(stage: str, strategy: str):
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "older"}
    machine, last, _ = walk({"tuning": {"strategy": strategy, "batch_size": [64]}}, stage=stage, account=account)
    assert last == "Done"
    assert set(machine.requests) >= {"PrepareData", "Tune", "Train", "Register", "UpdateEndpoint"}
    for name, operation in OPERATIONS.items():
        if name in machine.requests:
            assert _problems(operation, machine.requests[name]) == []
    search = machine.requests["Tune"]["HyperParameterTuningJobConfig"]
    assert ("MaxNumberOfTrainingJobs" in search["ResourceLimits"]) == (strategy != "Grid")
    assert search["ParameterRanges"]["CategoricalParameterRanges"][-1]["Values"] == ["64"]
    if strategy == "Grid":
        assert search["ParameterRanges"]["CategoricalParameterRanges"][0]["Values"] == ["0.01", "0.021544", "0.046416", "0.1"]


def test_a_closed_service_is_not_mentioned():
    machine, _, _ = walk({})
    fields = {"ProfilerConfig", "DebugHookConfig", "DebugRuleConfigurations", "ProfilerRuleConfigurations"}
    assert not fields & set(machine.requests["Train"])


def test_managed_debugger_adds_awss_fields():
    machine, _, _ = walk({}, managed_debugger=True)
    request = machine.requests["Train"]
    assert _problems("CreateTrainingJob", request) == []
    outputs = [request["DebugHookConfig"], request["ProfilerConfig"]]
    rules = [*request["DebugRuleConfigurations"], *request["ProfilerRuleConfigurations"]]
    assert {part["S3OutputPath"] for part in (*outputs, *rules)} == {f"s3://{BUCKET}/runs/run-1/managed"}
    assert {rule["RuleEvaluatorImage"] for rule in rules} == {VALUES["DebuggerImage"]}
    assert all(rule["RuleParameters"] == {"rule_to_invoke": rule["RuleConfigurationName"]} for rule in rules)
    assert request["ProfilerConfig"]["ProfilingIntervalInMilliseconds"] in (100, 200, 500, 1000, 5000, 60000)  # what AWS takes


def test_the_managed_debuggers_files_lie_apart_and_its_rules_may_use_them():
    assert MANAGED == ("runs/*/managed/*",)
    assert not any(fnmatch("runs/x/managed/y", key) for key in (*READS["TrainingRole"], *WRITES["TrainingRole"]))


@pytest.mark.filterwarnings("ignore")  # smdebug is unmaintained and warns about its own syntax
def test_smdebug_obeys_our_own_hook_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SageMaker mounts configurations of its own hook and profiler; the variables lead smdebug past them."""
    from smdebug.core.config_constants import CONFIG_FILE_PATH_ENV_STR
    from smdebug.profiler import profiler_config_parser

    mounted = tmp_path / "profilerconfig.json"
    mounted.write_text(json.dumps({"ProfilingParameters": {"ProfilerEnabled": True, "LocalPath": str(tmp_path)}}))
    monkeypatch.setenv("SMPROFILER_CONFIG_PATH", str(mounted))
    assert profiler_config_parser.ProfilerConfigParser().profiling_enabled
    environment = walk({}, managed_debugger=True)[0].requests["Train"]["Environment"]
    monkeypatch.setenv("SMPROFILER_CONFIG_PATH", environment["SMPROFILER_CONFIG_PATH"])
    assert not profiler_config_parser.ProfilerConfigParser().profiling_enabled
    assert CONFIG_FILE_PATH_ENV_STR in environment
    assert CONFIG_FILE_PATH_ENV_STR not in walk({})[0].requests["Train"]["Environment"]


@pytest.mark.parametrize(
    ("stage", "tuning_jobs", "training"),
    [
        ("dev", {}, {}),
        ("prod", {}, {"instance_type": "ml.g5.12xlarge"}),
        ("prod", {"instance_type": "ml.g5.12xlarge"}, {"instance_count": 2}),
        ("prod", {"instance_count": 3}, {"instance_type": "ml.p4d.24xlarge", "instance_count": 16}),
    ],
)
def test_torchrun_is_asked_for_where_there_is_more_than_one_process(
    stage: str, tuning_jobs: dict[str, Any], training: dict[str, Any]
):
    machine, last, _ = walk({}, stage=stage, tuning_jobs=tuning_jobs, training=training)
    assert last == "Done"
    trial = machine.requests["Tune"]["TrainingJobDefinition"]
    for request, values, given in (
        (trial, trial["StaticHyperParameters"], tuning_jobs),
        (machine.requests["Train"], machine.requests["Train"]["HyperParameters"], training),
    ):
        assert values.get("sagemaker_torch_distributed_enabled") == ("true" if given else None)
        count = given.get("instance_count", 1)
        assert request["ResourceConfig"]["InstanceCount"] == count
        assert request["EnableInterContainerTrafficEncryption"] is (count > 1)
    assert _problems("CreateHyperParameterTuningJob", machine.requests["Tune"]) == []
    assert _problems("CreateTrainingJob", machine.requests["Train"]) == []


def _toolkit_of(chosen: StageConfig) -> dict[str, str]:
    return requests._toolkit(chosen, "train_model.py", chosen.training)


def test_the_toolkit_reads_the_switch_as_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its hyperparameters are JSON: a text in quotes would reach it as a string."""
    from sagemaker_training import environment

    given = _toolkit_of(config("prod", training={"instance_count": 2}))
    (tmp_path / "hyperparameters.json").write_text(json.dumps(given))
    monkeypatch.setattr(environment, "hyperparameters_file_dir", str(tmp_path / "hyperparameters.json"))
    assert environment.read_hyperparameters()["sagemaker_torch_distributed_enabled"] is True


def test_pictures_are_prepared_by_as_many_machines_as_the_stage_says():
    machine, last, _ = walk({}, prepare_instances=4)
    assert last == "Done"
    counts = {
        name: machine.requests[name]["ProcessingResources"]["ClusterConfig"]["InstanceCount"]
        for name in ("PrepareData", "CacheFeatures", "Evaluate", "Report")
    }
    assert counts == {"PrepareData": 4, "CacheFeatures": 1, "Evaluate": 1, "Report": 1}


def test_interrupted_trials_and_trainings_find_their_checkpoints_apart():
    machine, _, _ = walk({}, stage="prod")
    trial, final = machine.requests["Tune"]["TrainingJobDefinition"], machine.requests["Train"]
    assert trial["EnableManagedSpotTraining"] is True
    assert trial["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/runs/run-1/checkpoints/tuning"
    assert final["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/runs/run-1/checkpoints/training"
    assert "CheckpointConfig" not in walk({})[0].requests["Tune"]["TrainingJobDefinition"]


def test_spot_waits_longer_than_it_runs():
    machine, _, _ = walk({}, stage="prod")
    request = machine.requests["Train"]
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] > request["StoppingCondition"]["MaxRuntimeInSeconds"]


# --- input -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"colour": "red"}, "colour is unknown; expected one of action, source,"),
        ({"tuning": {"max_job": 3}}, "tuning.max_job is unknown"),
        ({"quality_gate": {"top1": 1}}, "quality_gate.top1 is unknown"),
        ({"action": "fly"}, "action is fly; expected one of train, deploy, batch."),
        ({"recipe": "soup"}, "recipe is soup; expected one of head, finetune, lp-ft, scratch."),
        ({"image_size": 7}, "image_size is 7; expected an integer from 16 to 1024."),
        ({"image_size": "224"}, "image_size is 224; expected an integer"),
        ({"image_size": 32.5}, "image_size is 32.5;"),
        ({"backbone": "Res Net"}, "backbone is Res Net;"),
        ({"pretrained": "weights.zip"}, "pretrained is weights.zip; expected torchvision, none, or a key"),
        ({"pretrained": "none"}, "pretrained is none; expected weights, because the recipe"),
        ({"source": "elsewhere/"}, "source is elsewhere/; expected a key prefix"),
        ({"source": "http://example.com/x.zip"}, "source is http://example.com/x.zip;"),
        ({"source": "https://example.com/x.zip"}, "an allowed host (s3-us-west-1.amazonaws.com)"),
        ({"source": "s3://other/x/"}, "source is s3://other/x/;"),
        ({"source": f"s3://{BUCKET}/models/"}, "source is s3://data-bucket/models/;"),
        ({"source": 5}, "source is 5;"),
        ({"source": "incoming/" + "x" * 200}, "at most 180 characters for a key"),
        ({"hyperparameters": {"learning_rate": 0.1}}, "hyperparameters is"),
        ({"hyperparameters": {"sagemaker_program": "x.py"}}, "expected only names among resize_size,"),
        ({"hyperparameters": {"epochs": [1]}}, "expected texts, numbers, true or false as values"),
        ({"hyperparameters": {"epochs": []}}, "expected texts, numbers, true or false as values"),
        ({"hyperparameters": {"epochs": None}}, "expected texts, numbers, true or false as values"),
        ({"hyperparameters": 3}, "hyperparameters is 3; expected an object"),
        ({"tuning": 3}, "tuning is 3; expected an object"),
        ({"tuning": {"strategy": "Guess"}}, "tuning.strategy is Guess; expected one of Bayesian, Random, Grid, Hyperband."),
        ({"tuning": {"max_jobs": 1000}}, "tuning.max_jobs is 1000; expected an integer from 1 to 100."),
        ({"tuning": {"learning_rate": [0.1, 0.01]}}, "tuning.learning_rate is [0.1,0.01];"),
        ({"tuning": {"learning_rate": 0.1}}, "tuning.learning_rate is 0.1;"),
        ({"tuning": {"batch_size": [0]}}, "tuning.batch_size is"),
        ({"tuning": {"batch_size": []}}, "tuning.batch_size is"),
        ({"tuning": {"batch_size": 64}}, "tuning.batch_size is 64; expected a list of integers from 1 to 8192"),
        ({"input": 5}, "input is 5; expected a prefix with pictures for action batch"),
        ({"model_package": None}, "model_package is null; expected the ARN of a version in the model package group dogs-dev"),
        ({"tuning": {"ranges": 3}}, "tuning.ranges is 3; expected an object with at most 20 names"),
        ({"tuning": {"ranges": {"colour": [1]}}}, "tuning.ranges.colour is [1]; expected a name among"),
        ({"tuning": {"ranges": {"learning_rate": [1]}}}, "tuning.ranges.learning_rate is [1]; expected a name among"),
        ({"tuning": {"ranges": {"recipe": ["head"]}}}, "tuning.ranges.recipe is"),
        ({"tuning": {"ranges": {"seed": [1, 2]}}}, "tuning.ranges.seed is [1,2]; expected no range: the recipe's features"),
        ({"tuning": {"ranges": {"epochs": []}}}, "tuning.ranges.epochs is []; expected a list of 1 to 30 values"),
        ({"tuning": {"ranges": {"epochs": [[1]]}}}, "tuning.ranges.epochs is [[1]];"),
        ({"tuning": {"ranges": {"epochs": list(range(31))}}}, "tuning.ranges.epochs is [0,1,"),
        ({"tuning": {"ranges": {"epochs": 5}}}, "tuning.ranges.epochs is 5;"),
        ({"tuning": {"ranges": {"epochs": {"min": 5}}}}, 'tuning.ranges.epochs is {"min":5};'),
        ({"tuning": {"ranges": {"epochs": {"min": 5, "max": 5}}}}, "tuning.ranges.epochs is"),
        ({"tuning": {"ranges": {"epochs": {"min": 5, "max": 6, "step": 1}}}}, "tuning.ranges.epochs is"),
        ({"tuning": {"ranges": {"epochs": {"min": 5, "max": 6.5, "integer": True}}}}, "tuning.ranges.epochs is"),
        ({"tuning": {"ranges": {"epochs": {"min": 5, "max": 6, "integer": "yes"}}}}, "tuning.ranges.epochs is"),
        ({"tuning": {"ranges": {"weight_decay": {"min": 0, "max": 1, "scale": "Logarithmic"}}}}, "Logarithmic needs min > 0"),
        ({"tuning": {"ranges": {"momentum": {"min": 0, "max": 1, "scale": "ReverseLogarithmic"}}}}, "tuning.ranges.momentum is"),
        ({"tuning": {"ranges": {"momentum": {"min": 0, "max": 1, "scale": "Cubic"}}}}, "tuning.ranges.momentum is"),
        (
            {"tuning": {"strategy": "Grid", "ranges": {"epochs": {"min": 5, "max": 6}}}},
            "tuning.strategy is Grid; expected Bayesian, Random or Hyperband, or only lists of values in tuning.ranges.",
        ),
        (
            {"tuning": {"strategy": "Grid", "ranges": {"epochs": list(range(1, 21))}}},
            "The number of trials of the grid is 240; expected at most 100;",
        ),
        ({"tuning": {"warm_start": "dogs-dev-1"}}, "tuning.warm_start is dogs-dev-1; expected a list of at most 5 names"),
        ({"tuning": {"warm_start": ["a", "b", "c", "d", "e", "f"]}}, "tuning.warm_start is"),
        ({"tuning": {"warm_start": ["not a name"]}}, "tuning.warm_start is"),
        ({"tuning": {"warm_start": [5]}}, "tuning.warm_start is [5];"),
        ({"tuning": {"warm_start_type": "Warm"}}, "expected one of TransferLearning, IdenticalDataAndAlgorithm."),
        (
            {"tuning": {"warm_start": ["dogs-dev-1"], "strategy": "Grid", "batch_size": [64]}},
            "tuning.strategy is Grid; expected Bayesian or Random, because tuning.warm_start names earlier jobs",
        ),
        ({"recipe": "lp-ft", "pretrained": "none"}, "pretrained is none; expected weights, because the recipe"),
        ({"quality_gate": {"min_top1": 97}}, "quality_gate.min_top1 is 97; expected a number from 0 to 1."),
        ({"action": "deploy"}, "model_package is ; expected the ARN of a version in the model package group dogs-dev"),
        ([1], "The input is [1]; expected a JSON object"),
        ("hello", "The input is hello; expected a JSON object"),
        ({"recipe": None}, "recipe is "),
    ],
)
def test_bad_input_is_refused_with_its_name(given: Any, named: str):
    machine, last, output = walk(given)
    assert last == "InvalidInput"
    assert output["Error"] == "InvalidInput"
    assert named in output["Cause"]
    assert "PrepareData" not in machine.visited


@pytest.mark.parametrize("field", ["tuning.batch_size", "tuning.warm_start", "tuning.ranges.epochs"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a good one"])
@pytest.mark.parametrize("value", [None, [], {}, [[]], [64]], ids=json.dumps)
def test_one_bad_value_in_a_list_is_enough(field: str, beside: bool, value: Any):
    good = {"tuning.batch_size": 64, "tuning.warm_start": "dogs-dev-1", "tuning.ranges.epochs": 5}[field]
    given: Any = [value, good] if beside else [value]
    for name in reversed(field.split(".")):
        given = {name: given}
    machine, last, output = walk(given)
    assert last == "InvalidInput"
    assert f"{field} is [{json.dumps(value)}" in output["Cause"]
    assert "PrepareData" not in machine.visited


def test_what_no_cached_feature_depends_on_may_be_searched_by_other_recipes():
    assert walk({"recipe": "finetune", "tuning": {"ranges": {"seed": [1, 2]}}})[1] == "Done"


def test_all_bad_fields_are_named_at_once():
    _, _, output = walk({"recipe": "soup", "image_size": 1, "colour": 2})
    assert all(name in output["Cause"] for name in ("recipe", "image_size", "colour"))


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({"source": "incoming/cats/"}, f"s3://{BUCKET}/incoming/cats/"),
        ({"source": f"s3://{BUCKET}/incoming/cats.zip"}, f"s3://{BUCKET}/incoming/cats.zip"),
        ({"source": "https://s3-us-west-1.amazonaws.com/x.zip"}, "https://s3-us-west-1.amazonaws.com/x.zip"),
        ({"source": "s3://shared-pictures/x/"}, "s3://shared-pictures/x/"),
    ],
)
def test_sources_reach_the_job_as_uris(given: Any, source: str):
    machine, last, _ = walk(given, source_buckets=["shared-pictures"])
    assert last == "Done"
    arguments = machine.requests["PrepareData"]["AppSpecification"]["ContainerArguments"]
    assert arguments[arguments.index("--source") + 1] == source


def test_instances_of_preparation_meet_in_a_folder_that_their_role_reaches():
    machine, _, _ = walk({})
    arguments = machine.requests["PrepareData"]["AppSpecification"]["ContainerArguments"]
    uri = arguments[arguments.index("--exchange_uri") + 1]
    # The digits are those of the job's name, so a retry meets elsewhere.
    number = machine.requests["PrepareData"]["ProcessingJobName"].rsplit("-", 1)[-1]
    assert re.fullmatch(rf"s3://{BUCKET}/runs/[^/]+/prepare-parts/{number}", uri)
    for grants in (READS, WRITES):
        assert any(fnmatch(f"{uri}/algo-1.done".removeprefix(f"s3://{BUCKET}/"), key) for key in grants["PrepareRole"])


def test_groups_of_fields_are_merged_with_their_defaults():
    machine, last, _ = walk({"tuning": {"max_jobs": 2}})
    assert last == "Done"
    assert machine.variables["request"]["tuning"]["strategy"] == "Bayesian"
    assert machine.variables["request"]["tuning"]["max_jobs"] == 2


# --- decisions and failures ------------------------------------------------------------------------------------------------


def test_a_refused_model_leaves_the_endpoint_alone_and_keeps_its_report():
    account = Account()
    account.summary["top1"] = 0.31
    machine, last, output = walk({}, account=account)
    assert last == "QualityGateFailed"
    assert "Test top1 is 0.31; expected at least 0.6" in output["Cause"]
    assert "Report" in machine.visited
    assert "CreateModel" not in machine.visited


@pytest.mark.parametrize(("champion", "accepted"), [(0.99, True), (0.995, False), (None, True)])
def test_a_model_may_not_fall_far_behind_the_serving_one(champion: float | None, accepted: bool):
    account = Account()
    account.summary["champion_top1"] = champion
    _, last, _ = walk({}, account=account)
    assert (last == "Done") is accepted


def test_a_failed_job_is_explained_with_its_reason_and_cleaned_up():
    cause = json.dumps({"TrainingJobName": "x", "FailureReason": 'AlgorithmError: learning_rate is "much"\nexit code 1'})
    machine, last, output = walk({}, account=Account(Train=TaskError("States.TaskFailed", cause)))
    assert last == "Failed"
    assert machine.visited[-6:] == ["CapacityMissing", "CleanUp", "ChooseReport", "ReportFailure", "NotifyFailure", "Failed"]
    assert output["Error"] == "TrainFailed"
    assert 'AlgorithmError: learning_rate is "much"' in output["Cause"]
    assert "CloudWatch" in output["Cause"]


def test_lack_of_capacity_is_waited_out_with_a_new_name():
    scarce = TaskError("States.TaskFailed", json.dumps({"FailureReason": "CapacityError: Unable to provision requested ML"}))
    machine, last, _ = walk({}, account=Account(Train=[scarce]))
    assert last == "Done"
    assert machine.visited.count("Train") == 2
    _, last, _ = walk({}, account=Account(Train=scarce))
    assert last == "Failed"


def test_a_search_without_any_result_is_a_failure_with_a_sentence():
    found = {"HyperParameterTuningJobName": "x"}
    _, last, output = walk({}, account=Account(Tune=found))
    assert last == "Failed"
    assert "No trial completed with an objective" in output["Cause"]


# --- the report of a run that failed -----------------------------------------------------------------------------------------


def job_failed(**names: str) -> TaskError:
    """What ``.sync`` raises for a job that began and failed."""
    return TaskError("States.TaskFailed", json.dumps({**names, "FailureReason": "AlgorithmError:\n  no space left"}))


@pytest.mark.parametrize(
    ("state", "error", "known"),
    [
        ("PrepareData", job_failed(ProcessingJobName="p-1"), {"processing_jobs": "p-1,none,none", "tuning_job": "none"}),
        ("CacheFeatures", job_failed(ProcessingJobName="f-1"), {"tuning_job": "none", "training_job": "none"}),
        ("Tune", job_failed(HyperParameterTuningJobName="t-1"), {"tuning_job": "t-1", "training_job": "none"}),
        ("Train", job_failed(TrainingJobName="train-1"), {"training_job": "train-1"}),
        ("Evaluate", job_failed(ProcessingJobName="e-1"), {}),
        ("SmokeTest", TaskError("WrongAnswers", '{"errorMessage": "3 of 4 pictures were wrong"}'), {}),
        ("CreateEndpoint", TaskError("SageMaker.SageMakerException", "no quota"), {}),
    ],
)
def test_a_run_that_failed_gets_its_report_with_what_is_known(state: str, error: TaskError, known: dict[str, str]):
    machine, last, output = walk({}, account=Account(**{state: error}))
    assert last == "Failed"
    assert machine.visited[-5:] == ["CleanUp", "ChooseReport", "ReportFailure", "NotifyFailure", "Failed"]
    told = flags(machine, "ReportFailure")
    assert known.items() <= told.items()
    assert told["outcome"].startswith(f"{state} failed: ")
    assert "\n" not in told["outcome"]
    assert _problems("CreateProcessingJob", machine.requests["ReportFailure"]) == []
    assert machine.requests["ReportFailure"]["StoppingCondition"] == {"MaxRuntimeInSeconds": 900}
    report = f" Report: s3://{BUCKET}/runs/run-1/report/report.html"
    assert output["Cause"].endswith(report)
    assert machine.requests["NotifyFailure"]["Message"].endswith(report)


def test_the_names_of_jobs_that_ran_reach_the_report():
    machine, _, _ = walk({})
    names = [machine.requests[state]["ProcessingJobName"] for state in ("PrepareData", "CacheFeatures", "Evaluate")]
    told = flags(machine, "Report")
    assert told["processing_jobs"] == ",".join(names)
    assert told["outcome"] == ""
    prepared, _, cached = flags(walk({"recipe": "scratch"})[0], "Report")["processing_jobs"].split(",")
    assert prepared.startswith("dogs-dev-prep-")
    assert cached.startswith("dogs-dev-eval-")
    assert flags(walk({"recipe": "scratch"})[0], "Report")["processing_jobs"].split(",")[1] == "none"


@pytest.mark.parametrize(
    ("said", "fired"), [("Overfit,LowGPUUtilization", ["Overfit", "LowGPUUtilization"]), ("Overfit", ["Overfit"]), ("none", [])]
)
def test_the_output_names_the_rules_that_fired(said: str, fired: list[str]):
    _, _, output = walk({}, account=Account(Report={"ProcessingJobName": "r", "ExitMessage": said}))
    assert output["rules_fired"] == fired
    assert walk({})[2]["rules_fired"] == []


def test_a_failed_build_says_what_failed_instead_of_its_whole_description():
    phases = [
        {"PhaseType": "BUILD", "PhaseStatus": "SUCCEEDED", "Contexts": [{"StatusCode": "", "Message": ""}]},
        {"PhaseType": "POST_BUILD", "PhaseStatus": "FAILED", "Contexts": [{"StatusCode": "X", "Message": "docker push: denied"}]},
        {"PhaseType": "COMPLETED"},
    ]
    build = {"Build": {"Id": "dogs-dev-server:1", "BuildStatus": "FAILED", "Phases": phases}}
    account = Account(BuildServer=TaskError("States.TaskFailed", json.dumps(build)))
    _, last, output = walk({}, account=account)
    assert last == "Failed"
    assert (
        "failed in BuildServer (States.TaskFailed): POST_BUILD FAILED: docker push: denied. Open the build's log" in output["Cause"]
    )


def test_a_refused_model_is_told_to_the_one_report_that_there_is():
    account = Account()
    account.summary |= {"top1": 0.31, "champion_top1": 0.9876}
    machine, last, output = walk({}, account=account)
    assert last == "QualityGateFailed"
    sentence = "Test top1 is 0.31; expected at least 0.6 and at most 0.02 below the serving model with 0.9876"
    assert flags(machine, "Report")["outcome"] == f"Refused: {sentence}. Nothing was deployed."
    assert output["Cause"].startswith(f"{sentence}. Nothing was deployed; the endpoint is as before. Report: s3://{BUCKET}/runs/")
    assert "ReportFailure" not in machine.visited


def test_a_report_that_fails_hides_nothing_and_is_not_promised():
    faults = {"Train": job_failed(TrainingJobName="x"), "ReportFailure": TaskError("States.TaskFailed", "no capacity")}
    _, last, output = walk({}, account=Account(**faults))
    assert last == "Failed"
    assert output["Error"] == "TrainFailed"
    assert "no space left" in output["Cause"]
    assert "no capacity" not in output["Cause"]
    assert "Report:" not in output["Cause"]


def test_a_failed_report_is_not_tried_as_another_job():
    machine, last, output = walk({}, account=Account(Report=job_failed(ProcessingJobName="r-1")))
    assert last == "Failed"
    assert output["Error"] == "ReportFailed"
    assert "ReportFailure" not in machine.visited


def test_a_deployment_without_a_run_has_no_report():
    given = {"action": "deploy", "model_package": "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/3"}
    machine, last, _ = walk(given, account=Account(ReadPackage=TaskError("SageMaker.SageMakerException", "gone")))
    assert last == "Failed"
    assert "ReportFailure" not in machine.visited


def test_a_long_reason_fits_into_an_argument():
    reason = "word\n" * 400
    account = Account(Train=TaskError("States.TaskFailed", json.dumps({"TrainingJobName": "x", "FailureReason": reason})))
    machine, _, output = walk({}, account=account)
    assert len(flags(machine, "ReportFailure")["outcome"]) == 256
    assert flags(machine, "ReportFailure")["outcome"].endswith("…")
    assert reason[:100] in output["Cause"]


FAILED_SEARCH = json.dumps(
    {
        "HyperParameterTuningJobName": "dogs-dev-0123",
        "HyperParameterTuningJobStatus": "Failed",
        "FailureReason": "No training job succeeded after 5 attempts. For additional details, please take a look at …",
    }
)


def trials(*reasons: str) -> dict[str, Any]:
    """What ListTrainingJobsForHyperParameterTuningJob answers."""
    names = [f"dogs-dev-0123-{number:03d}" for number, _ in enumerate(reasons, 1)]
    return {
        "TrainingJobSummaries": [{"TrainingJobName": name, "FailureReason": why} for name, why in zip(names, reasons, strict=True)]
    }


def test_a_search_that_failed_is_explained_by_its_first_failed_trial():
    account = Account(
        Tune=TaskError("States.TaskFailed", FAILED_SEARCH),
        ReadTrialFailure=trials('AlgorithmError: learning_rate=-1 is outside "1e-06 to 10", exit code: 1'),
    )
    machine, last, output = walk({}, account=account)
    assert last == "Failed"
    assert output["Error"] == "TuneFailed"
    expected = 'Trial dogs-dev-0123-001: AlgorithmError: learning_rate=-1 is outside "1e-06 to 10", exit code: 1. '
    assert expected in output["Cause"]
    assert "No training job succeeded" not in output["Cause"]
    request = machine.requests["ReadTrialFailure"]
    assert request["HyperParameterTuningJobName"] == "dogs-dev-0123"
    assert request["StatusEquals"] == "Failed"
    assert _problems("ListTrainingJobsForHyperParameterTuningJob", request) == []
    assert "CleanUp" in machine.visited


@pytest.mark.parametrize("answer", [trials(), TaskError("SageMaker.SageMakerException", "Throttled")])
def test_without_a_trials_reason_the_searchs_own_one_stays(answer: Any):
    account = Account(Tune=TaskError("States.TaskFailed", FAILED_SEARCH), ReadTrialFailure=answer)
    _, last, output = walk({}, account=account)
    assert last == "Failed"
    assert "(States.TaskFailed): No training job succeeded after 5 attempts." in output["Cause"]


@pytest.mark.parametrize(
    "cause",
    [
        "2 validation errors detected: …",
        "{not JSON}"[:-1],
        json.dumps({"HyperParameterTuningJobName": "x", "HyperParameterTuningJobStatus": "Stopped"}),
    ],
)
def test_trials_are_not_asked_for_when_the_search_itself_is_the_problem(cause: str):
    machine, last, _ = walk({}, account=Account(Tune=TaskError("States.TaskFailed", cause)))
    assert last == "Failed"
    assert "ReadTrialFailure" not in machine.visited


def test_trials_without_capacity_are_waited_out():
    scarce = trials("CapacityError: Unable to provision requested ML compute capacity.")
    account = Account(Tune=[TaskError("States.TaskFailed", FAILED_SEARCH)], ReadTrialFailure=scarce)
    machine, last, _ = walk({}, account=account)
    assert last == "Done"
    assert machine.visited.count("Tune") == 2


def test_an_endpoint_in_motion_is_waited_for():
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "older"}
    moving = {"EndpointStatus": "Updating", "EndpointConfigName": "older"}
    account.faults["FindEndpoint"] = [moving, moving]
    machine, last, _ = walk({}, account=account)
    assert last == "Done"
    assert machine.visited.count("WaitForOthers") == 2
    assert "UpdateEndpoint" in machine.visited
    assert "CreateEndpoint" not in machine.visited


def test_a_failed_endpoint_is_deleted_and_made_again():
    account = Account()
    account.endpoint = {"EndpointStatus": "Failed", "EndpointConfigName": "older"}
    machine, last, _ = walk({}, account=account)
    assert last == "Done"
    assert "DeleteFailedEndpoint" in machine.visited
    assert "CreateEndpoint" in machine.visited


@pytest.mark.parametrize(
    ("state", "message", "served"),
    [
        ("UpdateEndpoint", 'Cannot update in-progress endpoint "arn:…".', "older"),
        ("CreateEndpoint", 'Cannot create already existing endpoint "arn:…".', None),
    ],
)
def test_of_two_executions_at_once_the_second_waits_for_the_first(state: str, message: str, served: str | None):
    account = Account(**{state: [TaskError("SageMaker.AmazonSageMakerException", message)]})
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": served} if served else None
    machine, last, _ = walk({}, account=account)
    assert last == "Done"
    assert machine.visited.count("WaitForOthers") == 1
    assert machine.visited.count(state) == 2


def test_a_model_that_another_execution_has_deployed_is_not_taken_back():
    """Ours was wrong, but theirs serves by now."""
    account = Account(SmokeTest=TaskError("SmokeTestError", "wrong."))
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    account.faults["CheckCurrent"] = {"EndpointStatus": "Updating", "EndpointConfigName": "dogs-dev-theirs"}
    machine, last, output = walk({}, account=account)
    assert last == "Failed"
    assert not {"RestorePrevious", "RemoveEndpoint"} & set(machine.visited)
    assert (
        "failed in SmokeTest (EndpointOvertaken): wrong. Another execution deployed meanwhile: the endpoint is Updating"
        in output["Cause"]
    )
    assert "was taken back" not in output["Cause"]


def test_who_was_overtaken_while_waiting_is_told_how_to_serve_his_model():
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    theirs = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-theirs"}
    account.faults["CheckEndpoint"] = account.faults["CheckCurrent"] = theirs
    machine, last, output = walk({}, account=account)
    assert last == "Failed"
    assert not {"RestorePrevious", "RemoveEndpoint"} & set(machine.visited)
    package = "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/1"
    said = (
        "Another execution deployed meanwhile: the endpoint is InService with dogs-dev-theirs. "
        f"The model of this run is {package}. To serve that one, start"
    )
    assert (
        "failed in Deploy (EndpointOvertaken): Endpoint dogs-dev is InService with configuration dogs-dev-theirs" in output["Cause"]
    )
    assert said in output["Cause"]
    assert "FailureReason" not in output["Cause"]


def test_who_was_overtaken_after_the_smoke_test_does_not_overwrite_the_champion():
    """Nor does CleanUp take the configuration to which the other execution's failure would lead back."""
    theirs = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-theirs"}
    machine, last, output = walk({}, account=Account(CheckServed=[theirs]))
    assert last == "Failed"
    assert not {"WriteChampion", "RestorePrevious", "RemoveEndpoint"} & set(machine.visited)
    said = (
        "failed in WriteChampion (EndpointOvertaken): The smoke test passed. Another execution deployed meanwhile: the endpoint is "
    )
    assert f"{said}InService with dogs-dev-theirs." in output["Cause"]
    assert "was removed" not in output["Cause"]
    given, made = machine.requests["CleanUp"]["Payload"], machine.requests["CreateEndpointConfig"]
    assert given["endpoint_config"] == made["EndpointConfigName"]
    assert given["model"] == machine.requests["CreateModel"]["ModelName"]


def test_a_champion_outlives_its_own_tidying_up():
    machine, last, _ = walk({})
    assert last == "Done"
    given = machine.requests["TidyUp"]["Payload"]
    assert given["endpoint_config"] == machine.requests["CreateEndpointConfig"]["EndpointConfigName"]
    assert given["model"] == machine.requests["CreateModel"]["ModelName"]


@pytest.mark.parametrize("state", ["SmokeTest", "WriteChampion", "CreateEndpoint"])
def test_a_run_that_failed_keeps_nothing_of_its_own(state: str):
    machine, last, _ = walk({}, account=Account(**{state: TaskError("States.TaskFailed", "no.")}))
    assert last == "Failed"
    assert (machine.requests["CleanUp"]["Payload"]["endpoint_config"], machine.requests["CleanUp"]["Payload"]["model"]) == ("", "")


def test_a_rollback_that_sagemaker_begins_at_the_deadline_is_waited_for():
    """A deployment that is too slow: its configuration is not removed while SageMaker still goes back."""
    old = {"EndpointConfigName": "dogs-dev-old"}
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", **old}
    rolling, back = {"EndpointStatus": "RollingBack", **old}, {"EndpointStatus": "InService", **old, "FailureReason": "Too slow."}
    account.faults["CheckEndpoint"] = [{"EndpointStatus": "Updating", **old}] * 29 + [rolling] * 5 + [back]
    account.faults["CheckCurrent"] = back
    machine, last, output = walk({}, account=account, poll_seconds=60)
    assert last == "Failed"
    assert machine.visited.count("CheckEndpoint") == 35
    assert "is InService with configuration dogs-dev-old" in output["Cause"]
    assert "Too slow." in output["Cause"]
    assert "a model that served before still does" in output["Cause"]


def test_an_endpoint_that_is_still_in_motion_is_said_to_be():
    moving = {"EndpointStatus": "RollingBack", "EndpointConfigName": "dogs-dev-old"}
    account = Account(CheckEndpoint=[moving] * 1000, CheckCurrent=moving)
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    machine, last, output = walk({}, account=account, poll_seconds=60)
    assert last == "Failed"
    assert machine.visited.count("CheckEndpoint") == 40  # the deadline's 30, and 10 minutes
    assert "Endpoint dogs-dev is still RollingBack, and nothing that it may need was removed." in output["Cause"]


def test_an_endpoint_that_never_settles_ends_at_the_deadline():
    moving = {"EndpointStatus": "Creating", "EndpointConfigName": "x"}
    account = Account(CheckEndpoint=[moving] * 1000)
    _, last, output = walk({}, account=account, poll_seconds=60)
    assert last == "Failed"
    assert "is Creating" in output["Cause"]
    assert "1800 s. The endpoint's" in output["Cause"]


def test_a_failed_smoke_test_brings_the_previous_configuration_back():
    account = Account(SmokeTest=TaskError("WrongAnswers", '{"errorMessage": "3 of 4 pictures were wrong", "errorType": "x"}'))
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "older"}
    machine, last, output = walk({}, account=account)
    assert last == "Failed"
    assert account.endpoint["EndpointConfigName"] == "older"
    assert machine.requests["CreateModel"]["ModelName"].startswith(f"dogs-dev-{machine.requests['CleanUp']['Payload']['run']}")
    assert "3 of 4 pictures were wrong" in output["Cause"]


def test_a_first_deployment_that_fails_leaves_no_endpoint():
    account = Account(SmokeTest=TaskError("WrongAnswers", "wrong"))
    _, last, _ = walk({}, account=account)
    assert last == "Failed"
    assert account.endpoint is None


def test_a_message_that_cannot_be_sent_does_not_undo_a_deployment():
    _, last, _ = walk({}, account=Account(Publish=TaskError("SNS.AuthorizationErrorException", "no")))
    assert last == "Done"


def test_a_package_is_deployed_without_training():
    package = {
        "ModelPackageArn": "arn:aws:sagemaker:us-east-1:000000000000:model-package/dogs-dev/3",
        "ModelApprovalStatus": "Approved",
        "InferenceSpecification": {"Containers": [{"Image": "image:tag", "ModelDataUrl": "s3://b/models/old/model.tar.gz"}]},
        "CustomerMetadataProperties": {
            "labels_uri": "s3://b/labels.json",
            "smoke_uri": "s3://b/smoke/",
            "run": "old",
            "top1": "0.91",
            "dataset_hash": "abc",
        },
    }
    given = {"action": "deploy", "model_package": package["ModelPackageArn"]}
    machine, last, output = walk(given, account=Account(ReadPackage=package))
    assert last == "Done"
    assert "PrepareData" not in machine.visited
    assert output["test_top1"] == 0.91
    assert output["tuning_job"] is None
    assert machine.requests["WriteChampion"]["Body"]["run"] == "old"


# --- the definition itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dev", "prod", "local"])
def test_every_task_has_a_limit_retries_and_a_way_out(stage: str):
    states = definition(config(stage))["States"]
    for name, state in states.items():
        if state["Type"] != "Task":
            continue
        assert state["TimeoutSeconds"] > 0, name
        assert state["Retry"], name
        assert all(retry["JitterStrategy"] == "FULL" for retry in state["Retry"]), name
        assert any("States.ALL" in catch["ErrorEquals"] for catch in state["Catch"]), name


@pytest.mark.parametrize("stage", ["dev", "prod", "local"])
def test_every_state_can_be_reached(stage: str):
    machine = definition(config(stage))
    text = json.dumps(machine)
    for name in machine["States"]:
        assert name == machine["StartAt"] or f'"{name}"' in text.replace(f'"{name}": {{', ""), name
    assert hashlib.sha256(text.encode()).hexdigest() == hashlib.sha256(json.dumps(definition(config(stage))).encode()).hexdigest()


# --- a real-time endpoint --------------------------------------------------------------------------------------------------

REALTIME = {"mode": "realtime", "min_instances": 2, "max_instances": 4, "update": "canary", "canary_percent": 50, "bake_s": 60}


def test_a_new_model_takes_over_behind_alarms_and_is_scaled_again():
    account = Account()
    account.endpoint = {
        "EndpointStatus": "InService",
        "EndpointConfigName": "dogs-dev-old",
        "ProductionVariants": [{"VariantName": "main", "DesiredInstanceCount": 3}],
    }
    machine, last, _ = walk({}, account=account, endpoint=REALTIME)
    assert last == "Done"
    named = ["UpdateEndpoint", "ScaleEndpoint", "FollowLoad", "SmokeTest"]
    assert [name for name in machine.visited if name in named] == named
    assert "StopScaling" not in machine.visited  # a model that is taken back leaves the old one scaled
    update = machine.requests["UpdateEndpoint"]
    routing = update["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
    assert routing == {
        "Type": "CANARY",
        "WaitIntervalInSeconds": 60,
        "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 50},
    }
    alarms = [alarm["AlarmName"] for alarm in update["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"]]
    assert alarms == ["dogs-dev-rollback-errors", "dogs-dev-rollback-latency", "dogs-dev-rollback-invalid"]
    assert update["RetainAllVariantProperties"] is True  # three machines, as the load had made them
    assert machine.requests["ScaleEndpoint"]["ResourceId"] == "endpoint/dogs-dev/variant/main"
    assert (machine.requests["ScaleEndpoint"]["MinCapacity"], machine.requests["ScaleEndpoint"]["MaxCapacity"]) == (2, 4)
    assert _problems("RegisterScalableTarget", machine.requests["ScaleEndpoint"], "application-autoscaling") == []
    assert _problems("PutScalingPolicy", machine.requests["FollowLoad"], "application-autoscaling") == []
    assert _problems("UpdateEndpoint", update) == []


@pytest.mark.parametrize(
    "answer", [{}, TaskError("ApplicationAutoScaling.ObjectNotFoundException", "No scalable target registered")]
)
def test_without_scaling_an_earlier_one_ends_before_the_update(answer: Any):
    account = Account(StopScaling=answer or None)
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    machine, last, _ = walk({}, account=account, endpoint={**REALTIME, "max_instances": 2})
    assert last == "Done"
    assert machine.visited.index("StopScaling") < machine.visited.index("UpdateEndpoint")
    assert "RetainAllVariantProperties" not in machine.requests["UpdateEndpoint"]  # min_instances may have changed
    assert not {"ScaleEndpoint", "FollowLoad"} & set(machine.visited)
    assert _problems("DeregisterScalableTarget", machine.requests["StopScaling"], "application-autoscaling") == []


def test_a_rolling_update_replaces_a_share_of_the_machines():
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    machine, _, _ = walk({}, account=account, endpoint={**REALTIME, "update": "rolling"})
    update = machine.requests["UpdateEndpoint"]
    assert update["DeploymentConfig"]["RollingUpdatePolicy"]["MaximumBatchSize"] == {"Type": "CAPACITY_PERCENT", "Value": 50}
    assert _problems("UpdateEndpoint", update) == []


def test_a_model_that_sagemaker_took_back_is_a_failure_and_the_champion_stays():
    account = Account()
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    back = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old", "FailureReason": "Alarm dogs-dev-rollback-errors"}
    account.faults["CheckEndpoint"] = [{"EndpointStatus": "Updating", "EndpointConfigName": "dogs-dev-old"}, back]
    account.faults["CheckCurrent"] = back
    machine, last, cause = walk({}, account=account, endpoint=REALTIME)
    assert last == "Failed"
    assert "dogs-dev-rollback-errors" in str(cause)
    assert "WriteChampion" not in machine.visited
    assert "RestorePrevious" not in machine.visited  # it serves already


def test_without_scaling_a_deployment_is_not_what_was_asked_for():
    account = Account(FollowLoad=TaskError("ApplicationAutoScaling.LimitExceededException", "too many policies"))
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    machine, last, cause = walk({}, account=account, endpoint=REALTIME)
    assert last == "Failed"
    assert "too many policies" in str(cause)
    restored = machine.requests["RestorePrevious"]
    assert restored["EndpointConfigName"] == "dogs-dev-old"
    # What rings because of the model that goes must not bring it back.
    assert "AutoRollbackConfiguration" not in restored["DeploymentConfig"]
    assert restored["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["Type"] == "ALL_AT_ONCE"
    assert _problems("UpdateEndpoint", restored) == []


def test_a_restoration_that_fails_is_said():
    account = Account(SmokeTest=TaskError("SmokeTestError", "wrong labels."))
    account.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": "dogs-dev-old"}
    account.faults["CheckRestore"] = {
        "EndpointStatus": "InService",
        "EndpointConfigName": "dogs-dev-new",
        "FailureReason": "no machine",
    }
    _, last, cause = walk({}, account=account, endpoint=REALTIME)
    assert last == "Failed"
    assert "wrong labels. The previous configuration dogs-dev-old did not come back" in str(cause)
    assert "no machine" in str(cause)


# --- batch -----------------------------------------------------------------------------------------------------------------


def test_a_prefix_is_classified_by_the_champion_and_nothing_is_deployed():
    machine, last, output = walk({"action": "batch", "input": "incoming/new/"}, batch_instances=3)
    assert last == "BatchDone"
    assert output["predictions_uri"] == f"s3://{BUCKET}/runs/run-1/batch/"
    request = machine.requests["ClassifyBatch"]
    inputs = {one["InputName"]: one["S3Input"] for one in request["ProcessingInputs"]}
    assert inputs["pictures"]["S3Uri"] == f"s3://{BUCKET}/incoming/new/"
    assert inputs["pictures"]["S3DataDistributionType"] == "ShardedByS3Key"
    assert inputs["model"]["S3Uri"] == f"s3://{BUCKET}/models/old/model.tar.gz"
    assert request["ProcessingResources"]["ClusterConfig"]["InstanceCount"] == 3
    assert not {"CreateModel", "UpdateEndpoint", "WriteChampion"} & set(machine.visited)
    assert _problems("CreateProcessingJob", request) == []


def test_a_named_package_classifies_instead():
    package = {
        "ModelPackageArn": PACKAGE,
        "InferenceSpecification": {"Containers": [{"ModelDataUrl": f"s3://{BUCKET}/models/x/model.tar.gz", "Image": "i"}]},
        "CustomerMetadataProperties": {"labels_uri": "l", "smoke_uri": "s", "run": "x", "top1": "0.8", "dataset_hash": "h"},
    }
    given = {"action": "batch", "input": f"s3://{BUCKET}/incoming/new/", "model_package": PACKAGE}
    machine, last, output = walk(given, account=Account(ReadPackage=package))
    assert (last, output["test_top1"]) == ("BatchDone", 0.8)
    assert "ReadChampion" not in machine.visited


def test_batch_before_any_model_says_what_to_do():
    _, last, cause = walk(
        {"action": "batch", "input": "incoming/new/"}, account=Account(ReadChampion=TaskError("S3.NoSuchKeyException", "no key"))
    )
    assert last == "Failed"
    assert "No model is deployed yet" in str(cause)


@pytest.mark.parametrize("given", ["", "datasets/x/", "s3://foreign/x/", "https://example.com/x.zip", 3])
def test_batch_reads_only_where_pictures_are_put(given: Any):
    _, last, cause = walk({"action": "batch", "input": given})
    assert last == "InvalidInput"
    assert "input is" in str(cause)
