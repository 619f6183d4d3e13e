"""Training and processing jobs: real subprocesses under SageMaker's container contract."""

from __future__ import annotations

import copy
import os
import re
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from local_cloud.images import Image, Images
from local_cloud.sagemaker.common import Record, Request, Tags, arn, in_use, invalid, now, page, select
from local_cloud.sagemaker.container import ContainerJob, Settings, assume, require_mounted
from local_cloud.sagemaker.s3_transfer import FolderSync, download, upload_file
from local_cloud.service import Cloud

_DAY = 86400
_DEFAULT_CHECKPOINTS = "/opt/ml/checkpoints"


class Metrics:
    """Values that a job's log lines report, by AlgorithmSpecification.MetricDefinitions; the last of each is final."""

    def __init__(self, definitions: Sequence[Mapping[str, str]]) -> None:
        try:
            self._patterns = [(item["Name"], re.compile(item["Regex"])) for item in definitions]
        except re.error as error:
            message = f"Invalid regex in MetricDefinitions: {error.pattern!r}: {error.msg}."
            raise invalid(message) from error
        self.series: dict[str, list[float]] = {}
        self.final: list[Record] = []

    def read(self, line: str) -> bool:
        """Take the values of one line; returns whether there were any."""
        found = False
        for name, pattern in self._patterns:
            for match in pattern.finditer(line):
                value = _number(match)
                if value is not None:
                    self._add(name, value)
                    found = True
        return found

    def _add(self, name: str, value: float) -> None:
        self.series.setdefault(name, []).append(value)
        kept = [item for item in self.final if item["MetricName"] != name]
        self.final = [*kept, {"MetricName": name, "Value": value, "Timestamp": now()}]


def _number(match: re.Match[str]) -> float | None:
    """The first group (the whole match without one) as a number; text that is none is no metric."""
    try:
        return float(match.group(1) if match.re.groups else match.group())
    except (ValueError, TypeError):
        return None


