"""Training and processing jobs of the local SageMaker: real subprocesses, S3, logs, failures, stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_fakes import BUCKET, CALLER, IMAGE, ROLE, Client, FakeCloud, archive, moto_cloud, names, wait

from local_cloud.images import Images
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.sagemaker.process import Child, mounted
from local_cloud.sagemaker.s3_transfer import relative_path
from local_cloud.service import Permission, ServiceError

BUSY = ("InProgress", "Stopping")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCloud]:
    with moto_cloud(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def sagemaker(cloud: FakeCloud) -> Iterator[SageMaker]:
    service = SageMaker(cloud, Images(cloud), Settings(grace=1.0, sync_interval=0.2))
    yield service
    service.stop()


@pytest.fixture
def call(sagemaker: SageMaker) -> Client:
    return Client(sagemaker)


def training(cloud: FakeCloud, name: str, script: str, **more: Any) -> dict[str, Any]:
    cloud.put(f"code/{name}.tar.gz", archive({"job.py": script}))
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": ROLE,
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "acc", "Regex": "acc=([0-9.]+)"}],
        },
        "HyperParameters": {
            "sagemaker_program": "job.py",
            "sagemaker_submit_directory": f"s3://{BUCKET}/code/{name}.tar.gz",
            "lr": "0.1",
        },
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out/"},
        "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 5},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    return {**request, **more}


TRAIN = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser(); parser.add_argument("--lr", type=float); lr = parser.parse_args().lr
files = sorted(p.name for p in pathlib.Path(os.environ["SM_CHANNEL_DATASET"]).rglob("*") if p.is_file())
print("acc=0.5"); print("acc=0.75")
secret = sorted(key for key in os.environ if key.startswith("AWS_"))
model = pathlib.Path(os.environ["SM_MODEL_DIR"]); (model / "code").mkdir()
(model / "code" / "x.py").write_text("x")
(model / "model.json").write_text(json.dumps({"lr": lr, "files": files, "env": secret, "own": os.environ["OWN"],
    "job": os.environ["TRAINING_JOB_NAME"], "inherited": os.environ.get("NOT_FOR_JOBS"),
    "compiles_anew": sys.dont_write_bytecode}))
pathlib.Path(os.environ["SM_OUTPUT_DATA_DIR"], "note.txt").write_text("n")
here = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"]) / "checkpoints"
old = (here / "last").read_text() if (here / "last").exists() else "none"
(here / "last").write_text("old:" + old)
"""


