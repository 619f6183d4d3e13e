"""From a folder of pictures to an answered POST: the whole state machine on the local cloud."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployment import typical

pytestmark = pytest.mark.pipeline

STATES = (
    "ReadInput", "PrepareData", "Tune", "Train", "Evaluate", "Report", "QualityGate", "BuildServer", "Register",
    "SmokeTest", "Publish",
)  # fmt: skip


# Order matters in this file: the first tests need a stack in which nothing has been deployed yet.
def test_a_post_before_any_model_says_what_to_do(deployed):
    status, answer = deployed.post(b"\x89PNG\r\n\x1a\n" + b"\0" * 64, **deployed.authorized)
    if status == 422:  # the picture is checked first
        status, answer = deployed.post(picture(), **deployed.authorized)
    assert status == 503
    assert answer["error"]["code"] == "no_model"
    assert "state machine" in answer["error"]["message"]


def test_an_unknown_field_of_the_input_is_refused_by_name(deployed):
    _, ended = deployed.execute({"lerning_rate": 0.1})
    assert ended["status"] == "FAILED"
    assert "lerning_rate" in ended["cause"]


def test_a_dry_run_asks_for_quotas_data_and_images_and_starts_nothing(deployed):
    import time

    sagemaker = deployed.cloud.client("sagemaker")
    # The account may hold those of another test's stack.
    refused, jobs, started_s = deployed.denied(), sagemaker.list_processing_jobs()["ProcessingJobSummaries"], time.monotonic()
    _, ended = deployed.execute({"dry_run": True, "source": "incoming/digits.zip"})
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    assert time.monotonic() - started_s < 60
    checks = {one["check"]: one["found"] for one in json.loads(ended["output"])["checks"]}
    assert "can be read" in checks["source"]
    assert checks["ml.m5.xlarge for training job usage"].startswith("20, ")
    assert {name for name in checks if name.startswith("image ")} == {
        "image pytorch:2.13-cpu-amzn2023-sagemaker",
        next(name for name in checks if name.startswith("image dogs-local-server:")),
    }
    assert sagemaker.list_processing_jobs()["ProcessingJobSummaries"] == jobs
    assert deployed.denied() == refused


def test_a_dry_run_names_what_is_missing(deployed):
    _, ended = deployed.execute({"dry_run": True, "source": "incoming/cats.zip"})
    assert ended["status"] == "FAILED"
    assert ended["error"] == "DryRunFailed"
    assert "nothing lies under s3://" in ended["cause"]
    assert "incoming/cats.zip; upload the pictures" in ended["cause"]


def test_every_state_ran(finished):
    assert [name for name in STATES if not any(visited.startswith(name) for visited in finished.states)] == []
    assert any(visited.startswith(("Deploy", "CreateEndpoint")) for visited in finished.states)


def test_no_call_was_denied(finished):
    assert finished.denied == []


def test_tuning_searched_the_promised_ranges_and_training_used_the_best(finished, deployed):
    sagemaker = deployed.cloud.client("sagemaker")
    name = finished.output["tuning_job"]
    trials = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)["TrainingJobSummaries"]
    assert len(trials) == 3
    tuned = [trial["TunedHyperParameters"] for trial in trials]
    assert all(0.01 <= float(t["learning_rate"]) <= 0.1 for t in tuned)
    assert {t["batch_size"] for t in tuned} <= {"64", "128", "256"}
    best = sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)["BestTrainingJob"]
    used = sagemaker.describe_training_job(TrainingJobName=finished.output["training_job"])["HyperParameters"]
    assert {k: used[k] for k in ("learning_rate", "batch_size")} == {
        k: best["TunedHyperParameters"][k] for k in ("learning_rate", "batch_size")
    }
    objectives = [t["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] for t in trials]
    assert best["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] == max(objectives)


def test_s3_holds_the_documented_layout(finished, deployed):
    s3, bucket = deployed.cloud.client("s3"), deployed.outputs["DataBucket"]
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = {item["Key"] for page in pages for item in page.get("Contents", [])}
    run = f"runs/{finished.name}/"
    folders = {key.removeprefix(run).split("/")[0] for key in keys if key.startswith(run)}
    expected = {"prepare", "tuning", "training", "debug-output", "profiler-output", "rule-output", "evaluation", "report"}
    assert expected <= folders
    dataset = f"datasets/{finished.output['dataset_hash']}/"
    assert {dataset + name for name in ("dataset.json", "report.json", "manifest.parquet")} <= keys
    assert any(key.startswith(dataset + "shards/train-") for key in keys)
    assert f"models/{finished.name}/model.tar.gz" in keys
    champion = json.loads(s3.get_object(Bucket=bucket, Key="champion.json")["Body"].read())
    assert champion["run"] == finished.name
    assert f"{run}report/report.html" in keys
    assert f"{run}rule-output/ProfilerReport/profiler-output/profiler-report.html" in keys


@pytest.fixture(scope="session")
def outputs_folder(finished, deployed, tmp_path_factory) -> Path:
    """The run's debugger and profiler output, downloaded."""
    folder = tmp_path_factory.mktemp("run")
    s3, bucket, prefix = deployed.cloud.client("s3"), deployed.outputs["DataBucket"], f"runs/{finished.name}/"
    for part in ("debug-output", "profiler-output"):
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}{part}/"):
            for item in page.get("Contents", []):
                target = folder / item["Key"].removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, item["Key"], str(target))
    return folder


