"""Tuning jobs of the local SageMaker: strategies, counters, failures, early stopping, stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from local_fakes import BUCKET, IMAGE, ROLE, Client, FakeCloud, moto_cloud, wait

from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.sagemaker.tuning import Search, check_ranges, worse_than_median
from local_cloud.service import ServiceError

BUSY = ("InProgress", "Stopping")
SCRIPT = """
import json, os, sys, time
h = json.load(open(os.environ["SAGEMAKER_BASE_DIR"] + "/input/config/hyperparameters.json"))
score = {"a": 0.1, "b": 0.9, "c": 0.5}[h["kind"]]
if h["kind"] in h.get("failing", ""): sys.exit(1)
print("score=0.0"); print(f"score={score}", flush=True)
if h.get("sleep"): time.sleep(float(h["sleep"]))
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with moto_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def call(cloud: FakeCloud) -> Iterator[Client]:
    service = SageMaker(cloud, Images(cloud), Settings(grace=0.5))
    yield Client(service)
    service.stop()


def tuning(name: str, strategy: str = "Grid", static: dict[str, str] | None = None, **config: Any) -> dict[str, Any]:
    # The script is run directly: the training toolkit is tested with the jobs, and costs a second for each trial.
    arguments = {
        "TrainingImage": IMAGE,
        "TrainingInputMode": "File",
        "MetricDefinitions": [{"Name": "score", "Regex": "score=([0-9.]+)"}],
    }
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": strategy,
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "score"},
            "ResourceLimits": {"MaxParallelTrainingJobs": 2},
            "ParameterRanges": {"CategoricalParameterRanges": [{"Name": "kind", "Values": ["a", "b", "c"]}]},
            **config,
        },
        "TrainingJobDefinition": {
            "AlgorithmSpecification": arguments,
            "RoleArn": ROLE,
            "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/tuning"},
            "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 5},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60},
            "StaticHyperParameters": static or {},
        },
    }


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    from local_cloud.sagemaker.jobs import TrainingJob

    monkeypatch.setattr(TrainingJob, "command", lambda *_: ["python", "-c", SCRIPT])


def finish(call: Client, name: str) -> dict[str, Any]:
    return wait(
        lambda: call("DescribeHyperParameterTuningJob", HyperParameterTuningJobName=name), "HyperParameterTuningJobStatus", BUSY
    )


def test_grid_tries_every_category_and_finds_the_best(call: Client) -> None:
    call("CreateHyperParameterTuningJob", **tuning("grid", static={"epochs": "1"}))
    end = finish(call, "grid")
    assert end["HyperParameterTuningJobStatus"] == "Completed"
    assert end["TrainingJobStatusCounters"] == {
        "Completed": 3,
        "InProgress": 0,
        "RetryableError": 0,
        "NonRetryableError": 0,
        "Stopped": 0,
    }
    assert end["ObjectiveStatusCounters"] == {"Succeeded": 3, "Pending": 0, "Failed": 0}
    best = end["BestTrainingJob"]
    assert best["TunedHyperParameters"] == {"kind": "b"}
    assert best["FinalHyperParameterTuningJobObjectiveMetric"] == {"Type": "Maximize", "MetricName": "score", "Value": 0.9}
    listed = call(
        "ListTrainingJobsForHyperParameterTuningJob",
        HyperParameterTuningJobName="grid",
        SortBy="FinalObjectiveMetricValue",
        SortOrder="Descending",
    )["TrainingJobSummaries"]
    assert [item["TunedHyperParameters"]["kind"] for item in listed] == ["b", "c", "a"]
    child = call("DescribeTrainingJob", TrainingJobName=best["TrainingJobName"])
    assert child["TuningJobArn"] == end["HyperParameterTuningJobArn"]
    assert child["HyperParameters"] == {"epochs": "1", "kind": "b", "_tuning_objective_metric": "score"}
    numbers = sorted(item["TrainingJobName"].split("-")[1] for item in listed)
    assert numbers == ["001", "002", "003"]
    assert call("ListHyperParameterTuningJobs")["HyperParameterTuningJobSummaries"][0]["Strategy"] == "Grid"


def test_a_failed_trial_is_counted_and_the_rest_goes_on(call: Client) -> None:
    call("CreateHyperParameterTuningJob", **tuning("some", static={"failing": "b"}))
    end = finish(call, "some")
    assert end["HyperParameterTuningJobStatus"] == "Completed"
    assert end["TrainingJobStatusCounters"]["NonRetryableError"] == 1
    assert end["BestTrainingJob"]["TunedHyperParameters"] == {"kind": "c"}


def test_it_fails_when_no_trial_succeeds(call: Client) -> None:
    limits = {"MaxNumberOfTrainingJobs": 20, "MaxParallelTrainingJobs": 3}
    call("CreateHyperParameterTuningJob", **tuning("none", "Random", {"failing": "abc"}, ResourceLimits=limits))
    end = finish(call, "none")
    assert end["HyperParameterTuningJobStatus"] == "Failed"
    assert end["FailureReason"].startswith("No training job succeeded after")
    assert 5 <= end["TrainingJobStatusCounters"]["NonRetryableError"] < 20
    assert "BestTrainingJob" not in end


def test_stopping_stops_the_trials(call: Client) -> None:
    call("CreateHyperParameterTuningJob", **tuning("halt", static={"sleep": "100"}))
    wait(lambda: {"n": bool(call("ListTrainingJobs", NameContains="halt")["TrainingJobSummaries"])}, "n", (False,))
    call("StopHyperParameterTuningJob", HyperParameterTuningJobName="halt")
    end = finish(call, "halt")
    assert end["HyperParameterTuningJobStatus"] == "Stopped"
    assert end["TrainingJobStatusCounters"]["InProgress"] == 0
    assert end["TrainingJobStatusCounters"]["Stopped"] >= 1