def test_a_training_job_reads_and_writes_s3_and_reports_metrics(
    cloud: FakeCloud, call: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_FOR_JOBS", "secret")
    cloud.put("ds/abc/a.txt", "a")
    cloud.put("ds/abc/deep/b.txt", "b")
    cloud.put("ds/abcd/other.txt", "x")
    cloud.put("ckpt/last", "before")
    channel = {
        "ChannelName": "dataset",
        "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/ds/abc/"}},
    }
    request = training(
        cloud,
        "good",
        TRAIN,
        InputDataConfig=[channel],
        CheckpointConfig={"S3Uri": f"s3://{BUCKET}/ckpt"},
        Environment={"OWN": "/opt/ml/model:/opt/mlx"},
        Tags=[{"Key": "run", "Value": "1"}],
    )
    assert call("CreateTrainingJob", **request)["TrainingJobArn"] == "arn:aws:sagemaker:us-east-1:123456789012:training-job/good"
    with pytest.raises(ServiceError) as clash:
        call("CreateTrainingJob", **request)
    assert clash.value.code == "ResourceInUse"

    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="good"), "TrainingJobStatus", BUSY)

    assert end["TrainingJobStatus"] == "Completed", end.get("FailureReason")
    assert [item["Status"] for item in end["SecondaryStatusTransitions"]] == [
        "Starting",
        "Downloading",
        "Training",
        "Uploading",
        "Completed",
    ]
    assert [(item["MetricName"], item["Value"]) for item in end["FinalMetricDataList"]] == [("acc", 0.75)]
    assert end["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{BUCKET}/out/good/output/model.tar.gz"
    packed = cloud.get("out/good/output/model.tar.gz")
    assert names(packed) == ["code/x.py", "model.json"]
    assert names(cloud.get("out/good/output/output.tar.gz")) == ["note.txt"]
    assert cloud.get("ckpt/last") == b"old:before"
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        seen = json.load(tar.extractfile("model.json"))
    assert seen["files"] == ["a.txt", "b.txt"]
    assert seen["lr"] == 0.1
    assert seen["job"] == "good"
    assert seen["inherited"] is None
    assert not seen["compiles_anew"], "the next job would compile torch again"
    assert seen["own"].endswith("/opt/ml/model:/opt/mlx")
    assert seen["own"].startswith(str(cloud.root))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"} <= set(seen["env"])
    assert call("ListTags", ResourceArn=end["TrainingJobArn"])["Tags"] == [{"Key": "run", "Value": "1"}]
    assert "acc=0.75" in (cloud.root / "logs" / "training" / "good.log").read_text()
    assert not (cloud.root / "jobs" / "training" / "good").exists()
    logs = cloud.client("logs")
    stream = logs.describe_log_streams(logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix="good/algo-1-")[
        "logStreams"
    ][0]
    events = logs.get_log_events(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=stream["logStreamName"])["events"]
    logs.close()
    assert "acc=0.75" in [event["message"] for event in events]
    listed = call("ListTrainingJobs", NameContains="good", StatusEquals="Completed")["TrainingJobSummaries"]
    assert [item["TrainingJobName"] for item in listed] == ["good"]
    assert call("DescribeTrainingJob", TrainingJobName="good")["HyperParameters"]["lr"] == "0.1"


def test_a_failing_script_gives_the_reason_and_the_exit_code(cloud: FakeCloud, call: Client) -> None:
    script = "import os, sys; open(os.environ['SAGEMAKER_BASE_DIR'] + '/output/failure', 'w').write('no pictures'); sys.exit(3)"
    request = training(cloud, "bad", script)
    request["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["python", "-c"], "ContainerArguments": [script]}
    call("CreateTrainingJob", **request)
    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="bad"), "TrainingJobStatus", BUSY)
    assert (end["TrainingJobStatus"], end["FailureReason"]) == ("Failed", "AlgorithmError: no pictures, exit code: 3")
    with pytest.raises(ServiceError, match="in status Failed"):
        call("StopTrainingJob", TrainingJobName="bad")


def test_a_missing_prefix_fails_the_job_in_awss_words(cloud: FakeCloud, call: Client) -> None:
    channel = {
        "ChannelName": "dataset",
        "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/nothing/"}},
    }
    call("CreateTrainingJob", **training(cloud, "empty", "", InputDataConfig=[channel]))
    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="empty"), "TrainingJobStatus", BUSY)
    assert end["FailureReason"].startswith("ClientError: Data download failed:Failed to download data. No S3 objects found")


SLOW = "import subprocess, time, sys; p = subprocess.Popen(['sleep', '300']); print('child', p.pid, flush=True); time.sleep(300)"


def child_of(cloud: FakeCloud, kind: str, name: str) -> int:
    log = cloud.root / "logs" / kind / f"{name}.log"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.startswith("child "):
                return int(line.split()[1])
        time.sleep(0.05)
    raise AssertionError("the job did not start")