class TrainingJob(ContainerJob):
    """One training job; also a tuning job's trial."""

    kind = "training"
    log_group = "/aws/sagemaker/TrainingJobs"

    def __init__(
        self,
        cloud: Cloud,
        images: Images,
        settings: Settings,
        request: Request,
        changed: threading.Condition,
        tuning_arn: str | None,
        neighbours: int,
    ) -> None:
        super().__init__(cloud, images, settings, name=request["TrainingJobName"], request=request, changed=changed)
        self._neighbours = neighbours
        self.metrics = Metrics(request["AlgorithmSpecification"].get("MetricDefinitions", []))
        self._checkpoints: list[FolderSync] = []
        created = now()
        kept = {key: copy.deepcopy(value) for key, value in request.items() if key != "Tags"}
        self.record = {
            "StoppingCondition": {"MaxRuntimeInSeconds": _DAY},
            **kept,
            "TrainingJobArn": arn(cloud, "training-job", self.name),
            "ModelArtifacts": {"S3ModelArtifacts": f"{self._output}/model.tar.gz"},
            "TrainingJobStatus": "InProgress",
            "SecondaryStatus": "Starting",
            "SecondaryStatusTransitions": [
                {"Status": "Starting", "StartTime": created, "StatusMessage": "Starting the training job"}
            ],
            "CreationTime": created,
            "LastModifiedTime": created,
        }
        self.record["StoppingCondition"].setdefault("MaxRuntimeInSeconds", _DAY)
        if tuning_arn:
            self.record["TuningJobArn"] = tuning_arn

    @property
    def _output(self) -> str:
        return f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}/output"

    def _image_uri(self) -> str:
        return str(self.request["AlgorithmSpecification"]["TrainingImage"])

    def prepare(self) -> None:
        self._transition("Downloading", "Downloading input data")
        for folder in ("input/config", "input/data", "model", "output/data"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self._write_configs()
        for channel in self.request.get("InputDataConfig", []):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            count = download(self.cloud, self.session(), uri, self.base / "input" / "data" / channel["ChannelName"])
            self.say(f"channel {channel['ChannelName']}: {count} files from {uri}")
        self._restore_checkpoints()

    def _write_configs(self) -> None:
        instance = self.request.get("ResourceConfig", {}).get("InstanceType", "local")
        group = {"instance_group_name": "homogeneousCluster", "instance_type": instance, "hosts": ["localhost"]}
        resources = {
            "current_host": "localhost",
            "current_instance_type": instance,
            "current_group_name": "homogeneousCluster",
            "hosts": ["localhost"],
            "instance_groups": [group],
            "network_interface_name": "lo",
        }
        channels = {
            channel["ChannelName"]: {
                "TrainingInputMode": "File",
                "S3DistributionType": "FullyReplicated",
                "RecordWrapperType": "None",
                **({"ContentType": channel["ContentType"]} if "ContentType" in channel else {}),
            }
            for channel in self.request.get("InputDataConfig", [])
        }
        self.write_config("input/config/hyperparameters.json", self.request.get("HyperParameters", {}))
        self.write_config("input/config/inputdataconfig.json", channels)
        self.write_config("input/config/resourceconfig.json", resources)

    def _restore_checkpoints(self) -> None:
        config = self.request.get("CheckpointConfig")
        if config is None:
            return
        folder = Path(self.mount(config.get("LocalPath", _DEFAULT_CHECKPOINTS)))
        download(self.cloud, self.session(), config["S3Uri"].rstrip("/") + "/", folder, required=False)
        sync = FolderSync(self.cloud, folder, config["S3Uri"])
        sync.mark_present()
        self._checkpoints = [sync]

    def command(self, image: Image) -> Sequence[str]:
        specification = self.request["AlgorithmSpecification"]
        entrypoint = specification.get("ContainerEntrypoint") or [*image.entrypoint, *image.cmd]
        arguments = specification.get("ContainerArguments", [])
        own_program = specification.get("ContainerEntrypoint") or image.root is None
        return [*entrypoint, *arguments] if own_program else [*image.entrypoint, *(arguments or ["train"])]

    def environment(self) -> Mapping[str, str]:
        variables = {"TRAINING_JOB_NAME": self.name, "TRAINING_JOB_ARN": self.record["TrainingJobArn"]}
        if self._neighbours > 1:
            # Instances of their own on AWS; here they share the cores, and more threads than cores is many times slower.
            variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._neighbours))
        return variables

    def syncs(self) -> Sequence[FolderSync]:
        return self._checkpoints

    def on_started(self) -> None:
        first = {} if "TrainingStartTime" in self.record else {"TrainingStartTime": now()}
        self._transition("Training", "Training image download completed. Training in progress.", **first)

    @property
    def spot(self) -> bool:
        """Managed spot training; without checkpoints an interrupted job would begin anew, which no test needs."""
        return bool(self.request.get("EnableManagedSpotTraining")) and "CheckpointConfig" in self.request

    def on_interrupted(self) -> None:
        self._transition("Interrupted", "The managed spot training instances were interrupted")
        self._transition("Starting", "Starting the training job")

    def on_line(self, line: str) -> None:
        if self.metrics.read(line):
            self.update(FinalMetricDataList=list(self.metrics.final))

    def collect(self, code: int | None) -> None:
        if code:
            self._pack("output/data", "output.tar.gz", when_empty=False)
            reason = self.message("output/failure").strip()
            self.fail(f"AlgorithmError: {reason}"[: 1024 - 20] + f", exit code: {code}")
            return
        self._transition("Uploading", "Uploading generated training model")
        self._pack("model", "model.tar.gz", when_empty=True)
        self._pack("output/data", "output.tar.gz", when_empty=False)
        if code is None:
            self.stopped()
        else:
            self._end("Completed", "Completed", "Training job completed")

    def fail(self, reason: str) -> None:
        self._end("Failed", "Failed", "Training job failed", FailureReason=reason)

    def stopped(self) -> None:
        secondary = "MaxRuntimeExceeded" if self.timed_out else "Stopped"
        message = "Training job runtime exceeded MaxRuntimeInSeconds" if self.timed_out else "Training job stopped"
        self._end("Stopped", secondary, message)

    def _pack(self, folder: str, name: str, *, when_empty: bool) -> None:
        """Pack a folder of the container as ``name`` under the job's output in S3."""
        source = self.base / folder
        entries = sorted(source.iterdir()) if source.is_dir() else []
        if not entries and not when_empty:
            return
        archive = self.folder / name
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for entry in entries:
                tar.add(entry, arcname=entry.name)
        upload_file(self.cloud, self.session(), archive, f"{self._output}/{name}")
        archive.unlink()

    def _transition(self, secondary: str, message: str, **changes: Any) -> None:
        with self.changed:
            moment = now()
            past = [dict(item) for item in self.record["SecondaryStatusTransitions"]]
            past[-1].setdefault("EndTime", moment)
            entry = {"Status": secondary, "StartTime": moment, "StatusMessage": message}
            self.update(SecondaryStatus=secondary, SecondaryStatusTransitions=[*past, entry], **changes)

    def _end(self, status: str, secondary: str, message: str, **changes: Any) -> None:
        with self.changed:
            moment = now()
            started = self.record.get("TrainingStartTime")
            seconds = max(1, round((moment - started).total_seconds())) if started else 0
            self._transition(secondary, message, TrainingJobStatus=status, TrainingEndTime=moment, **changes)
            self.record["SecondaryStatusTransitions"][-1]["EndTime"] = moment
            self.record.update(TrainingTimeInSeconds=max(1, seconds), BillableTimeInSeconds=max(1, seconds))

    def mark_stopping(self) -> None:
        """The status that Stop gives at once."""
        self._transition("Stopping", "Stopping the training job", TrainingJobStatus="Stopping")