@pytest.mark.filterwarnings("ignore")  # smdebug is unmaintained and warns about its own dependencies
def test_smdebug_opens_the_tensors(outputs_folder):
    from smdebug.trials import create_trial

    trial = create_trial(str(outputs_folder / "debug-output"))
    names = trial.tensor_names()
    losses = [name for name in names if "loss" in name.lower()]
    assert losses
    steps = trial.tensor(losses[0]).steps()
    assert len(steps) > 1
    assert float(trial.tensor(losses[0]).value(steps[0]).mean()) > 0


@pytest.mark.filterwarnings("ignore")
def test_smdebug_reads_the_system_metrics(outputs_folder):
    from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader

    reader = LocalSystemMetricsReader(str(outputs_folder / "profiler-output"))
    reader.refresh_event_file_list()
    events = reader.get_events(0, 4_000_000_000_000_000)
    assert {event.dimension for event in events} >= {"CPUUtilization"}


def picture() -> bytes:
    import io

    from PIL import Image

    stored = io.BytesIO()
    Image.new("L", (32, 32), 200).save(stored, "PNG")
    return stored.getvalue()


def test_a_posted_picture_is_answered_with_its_class(finished, deployed, digits):
    right = 0
    pictures = [typical(digits, str(label)) for label in range(10)]
    for path in pictures:
        status, answer = deployed.post(path.read_bytes(), **deployed.authorized)
        assert status == 200, answer
        assert set(answer) == {"predictions", "novelty", "model", "request_id"}
        probabilities = [p["probability"] for p in answer["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        right += answer["predictions"][0]["label"] == path.parent.name
    assert right >= 8


@pytest.mark.parametrize(
    ("content_type", "body", "token", "status"),
    [
        ("image/png", None, "", 401),
        ("image/png", None, "Bearer wrong", 401),
        ("text/plain", b"hello", "right", 415),
        ("image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * 5_000_000, "right", 413),
        ("image/png", b"no picture at all", "right", 422),
    ],
)
def test_bad_requests_get_their_documented_status(finished, deployed, content_type, body, token, status):
    headers = {"Content-Type": content_type}
    if token:
        headers["Authorization"] = f"Bearer {deployed.token}" if token == "right" else token
    got, answer = deployed.request("predict", picture() if body is None else body, headers)
    assert got == status, answer
    assert answer["error"]["message"]


def test_the_labels_and_the_health_are_served(finished, deployed):
    status, answer = deployed.request("labels", headers=deployed.authorized)
    assert (status, sorted(answer["labels"])) == (200, [str(n) for n in range(10)])
    assert deployed.request("health")[0] == 200
    status, document = deployed.request("openapi.json")
    assert (status, document["openapi"][:3]) == (200, "3.1")


def test_the_build_writes_to_the_log_group_of_the_stack(deployed, finished):
    """``cdk destroy`` removes that one, and CodeBuild's own choice would stay."""
    (project,) = deployed.cloud.client("codebuild").batch_get_projects(names=["dogs-local-server"])["projects"]
    logs = deployed.cloud.client("logs")
    assert logs.describe_log_streams(logGroupName=project["logsConfig"]["cloudWatchLogs"]["groupName"])["logStreams"]
    assert logs.describe_log_groups(logGroupNamePrefix="/aws/codebuild/")["logGroups"] == []