def gone(pid: int) -> bool:
    for _ in range(60):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def slow(cloud: FakeCloud, name: str, **more: Any) -> dict[str, Any]:
    request = training(cloud, name, "", **more)
    request["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["python", "-c"], "ContainerArguments": [SLOW]}
    return request


def test_stopping_ends_the_whole_process_tree(cloud: FakeCloud, call: Client) -> None:
    call("CreateTrainingJob", **slow(cloud, "halt"))
    pid = child_of(cloud, "training", "halt")
    call("StopTrainingJob", TrainingJobName="halt")
    assert call("DescribeTrainingJob", TrainingJobName="halt")["TrainingJobStatus"] in ("Stopping", "Stopped")
    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="halt"), "TrainingJobStatus", BUSY)
    assert (end["TrainingJobStatus"], end["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert gone(pid)


SPOT = """
import os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
count = base / "checkpoints" / "starts"
starts = int(count.read_text()) + 1 if count.exists() else 1
print(f"acc={starts} left={(base / 'work.txt').exists()}", flush=True)
(base / "work.txt").write_text("of this machine")
def last_words(*_):
    count.write_text(str(starts))
    sys.exit(0)
signal.signal(signal.SIGTERM, last_words)
if starts == 1: time.sleep(60)
(base / "model" / "starts").write_text(str(starts))
"""


@pytest.fixture(scope="module")
def scarce(cloud: FakeCloud) -> Iterator[Client]:
    """A SageMaker that takes spot machines away."""
    service = SageMaker(cloud, Images(cloud), Settings(grace=5.0, sync_interval=0.2, interrupt_after=1.0))
    yield Client(service)
    service.stop()


def spot(cloud: FakeCloud, name: str, script: str, **more: Any) -> dict[str, Any]:
    request = training(cloud, name, "", StoppingCondition={"MaxRuntimeInSeconds": 30, "MaxWaitTimeInSeconds": 60}, **more)
    request["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["python", "-c"], "ContainerArguments": [script]}
    return {**request, "EnableManagedSpotTraining": True}


def test_an_interrupted_spot_job_goes_on_with_its_checkpoints(cloud: FakeCloud, scarce: Client) -> None:
    request = spot(cloud, "taken", SPOT, CheckpointConfig={"S3Uri": f"s3://{BUCKET}/spot/taken"})
    scarce("CreateTrainingJob", **request)
    end = wait(lambda: scarce("DescribeTrainingJob", TrainingJobName="taken"), "TrainingJobStatus", BUSY)
    assert end["TrainingJobStatus"] == "Completed", end.get("FailureReason")
    running = ["Starting", "Downloading", "Training"]
    found = [item["Status"] for item in end["SecondaryStatusTransitions"]]
    assert found == [*running, "Interrupted", *running, "Uploading", "Completed"]
    assert cloud.get("spot/taken/starts") == b"1"
    log = (cloud.root / "logs" / "training" / "taken.log").read_text()
    assert "acc=1 left=False" in log
    assert "acc=2 left=False" in log, "a new machine has nothing but what S3 gives it"
    assert [item["Value"] for item in end["FinalMetricDataList"]] == [2.0]
    assert names(cloud.get("out/taken/output/model.tar.gz")) == ["starts"]
    start = end["SecondaryStatusTransitions"][2]["StartTime"]
    assert abs((end["TrainingStartTime"] - start).total_seconds()) < 0.5, "training started when it first started"


@pytest.mark.parametrize("without", ["checkpoints", "spot"])
def test_only_spot_jobs_with_checkpoints_lose_their_machine(cloud: FakeCloud, scarce: Client, without: str) -> None:
    request = spot(cloud, f"kept-{without}", "import time; time.sleep(2)", CheckpointConfig={"S3Uri": f"s3://{BUCKET}/spot/kept"})
    if without == "checkpoints":
        request.pop("CheckpointConfig")
    else:
        request |= {"EnableManagedSpotTraining": False, "StoppingCondition": {"MaxRuntimeInSeconds": 30}}
    scarce("CreateTrainingJob", **request)
    end = wait(lambda: scarce("DescribeTrainingJob", TrainingJobName=request["TrainingJobName"]), "TrainingJobStatus", BUSY)
    assert end["TrainingJobStatus"] == "Completed"
    assert "Interrupted" not in [item["Status"] for item in end["SecondaryStatusTransitions"]]


def test_a_job_runs_no_longer_for_having_been_interrupted(cloud: FakeCloud, scarce: Client) -> None:
    request = spot(cloud, "spent", "import time; time.sleep(60)", CheckpointConfig={"S3Uri": f"s3://{BUCKET}/spot/spent"})
    request["StoppingCondition"] = {"MaxRuntimeInSeconds": 2, "MaxWaitTimeInSeconds": 60}
    scarce("CreateTrainingJob", **request)
    end = wait(lambda: scarce("DescribeTrainingJob", TrainingJobName="spent"), "TrainingJobStatus", BUSY)
    assert end["SecondaryStatus"] == "MaxRuntimeExceeded"
    assert "Interrupted" in [item["Status"] for item in end["SecondaryStatusTransitions"]]


def test_max_runtime_stops_the_job(cloud: FakeCloud, call: Client) -> None:
    call("CreateTrainingJob", **slow(cloud, "late", StoppingCondition={"MaxRuntimeInSeconds": 1}))
    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="late"), "TrainingJobStatus", BUSY)
    assert (end["TrainingJobStatus"], end["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")


def test_nothing_outlives_the_cloud(cloud: FakeCloud) -> None:
    service = SageMaker(cloud, Images(cloud), Settings(grace=60))
    service.call("CreateTrainingJob", slow(cloud, "orphan"), CALLER)
    pid = child_of(cloud, "training", "orphan")
    service.stop()
    assert gone(pid)


HOST = """
import sys, time
from pathlib import Path
from local_cloud.sagemaker.process import Child
script = "import os, subprocess, time; p = subprocess.Popen(['setsid', 'sleep', '300']); print(p.pid, flush=True); time.sleep(300)"
child = Child([sys.executable, "-c", script], env={"PATH": "/usr/bin:/bin"}, cwd=Path("/"))
for line in child.lines(): print(line, flush=True)
"""


def test_a_killed_cloud_takes_its_jobs_with_it() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert host.stdout is not None
    with host.stdout as lines:
        pid = int(lines.readline())
        host.kill()
        host.wait()
    assert gone(pid)


STOPPED_AT_ONCE = """
import os, signal, subprocess, sys
from local_cloud.sagemaker import guard

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # the stop comes before anything else can be done with the command

subprocess.Popen = Popen
os._exit(guard.main(["sleep", "300"]))
"""


def test_a_stop_as_the_container_starts_reaches_the_container() -> None:
    pipe, root = subprocess.PIPE, Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", STOPPED_AT_ONCE], stdin=pipe, stdout=pipe, text=True, cwd=root) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        assert host.wait(10) == 128 + signal.SIGTERM, "the guard reports what ended the command, and does not die of it itself"
        assert gone(pid)


def test_a_missing_program_ends_as_in_a_shell(tmp_path: Path) -> None:
    child = Child(["no-such-program"], env={"PATH": "/bin"}, cwd=tmp_path)
    assert list(child.lines()) == ["exec 'no-such-program' failed: No such file or directory"]
    assert child.wait(10) == 127


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/opt/ml", "/X"),
        ("a=/opt/ml/model;b=/opt/ml", "a=/X/model;b=/X"),
        ("file:///opt/ml/x", "file:///X/x"),
        ("/opt/mlx s3://b/opt/ml/x", "/opt/mlx s3://b/opt/ml/x"),
    ],
)
def test_the_mount_is_replaced_and_nothing_else(text: str, expected: str) -> None:
    assert mounted(text, Path("/X")) == expected


