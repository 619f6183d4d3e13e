"""Tuning jobs of the local SageMaker: strategies, counters, failures, early stopping, stop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from local_fakes import BUCKET, IMAGE, ROLE, Client, FakeCloud, moto_cloud, wait

from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.sagemaker.ranges import dimensions
from local_cloud.sagemaker.tuning import Search, check_request, worse_than_median
from local_cloud.sagemaker.warm_start import check as check_warm_start
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
    assert end["TrainingJobStatusCounters"]["RetryableError"] == 0
    assert end["ObjectiveStatusCounters"] == {"Succeeded": 2, "Pending": 0, "Failed": 1}
    assert end["BestTrainingJob"]["TunedHyperParameters"] == {"kind": "c"}
    listing = {"HyperParameterTuningJobName": "some", "StatusEquals": "Failed", "MaxResults": 1, "SortBy": "CreationTime"}
    (failed,) = call("ListTrainingJobsForHyperParameterTuningJob", **listing)["TrainingJobSummaries"]
    assert failed["FailureReason"] == "AlgorithmError: , exit code: 1"
    assert failed["ObjectiveStatus"] == "Failed"
    by_name = call("ListTrainingJobsForHyperParameterTuningJob", HyperParameterTuningJobName="some")["TrainingJobSummaries"]
    assert [item["TrainingJobName"].split("-")[1] for item in by_name] == ["001", "002", "003"]
    scored = {"HyperParameterTuningJobName": "some", "SortBy": "FinalObjectiveMetricValue"}
    ranked = call("ListTrainingJobsForHyperParameterTuningJob", **scored)["TrainingJobSummaries"]
    assert [item["TunedHyperParameters"]["kind"] for item in ranked] == ["a", "c"], "AWS leaves out trials without an objective"


def test_an_error_of_the_service_counts_as_one_that_may_be_tried_again(call: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from local_cloud.sagemaker.jobs import TrainingJob

    def broken(*_: Any) -> Any:
        raise RuntimeError("disk full")

    monkeypatch.setattr(TrainingJob, "command", broken)
    call("CreateHyperParameterTuningJob", **tuning("broken"))
    end = finish(call, "broken")
    counters = end["TrainingJobStatusCounters"]
    assert (counters["RetryableError"], counters["NonRetryableError"]) == (3, 0)
    assert end["HyperParameterTuningJobStatus"] == "Failed"


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
        ({"StrategyConfig": {"HyperbandStrategyConfig": {"MinResource": 1}}}, "belongs to the Hyperband strategy, not to Grid"),
        (
            {"Strategy": "Hyperband", "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 1}},
            "MaxResource of HyperbandStrategyConfig is missing",
        ),
        (
            {
                "Strategy": "Hyperband",
                "StrategyConfig": {"HyperbandStrategyConfig": {"MinResource": 5, "MaxResource": 4}},
                "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 1},
            },
            "MinResource=5 is more than MaxResource=4",
        ),
        (
            {"Strategy": "Random", "ResourceLimits": {"MaxNumberOfTrainingJobs": 2, "MaxParallelTrainingJobs": 3}},
            "MaxParallelTrainingJobs=3 is more than MaxNumberOfTrainingJobs=2",
        ),
        (
            {"ParameterRanges": {"CategoricalParameterRanges": [{"Name": "x", "Values": ["1"]}, {"Name": "x", "Values": ["2"]}]}},
            "'x' has two ranges",
        ),
        ({"ParameterRanges": {"CategoricalParameterRanges": [{"Name": "fixed", "Values": ["1"]}]}}, "both static and tunable"),
        (
            {
                "Strategy": "Random",
                "ParameterRanges": {"IntegerParameterRanges": [{"Name": "x", "MinValue": "1", "MaxValue": "2.5"}]},
            },
            "give whole numbers",
        ),
        (
            {
                "Strategy": "Random",
                "ParameterRanges": {
                    "ContinuousParameterRanges": [
                        {"Name": "x", "MinValue": "0.5", "MaxValue": "1", "ScalingType": "ReverseLogarithmic"}
                    ]
                },
            },
            "MaxValue < 1",
        ),
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
        call("CreateHyperParameterTuningJob", **tuning("refused", static={"fixed": "1"}, **change))
    assert refusal.value.code == "ValidationException"
    assert named in refusal.value.message


def test_hyperband_needs_early_stopping_off_and_a_missing_job_is_not_found(call: Client) -> None:
    limits = {"MaxNumberOfTrainingJobs": 3, "MaxParallelTrainingJobs": 1}
    with pytest.raises(ServiceError, match="Hyperband"):
        check_request(tuning("h", "Hyperband", ResourceLimits=limits, TrainingJobEarlyStoppingType="Auto"))
    with pytest.raises(ServiceError) as missing:
        call("DescribeHyperParameterTuningJob", HyperParameterTuningJobName="nowhere")
    assert missing.value.code == "ResourceNotFound"
    call("CreateHyperParameterTuningJob", **tuning("band", "Hyperband", {"epochs": "2"}, ResourceLimits=limits))
    assert finish(call, "band")["HyperParameterTuningJobStatus"] == "Completed"


def test_a_hyperband_trial_does_not_outlive_its_resource(call: Client) -> None:
    """The script reports two values; a trial may use one, and would sleep on."""
    chosen = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": 1}}
    limits = {"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 1}
    request = tuning("spent", "Hyperband", {"sleep": "100"}, StrategyConfig=chosen, ResourceLimits=limits)
    call("CreateHyperParameterTuningJob", **request)
    end = finish(call, "spent")
    assert end["TrainingJobStatusCounters"]["Stopped"] == 1
    assert end["HyperParameterTuningJobStatus"] == "Completed"


def test_waiting_for_spot_capacity_is_checked_as_on_aws(call: Client) -> None:
    request = tuning("waits")
    request["TrainingJobDefinition"]["StoppingCondition"]["MaxWaitTimeInSeconds"] = 120
    with pytest.raises(ServiceError, match="only supported when EnableManagedSpotTraining is set to true"):
        call("CreateHyperParameterTuningJob", **request)
    request["TrainingJobDefinition"]["EnableManagedSpotTraining"] = True
    request["TrainingJobDefinition"]["StoppingCondition"]["MaxWaitTimeInSeconds"] = 30
    with pytest.raises(ServiceError, match="MaxWaitTimeInSeconds is 30 with managed spot training; expected at least"):
        call("CreateHyperParameterTuningJob", **request)


def test_a_seed_repeats_a_job(call: Client) -> None:
    def proposals(name: str, seed: int) -> list[str]:
        limits = {"MaxNumberOfTrainingJobs": 6, "MaxParallelTrainingJobs": 1}
        call("CreateHyperParameterTuningJob", **tuning(name, "Random", ResourceLimits=limits, RandomSeed=seed))
        assert finish(call, name)["HyperParameterTuningJobStatus"] == "Completed"
        found = call("ListTrainingJobsForHyperParameterTuningJob", HyperParameterTuningJobName=name)["TrainingJobSummaries"]
        return [item["TunedHyperParameters"]["kind"] for item in found]

    assert proposals("seed-1", 11) == proposals("seed-2", 11) != proposals("seed-3", 12)


RESUMED = """
import json, os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
kind = json.loads((base / "input/config/hyperparameters.json").read_text())["kind"]
here = base / "checkpoints" / "kind"
before = here.read_text() if here.exists() else ""
here.write_text(kind)
print(f"score={'0.5' if before == kind else '0.1'}", flush=True)
if not before: time.sleep(60)
"""


def test_interrupted_trials_resume_from_their_own_checkpoints(cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    from local_cloud.sagemaker.jobs import TrainingJob

    monkeypatch.setattr(TrainingJob, "command", lambda *_: ["python", "-c", RESUMED])
    service = SageMaker(cloud, Images(cloud), Settings(grace=0.5, interrupt_after=1.0))
    try:
        call = Client(service)
        request = tuning("scarce")
        request["TrainingJobDefinition"] |= {
            "EnableManagedSpotTraining": True,
            "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/scarce/tuning"},
            "StoppingCondition": {"MaxRuntimeInSeconds": 30, "MaxWaitTimeInSeconds": 60},
        }
        call("CreateHyperParameterTuningJob", **request)
        end = finish(call, "scarce")
        found = call("ListTrainingJobsForHyperParameterTuningJob", HyperParameterTuningJobName="scarce")["TrainingJobSummaries"]
    finally:
        service.stop()
    assert end["TrainingJobStatusCounters"]["Completed"] == 3
    assert [item["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] for item in found] == [0.5, 0.5, 0.5]
    kept = {item["TrainingJobName"]: item["TunedHyperParameters"]["kind"].encode() for item in found}
    assert {name: cloud.get(f"scarce/tuning/{name}/kind") for name in kept} == kept


# --- warm start --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(call: Client) -> str:
    """A finished search over a, b and c, of which b was best."""
    call("CreateHyperParameterTuningJob", **tuning("parent", static={"epochs": "1"}))
    assert finish(call, "parent")["HyperParameterTuningJobStatus"] == "Completed"
    return "parent"


@pytest.fixture(scope="module", autouse=True)
def direct_for_the_parent() -> Iterator[None]:
    """As ``direct``, for what is made once for all tests."""
    from local_cloud.sagemaker.jobs import TrainingJob

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingJob, "command", lambda *_: ["python", "-c", SCRIPT])
        yield


def warm(name: str, *parents: str, kind: str = "TransferLearning", **change: Any) -> dict[str, Any]:
    """A search that starts from earlier ones; ``change`` as in ``tuning``."""
    limits = {"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 1}
    ranges = {"CategoricalParameterRanges": [{"Name": "kind", "Values": ["a", "c"]}]}
    values: dict[str, Any] = {"static": {"epochs": "1"}, "ResourceLimits": limits, "ParameterRanges": ranges} | change
    request = tuning(name, values.pop("strategy", "Random"), values.pop("static"), **values)
    names = [{"HyperParameterTuningJobName": parent} for parent in parents]
    request["WarmStartConfig"] = {"ParentHyperParameterTuningJobs": names, "WarmStartType": kind}
    return request


def test_the_overall_best_trial_may_be_a_parents(call: Client, parent: str) -> None:
    request = warm("child", parent, kind="IdenticalDataAndAlgorithm")
    call("CreateHyperParameterTuningJob", **request)
    end = finish(call, "child")
    assert end["HyperParameterTuningJobStatus"] == "Completed"
    assert end["WarmStartConfig"] == request["WarmStartConfig"]
    assert end["BestTrainingJob"]["TunedHyperParameters"]["kind"] in ("a", "c")
    assert end["OverallBestTrainingJob"]["TunedHyperParameters"] == {"kind": "b"}
    assert end["OverallBestTrainingJob"]["TuningJobName"] == parent
    assert sum(end["TrainingJobStatusCounters"].values()) == 1, "the parents' trials are not counted again"


def test_with_other_data_an_earlier_score_is_no_best_one(call: Client, parent: str) -> None:
    call("CreateHyperParameterTuningJob", **warm("other-data", parent))
    assert "OverallBestTrainingJob" not in finish(call, "other-data")


def test_a_parent_that_runs_must_end_first(call: Client) -> None:
    call("CreateHyperParameterTuningJob", **tuning("running", static={"sleep": "100"}))
    try:
        with pytest.raises(ServiceError, match="'running' is InProgress; expected one of Completed, Stopped, Failed"):
            call("CreateHyperParameterTuningJob", **warm("early-bird", "running", static={"sleep": "1"}))
    finally:
        call("StopHyperParameterTuningJob", HyperParameterTuningJobName="running")
    assert finish(call, "running")["HyperParameterTuningJobStatus"] == "Stopped"
    call("CreateHyperParameterTuningJob", **warm("after-stop", "running", static={"sleep": "0"}))
    assert finish(call, "after-stop")["HyperParameterTuningJobStatus"] == "Completed"


INTEGER = {"IntegerParameterRanges": [{"Name": "kind", "MinValue": "1", "MaxValue": "3"}]}
EPOCHS = [{"Name": "epochs", "Values": ["1", "2"]}, {"Name": "kind", "Values": ["a"]}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parents": ("nowhere",)}, "Parent tuning job 'nowhere' does not exist"),
        ({"parents": ("parent", "parent")}, "'parent' twice"),
        ({"strategy": "Hyperband"}, "expected Bayesian or Random"),
        ({"static": {}}, "only in the parent: epochs"),
        ({"static": {"epochs": "1", "momentum": "0.9"}}, "only here: momentum"),
        ({"ParameterRanges": INTEGER}, "'kind' is integer; expected categorical"),
        ({"HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "score"}}, "expected Maximize score"),
        ({"ResourceLimits": {"MaxNumberOfTrainingJobs": 748, "MaxParallelTrainingJobs": 1}}, "the parents' 3 training jobs"),
    ],
)
def test_warm_starts_that_sagemaker_refuses(call: Client, parent: str, change: dict[str, Any], named: str) -> None:
    change = dict(change)
    if change.get("strategy") == "Hyperband":
        change["StrategyConfig"] = {"HyperbandStrategyConfig": {"MaxResource": 3}}
    with pytest.raises(ServiceError) as refusal:
        call("CreateHyperParameterTuningJob", **warm("refused", *change.pop("parents", (parent,)), **change))
    assert refusal.value.code == "ValidationException"
    assert named in refusal.value.message


def test_what_was_static_may_be_searched_and_the_reverse(call: Client, parent: str) -> None:
    request = warm("swapped", parent, static={}, ParameterRanges={"CategoricalParameterRanges": EPOCHS})
    call("CreateHyperParameterTuningJob", **request)
    assert finish(call, "swapped")["HyperParameterTuningJobStatus"] == "Completed"


def test_only_some_fields_may_change_and_identical_means_the_same_image(call: Client, parent: str) -> None:
    request = warm("changed", parent)
    request["TrainingJobDefinition"]["Environment"] = {"A": "b"}
    with pytest.raises(
        ServiceError, match=r"Only the following fields in TrainingJobDefinition are allowed to change: \[algorithm"
    ):
        call("CreateHyperParameterTuningJob", **request)
    request = warm("changed", parent, kind="IdenticalDataAndAlgorithm")
    request["TrainingJobDefinition"]["AlgorithmSpecification"]["TrainingImage"] = IMAGE.replace("2.13", "2.14")
    with pytest.raises(ServiceError, match="that of the parent tuning job, with the warm start type IdenticalDataAndAlgorithm"):
        call("CreateHyperParameterTuningJob", **request)


def test_too_many_static_values_may_not_change() -> None:
    def record(**static: str) -> dict[str, Any]:
        request = warm("x", "parent", static=static)
        return {**request, "HyperParameterTuningJobStatus": "Completed"}

    many = {f"p{number}": "1" for number in range(6)}
    check_warm_start(record(**many), [record(**many | {"p0": "2"})])
    check_warm_start(record(**many), [record(**many | {f"p{number}": "2" for number in range(5)})])
    with pytest.raises(ServiceError, match="12 changes of static hyperparameters"):
        check_warm_start(record(**many), [record(**dict.fromkeys(many, "2"))])


SPACE = {
    "ContinuousParameterRanges": [
        {"Name": "lr", "MinValue": "0.001", "MaxValue": "1", "ScalingType": "Logarithmic"},
        {"Name": "momentum", "MinValue": "0.5", "MaxValue": "0.999", "ScalingType": "ReverseLogarithmic"},
    ],
    "IntegerParameterRanges": [{"Name": "depth", "MinValue": "1", "MaxValue": "8"}],
    "CategoricalParameterRanges": [{"Name": "batch", "Values": ["64", "128"]}],
}


def bayesian(past: Sequence[tuple[dict[str, str], float]], ranges: dict[str, Any], seed: int = 3) -> Search:
    config = {
        "Strategy": "Bayesian",
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 12},
        "HyperParameterTuningJobObjective": {"Type": "Maximize"},
        "ParameterRanges": ranges,
    }
    return Search(config, seed, past)


def test_past_trials_steer_the_search() -> None:
    """Where good learning rates lie is known from 20 past trials: the first proposals are nearer to them than a fresh search's."""
    rates = [10 ** (-3 + 3 * step / 19) for step in range(20)]
    only_rate = {"ContinuousParameterRanges": SPACE["ContinuousParameterRanges"][:1]}
    past = [({"lr": repr(rate), "unused": "1"}, -abs(math.log10(rate / 0.1))) for rate in rates]

    def distance(known: list[tuple[dict[str, str], float]]) -> float:
        found = []
        for seed in range(4):
            search = bayesian(known, only_rate, seed)
            found += [abs(math.log10(float(search.ask()[1]["lr"]) / 0.1)) for _ in range(3)]
        return sum(found) / len(found)

    assert distance(past) < distance([]) / 2