def test_early_stopping_ends_a_trial_worse_than_the_median(call: Client) -> None:
    ranges = {"CategoricalParameterRanges": [{"Name": "kind", "Values": ["b", "c", "a"]}]}
    request = tuning(
        "early", ParameterRanges=ranges, TrainingJobEarlyStoppingType="Auto", ResourceLimits={"MaxParallelTrainingJobs": 1}
    )
    request["TrainingJobDefinition"]["StaticHyperParameters"] = {"sleep": "2"}
    call("CreateHyperParameterTuningJob", **request)
    end = finish(call, "early")
    assert end["TrainingJobStatusCounters"]["Stopped"] == 1
    assert end["BestTrainingJob"]["TunedHyperParameters"] == {"kind": "b"}


def test_the_median_rule() -> None:
    previous = [[0.2, 0.4], [0.6, 0.8]]
    assert not worse_than_median([0.5, 0.5], previous, maximize=True)
    assert worse_than_median([0.5, 0.49], previous, maximize=True)
    assert worse_than_median([0.5, 0.51], previous, maximize=False)
    assert not worse_than_median([0.0], previous[:1], maximize=True)


@pytest.mark.parametrize("strategy", ["Bayesian", "Random"])
def test_ranges_scales_and_seed(strategy: str) -> None:
    config = tuning("x", strategy)["HyperParameterTuningJobConfig"]
    config["ResourceLimits"]["MaxNumberOfTrainingJobs"] = 12
    config["ParameterRanges"] = {
        "ContinuousParameterRanges": [
            {"Name": "lr", "MinValue": "0.01", "MaxValue": "0.1", "ScalingType": "Logarithmic"},
            {"Name": "momentum", "MinValue": "0.5", "MaxValue": "0.999", "ScalingType": "ReverseLogarithmic"},
        ],
        "IntegerParameterRanges": [{"Name": "depth", "MinValue": "2", "MaxValue": "8"}],
        "CategoricalParameterRanges": [{"Name": "batch", "Values": ["64", "128"]}],
    }

    def draw() -> list[dict[str, str]]:
        search = Search(config, 7)
        found = []
        for _ in range(12):
            trial, values = search.ask()
            search.tell(trial, float(values["lr"]))
            found.append(values)
        return found

    first = draw()
    assert first == draw()
    for values in first:
        assert 0.01 <= float(values["lr"]) <= 0.1
        assert 0.5 <= float(values["momentum"]) <= 0.999
        assert 2 <= int(values["depth"]) <= 8
        assert values["batch"] in ("64", "128")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ParameterRanges": {"ContinuousParameterRanges": [{"Name": "x", "MinValue": "0", "MaxValue": "1"}]}}, "categorical"),
        ({"ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 1}}, "must be 3"),
        ({"Strategy": "Random"}, "MaxNumberOfTrainingJobs is required"),
        ({"HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "other"}}, "not in MetricDefinitions"),
        ({"ParameterRanges": {}}, "at least one"),
        (
            {
                "Strategy": "Random",
                "ParameterRanges": {"IntegerParameterRanges": [{"Name": "x", "MinValue": "3", "MaxValue": "1"}]},
            },
            "is empty",
        ),
        ({"TuningJobCompletionCriteria": {"TargetObjectiveMetricValue": 0.5}}, "TuningJobCompletionCriteria"),
    ],
)
def test_wrong_configurations_are_refused(call: Client, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        call("CreateHyperParameterTuningJob", **tuning("refused", **change))
    assert refusal.value.code == "ValidationException"
    assert named in refusal.value.message


def test_hyperband_needs_early_stopping_off_and_a_missing_job_is_not_found(call: Client) -> None:
    limits = {"MaxNumberOfTrainingJobs": 3, "MaxParallelTrainingJobs": 1}
    with pytest.raises(ServiceError, match="Hyperband"):
        check_ranges(tuning("h", "Hyperband", ResourceLimits=limits, TrainingJobEarlyStoppingType="Auto"))
    with pytest.raises(ServiceError) as missing:
        call("DescribeHyperParameterTuningJob", HyperParameterTuningJobName="nowhere")
    assert missing.value.code == "ResourceNotFound"
    call("CreateHyperParameterTuningJob", **tuning("band", "Hyperband", ResourceLimits=limits))
    assert finish(call, "band")["HyperParameterTuningJobStatus"] == "Completed"


def test_the_first_trials_of_a_bayesian_search_cover_every_stratum():
    ranges = {
        "ContinuousParameterRanges": [{"Name": "lr", "MinValue": "0.01", "MaxValue": "0.1", "ScalingType": "Logarithmic"}],
        "IntegerParameterRanges": [{"Name": "layers", "MinValue": "1", "MaxValue": "9"}],
        "CategoricalParameterRanges": [{"Name": "batch_size", "Values": ["64", "128", "256"]}],
    }
    config = {
        "Strategy": "Bayesian",
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 3},
        "HyperParameterTuningJobObjective": {"Type": "Maximize"},
        "ParameterRanges": ranges,
    }
    for seed in range(5):
        search = Search(config, seed)
        values = [search.ask()[1] for _ in range(3)]
        assert {v["batch_size"] for v in values} == {"64", "128", "256"}
        thirds = {int((math.log10(float(v["lr"])) + 2) * 3) for v in values}
        assert thirds == {0, 1, 2}
        assert all(1 <= int(v["layers"]) <= 9 for v in values)