@pytest.mark.parametrize(
    ("key", "prefix", "expected"),
    [("a/b/c", "a/b/", "c"), ("a/b/c", "a/b", "c"), ("a/b", "a/b", "b"), ("a/bc/d", "a/b", "bc/d"), ("x/y", "", "x/y")],
)
def test_keys_below_a_prefix(key: str, prefix: str, expected: str) -> None:
    assert relative_path(key, prefix) == expected


PROCESS = """
import json, os, sys
source, target = sys.argv[1:3]
open(target + "/copy.txt", "w").write(open(source + "/one.txt").read() + os.environ["WHERE"])
os.makedirs(target + "/deep"); open(target + "/deep/x", "w").write("x")
base = os.environ["SAGEMAKER_BASE_DIR"]
open(base + "/output/message", "w").write("all well")
assert json.load(open(base + "/config/resourceconfig.json"))["hosts"] == ["localhost"]
assert json.load(open(base + "/config/processingjobconfig.json"))["ProcessingInputs"][0]["S3Input"]["LocalPath"] == source
"""


def processing(name: str, code: str, **more: Any) -> dict[str, Any]:
    source = {
        "S3Uri": f"s3://{BUCKET}/in/one.txt",
        "LocalPath": "/opt/ml/processing/input/data",
        "S3DataType": "S3Prefix",
        "S3InputMode": "File",
    }
    target = {
        "S3Uri": f"s3://{BUCKET}/processed/{name}",
        "LocalPath": "/opt/ml/processing/output/result",
        "S3UploadMode": "EndOfJob",
    }
    return {
        "ProcessingJobName": name,
        "RoleArn": ROLE,
        "ProcessingInputs": [{"InputName": "data", "S3Input": source}],
        "ProcessingOutputConfig": {"Outputs": [{"OutputName": "result", "S3Output": target}]},
        "ProcessingResources": {"ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 5}},
        "AppSpecification": {
            "ImageUri": IMAGE,
            "ContainerEntrypoint": ["/bin/bash", "-c", 'cd /opt/ml/processing/input/data && exec python -c "$0" "$@"', code],
            "ContainerArguments": ["/opt/ml/processing/input/data", "/opt/ml/processing/output/result"],
        },
        "Environment": {"WHERE": "/opt/ml/processing"},
        **more,
    }


def test_a_processing_job_maps_its_folders_and_uploads_at_its_end(cloud: FakeCloud, call: Client) -> None:
    cloud.put("in/one.txt", "1")
    call("CreateProcessingJob", **processing("proc", PROCESS))
    end = wait(lambda: call("DescribeProcessingJob", ProcessingJobName="proc"), "ProcessingJobStatus", BUSY)
    assert end["ProcessingJobStatus"] == "Completed", (cloud.root / "logs/processing/proc.log").read_text()
    assert end["ExitMessage"] == "all well"
    assert cloud.keys("processed/proc") == ["processed/proc/copy.txt", "processed/proc/deep/x"]
    assert cloud.get("processed/proc/copy.txt").decode() == f"1{cloud.root}/jobs/processing/proc/opt/ml/processing"
    assert call("ListProcessingJobs")["ProcessingJobSummaries"][0]["ProcessingJobName"] == "proc"


def test_a_failing_processing_job_and_a_missing_one(cloud: FakeCloud, call: Client) -> None:
    cloud.put("in/one.txt", "1")
    call("CreateProcessingJob", **processing("broken", "raise SystemExit(5)"))
    end = wait(lambda: call("DescribeProcessingJob", ProcessingJobName="broken"), "ProcessingJobStatus", BUSY)
    assert end["ProcessingJobStatus"] == "Failed"
    assert end["FailureReason"].endswith("exit code: 5")
    with pytest.raises(ServiceError, match="Could not find requested job"):
        call("DescribeProcessingJob", ProcessingJobName="nowhere")


def test_continuous_outputs_arrive_while_the_job_runs(cloud: FakeCloud, call: Client) -> None:
    cloud.put("in/one.txt", "1")
    code = "import sys, time; open(sys.argv[2] + '/now', 'w').write('x'); time.sleep(60)"
    request = processing("stream", code)
    request["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3UploadMode"] = "Continuous"
    call("CreateProcessingJob", **request)
    deadline = time.monotonic() + 20
    while not cloud.keys("processed/stream") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cloud.keys("processed/stream") == ["processed/stream/now"]
    call("StopProcessingJob", ProcessingJobName="stream")
    end = wait(lambda: call("DescribeProcessingJob", ProcessingJobName="stream"), "ProcessingJobStatus", BUSY)
    assert end["ProcessingJobStatus"] == "Stopped"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"VpcConfig": {"SecurityGroupIds": ["sg-1"], "Subnets": ["s-1"]}}, "VpcConfig"),
        ({"ResourceConfig": {"InstanceCount": 2}}, "ResourceConfig.InstanceCount=2"),
        ({"TensorBoardOutputConfig": {"S3OutputPath": "s3://b/x"}}, "TensorBoardOutputConfig"),
        ({"EnableNetworkIsolation": True}, "EnableNetworkIsolation=True"),
        ({"NewField": 1}, "NewField"),
        ({"AlgorithmSpecification": {"TrainingImage": "docker.io/x:1", "TrainingInputMode": "File"}}, "docker.io/x:1"),
        ({"AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "Pipe"}}, "TrainingInputMode='Pipe'"),
        ({"RoleArn": "arn:aws:iam::123456789012:role/nobody"}, "Could not assume role"),
        ({"CheckpointConfig": {"S3Uri": "s3://b/x", "LocalPath": "/tmp/x"}}, "CheckpointConfig.LocalPath"),
    ],
)
def test_what_is_not_emulated_is_refused_by_name(cloud: FakeCloud, call: Client, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        call("CreateTrainingJob", **training(cloud, "refused", "", **change))
    assert refusal.value.code == "ValidationException"
    assert named in refusal.value.message


def test_the_managed_debuggers_fields_are_described_and_start_nothing(cloud: FakeCloud, call: Client) -> None:
    rule = {"RuleConfigurationName": "Overfit", "RuleEvaluatorImage": "503895931360.dkr.ecr.us-east-1.amazonaws.com/rules:latest"}
    managed = {
        "DebugHookConfig": {"S3OutputPath": "s3://data/runs/x/managed", "LocalPath": "/opt/ml/output/tensors"},
        "DebugRuleConfigurations": [rule],
        "ProfilerConfig": {"S3OutputPath": "s3://data/runs/x/managed", "ProfilingIntervalInMilliseconds": 500},
        "ProfilerRuleConfigurations": [rule],
    }
    before = call("ListProcessingJobs")["ProcessingJobSummaries"]
    call("CreateTrainingJob", **training(cloud, "managed", "print('hello')", **managed))
    end = wait(lambda: call("DescribeTrainingJob", TrainingJobName="managed"), "TrainingJobStatus", BUSY)
    assert end["TrainingJobStatus"] == "Completed"
    assert {name: end[name] for name in managed} == managed
    assert cloud.keys("runs/x/managed") == []
    assert call("ListProcessingJobs")["ProcessingJobSummaries"] == before


def test_permissions_name_resources_roles_and_tags(sagemaker: SageMaker) -> None:
    request = {"TrainingJobName": "Job", "RoleArn": ROLE, "Tags": [{"Key": "a", "Value": "b"}]}
    job = "arn:aws:sagemaker:us-east-1:123456789012:training-job/job"
    context = {"aws:TagKeys": ["a"], "aws:RequestTag/a": "b"}
    assert sagemaker.permissions("CreateTrainingJob", request) == [
        Permission("sagemaker:CreateTrainingJob", job, context),
        Permission("sagemaker:AddTags", job, context),
        Permission("iam:PassRole", ROLE, {"iam:PassedToService": "sagemaker.amazonaws.com"}),
    ]
    endpoint = sagemaker.permissions("CreateEndpoint", {"EndpointName": "E", "EndpointConfigName": "C"})
    assert [item.resource.rsplit(":", 1)[1] for item in endpoint] == ["endpoint/e", "endpoint-config/c"]
    assert sagemaker.permissions("ListEndpoints", {}) == [Permission("sagemaker:ListEndpoints", "*")]