class ProcessingJob(ContainerJob):
    """One processing job."""

    kind = "processing"
    log_group = "/aws/sagemaker/ProcessingJobs"

    def __init__(self, cloud: Cloud, images: Images, settings: Settings, request: Request, changed: threading.Condition) -> None:
        super().__init__(cloud, images, settings, name=request["ProcessingJobName"], request=request, changed=changed)
        created = now()
        self.record = {
            "StoppingCondition": {"MaxRuntimeInSeconds": _DAY},
            **{key: copy.deepcopy(value) for key, value in request.items() if key != "Tags"},
            "ProcessingJobArn": arn(cloud, "processing-job", self.name),
            "ProcessingJobStatus": "InProgress",
            "CreationTime": created,
            "LastModifiedTime": created,
        }
        outputs = request.get("ProcessingOutputConfig", {}).get("Outputs", [])
        self._outputs = [
            (item["S3Output"], FolderSync(cloud, Path(self.mount(item["S3Output"]["LocalPath"])), item["S3Output"]["S3Uri"]))
            for item in outputs
        ]

    def _image_uri(self) -> str:
        return str(self.request["AppSpecification"]["ImageUri"])

    def prepare(self) -> None:
        for output, _ in self._outputs:
            Path(self.mount(output["LocalPath"])).mkdir(parents=True, exist_ok=True)
        (self.base / "output").mkdir(parents=True, exist_ok=True)
        described = {key: value for key, value in self.record.items() if key in self.request or key == "ProcessingJobArn"}
        self.write_config("config/processingjobconfig.json", _mounted_values(described, self))
        self.write_config("config/resourceconfig.json", {"current_host": "localhost", "hosts": ["localhost"]})
        for item in self.request.get("ProcessingInputs", []):
            source = item["S3Input"]
            count = download(self.cloud, self.session(), source["S3Uri"], Path(self.mount(source["LocalPath"])))
            self.say(f"input {item['InputName']}: {count} files from {source['S3Uri']}")

    def command(self, image: Image) -> Sequence[str]:
        specification = self.request["AppSpecification"]
        entrypoint = specification.get("ContainerEntrypoint") or list(image.entrypoint)
        arguments = specification.get("ContainerArguments") or ([] if specification.get("ContainerEntrypoint") else list(image.cmd))
        return [*entrypoint, *arguments]

    def environment(self) -> Mapping[str, str]:
        return {"PROCESSING_JOB_NAME": self.name, "PROCESSING_JOB_ARN": self.record["ProcessingJobArn"]}

    def syncs(self) -> Sequence[FolderSync]:
        return [sync for output, sync in self._outputs if output["S3UploadMode"] == "Continuous"]

    def on_line(self, line: str) -> None:
        """Processing jobs report no metrics."""

    def on_started(self) -> None:
        self.update(ProcessingStartTime=now())

    @property
    def spot(self) -> bool:
        """SageMaker has no spot for processing."""
        return False

    def on_interrupted(self) -> None:
        """Never called: there is no spot."""

    def collect(self, code: int | None) -> None:
        message = self.message("output/message")
        if message:
            self.update(ExitMessage=message)
        if code is None:
            self.stopped()
        elif code:
            self.fail(f"AlgorithmError: See job logs for more information, exit code: {code}")
        else:
            for _, sync in self._outputs:
                sync.sync(self.session())
            self.update(ProcessingJobStatus="Completed", ProcessingEndTime=now())

    def fail(self, reason: str) -> None:
        self.update(ProcessingJobStatus="Failed", FailureReason=reason, ProcessingEndTime=now())

    def stopped(self) -> None:
        changes: Record = (
            {"FailureReason": "The job ran longer than MaxRuntimeInSeconds and was stopped."} if self.timed_out else {}
        )
        self.update(ProcessingJobStatus="Stopped", ProcessingEndTime=now(), **changes)

    def mark_stopping(self) -> None:
        """The status that Stop gives at once."""
        self.update(ProcessingJobStatus="Stopping")