def test_past_trials_outside_the_new_ranges_are_left_out() -> None:
    inside = {"lr": "0.1", "momentum": "0.9", "depth": "3", "batch": "64", "epochs": "1"}
    past = [
        (inside, 0.5),
        *(({**inside, **change}, 0.9) for change in ({"lr": "5"}, {"momentum": "0.1"}, {"depth": "9"}, {"batch": "32"})),
        *(({**inside, **change}, 0.9) for change in ({"depth": "2.5"}, {"lr": "fast"})),
        ({"lr": "0.1"}, 0.9),
    ]
    (known,) = bayesian(past, SPACE).study.trials[:1]
    assert len([trial for trial in bayesian(past, SPACE).study.trials if trial.value is not None]) == 1
    assert known.value == 0.5
    assert known.params == {"lr": 0.1, "momentum": pytest.approx(0.1), "depth": 3, "batch": "64"}


def test_a_seed_repeats_the_search_with_its_past() -> None:
    past = [({"lr": "0.1", "momentum": "0.9", "depth": "3", "batch": "64"}, 0.5)]

    def draw(seed: int) -> list[dict[str, str]]:
        search, found = bayesian(past, SPACE, seed), []
        for _ in range(12):
            trial, values = search.ask()
            search.tell(trial, float(values["lr"]))
            found.append(values)
        return found

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize(
    ("scaling", "logarithmic"),
    [("Linear", False), ("Logarithmic", True), ("Auto", True), (None, True)],
)
@pytest.mark.parametrize("kind", ["Continuous", "Integer"])
def test_scales_reach_the_search(kind: str, scaling: str | None, logarithmic: bool) -> None:
    item = {"Name": "x", "MinValue": "1", "MaxValue": "1000", **({"ScalingType": scaling} if scaling else {})}
    (space,) = dimensions({f"{kind}ParameterRanges": [item]})
    assert space.distribution.log is logarithmic
    assert space.at(0.5) == pytest.approx(10**1.5 if logarithmic else 500.5, rel=0.02)
    narrow = {**item, "MaxValue": "5"}
    if scaling == "Auto":
        assert not dimensions({f"{kind}ParameterRanges": [narrow]})[0].distribution.log


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