def check_spot(definition: Request) -> None:
    """Refuse a waiting time that SageMaker refuses: without managed spot training, or shorter than the running time."""
    stopping = definition.get("StoppingCondition", {})
    wait, run = stopping.get("MaxWaitTimeInSeconds"), stopping.get("MaxRuntimeInSeconds", _DAY)
    spot = bool(definition.get("EnableManagedSpotTraining"))
    if wait is not None and not spot:
        raise invalid("Invalid MaxWaitTimeInSeconds. It is only supported when EnableManagedSpotTraining is set to true")
    if spot and (wait is None or wait < run):
        raise invalid(f"MaxWaitTimeInSeconds is {wait} with managed spot training; expected at least MaxRuntimeInSeconds = {run}.")


def _mounted_values(value: Any, job: ContainerJob) -> Any:
    """``value`` with /opt/ml replaced in every string."""
    if isinstance(value, dict):
        return {key: _mounted_values(part, job) for key, part in value.items()}
    if isinstance(value, list):
        return [_mounted_values(part, job) for part in value]
    return job.mount(value) if isinstance(value, str) else value


_Job = TypeVar("_Job", TrainingJob, ProcessingJob)


class Jobs:
    """All training and processing jobs of the cloud."""

    def __init__(self, cloud: Cloud, images: Images, tags: Tags, settings: Settings) -> None:
        self._cloud, self._images, self._tags, self._settings = cloud, images, tags, settings
        self.changed = threading.Condition(threading.RLock())
        """Notified when any job changes; also the lock of every record."""
        self._training: dict[str, TrainingJob] = {}
        self._processing: dict[str, ProcessingJob] = {}

    # -- training ------------------------------------------------------------------------------------------------------

    def create_training(self, request: Request, tuning_arn: str | None = None, neighbours: int = 1) -> TrainingJob:
        """Start a training job, one of ``neighbours`` side by side. Raises ``ServiceError`` as CreateTrainingJob does."""
        if "TrainingImage" not in request["AlgorithmSpecification"]:
            raise invalid("AlgorithmSpecification.TrainingImage is required: only images are emulated, no marketplace algorithms.")
        self._images.check(request["AlgorithmSpecification"]["TrainingImage"])
        if "CheckpointConfig" in request:
            require_mounted("CheckpointConfig.LocalPath", request["CheckpointConfig"].get("LocalPath", _DEFAULT_CHECKPOINTS))
        check_spot(request)
        assume(self._cloud, request["RoleArn"], request["TrainingJobName"])
        job = TrainingJob(self._cloud, self._images, self._settings, request, self.changed, tuning_arn, neighbours)
        self._add(self._training, job, "Training job names", "training job", job.record["TrainingJobArn"])
        return job

    def call_create_training(self, request: Request) -> Record:
        """CreateTrainingJob."""
        return {"TrainingJobArn": self.create_training(request).record["TrainingJobArn"]}

    def training(self, name: str) -> TrainingJob:
        """The job of this name."""
        job = self._training.get(name)
        if job is None:
            raise invalid("Requested resource not found.")
        return job

    def describe_training(self, request: Request) -> Record:
        """DescribeTrainingJob."""
        job = self.training(request["TrainingJobName"])
        with self.changed:
            return copy.deepcopy(job.record)

    def stop_training(self, request: Request) -> Record:
        """StopTrainingJob."""
        job = self.training(request["TrainingJobName"])
        self._stop(job, job.record["TrainingJobStatus"])
        return {}

    def list_training(self, request: Request) -> Record:
        """ListTrainingJobs."""
        fields = ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingEndTime", "LastModifiedTime", "TrainingJobStatus")
        items = self._summaries(self._training, (*fields, "SecondaryStatus"))
        chosen = select(items, request, name="TrainingJobName", status="TrainingJobStatus")
        return page("TrainingJobSummaries", chosen, request)

    # -- processing ----------------------------------------------------------------------------------------------------

    def create_processing(self, request: Request) -> Record:
        """CreateProcessingJob."""
        self._images.check(request["AppSpecification"]["ImageUri"])
        for item in request.get("ProcessingInputs", []):
            self._check_input(item)
        for item in request.get("ProcessingOutputConfig", {}).get("Outputs", []):
            if "S3Output" not in item or "LocalPath" not in item["S3Output"]:
                raise invalid(f"Output {item['OutputName']!r} needs S3Output with LocalPath.")
            require_mounted("S3Output.LocalPath", item["S3Output"]["LocalPath"])
        assume(self._cloud, request["RoleArn"], request["ProcessingJobName"])
        job = ProcessingJob(self._cloud, self._images, self._settings, request, self.changed)
        self._add(self._processing, job, "Processing job names", "processing job", job.record["ProcessingJobArn"])
        return {"ProcessingJobArn": job.record["ProcessingJobArn"]}

    @staticmethod
    def _check_input(item: Record) -> None:
        if "LocalPath" not in item.get("S3Input", {}):
            raise invalid(f"Input {item['InputName']!r} needs S3Input with LocalPath.")
        if item["S3Input"].get("S3InputMode") is None:
            raise invalid(f"Input {item['InputName']!r} needs S3Input.S3InputMode: use 'File'.")
        require_mounted("S3Input.LocalPath", item["S3Input"]["LocalPath"])

    def _processing_job(self, request: Request) -> ProcessingJob:
        name = request["ProcessingJobName"]
        job = self._processing.get(name)
        if job is None:
            raise invalid(f"Could not find requested job with name: {name}")
        return job

    def describe_processing(self, request: Request) -> Record:
        """DescribeProcessingJob."""
        job = self._processing_job(request)
        with self.changed:
            return copy.deepcopy(job.record)

    def stop_processing(self, request: Request) -> Record:
        """StopProcessingJob."""
        job = self._processing_job(request)
        self._stop(job, job.record["ProcessingJobStatus"])
        return {}

    def list_processing(self, request: Request) -> Record:
        """ListProcessingJobs."""
        fields = ("ProcessingJobName", "ProcessingJobArn", "CreationTime", "ProcessingEndTime", "LastModifiedTime")
        items = self._summaries(self._processing, (*fields, "ProcessingJobStatus", "FailureReason", "ExitMessage"))
        chosen = select(items, request, name="ProcessingJobName", status="ProcessingJobStatus")
        return page("ProcessingJobSummaries", chosen, request)

    # -- both ----------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Kill every job and wait for their threads."""
        with self.changed:
            jobs: list[TrainingJob | ProcessingJob] = [*self._training.values(), *self._processing.values()]
        for job in jobs:
            job.shut_down()
        for job in jobs:
            job.join(30)

    def _add(self, jobs: dict[str, _Job], job: _Job, names: str, what: str, resource: str) -> None:
        with self.changed:
            if job.name in jobs:
                there = f"and a {what} with this name already exists ({resource})"
                raise in_use(f"{names} must be unique within an AWS account and region, {there}")
            jobs[job.name] = job
            self._tags.add(resource, job.request.get("Tags", []))
            job.start()

    def _stop(self, job: TrainingJob | ProcessingJob, status: str) -> None:
        with self.changed:
            if status == "Stopping":
                return
            if status != "InProgress":
                raise invalid(f"The request was rejected because the {job.kind} job is in status {status}.")
            job.mark_stopping()
            job.request_stop()

    def _summaries(self, jobs: Mapping[str, TrainingJob] | Mapping[str, ProcessingJob], fields: Sequence[str]) -> list[Record]:
        with self.changed:
            return [{field: job.record[field] for field in fields if field in job.record} for job in jobs.values()]
