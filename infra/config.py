"""Configuration of one stage: typed, checked, and read from the CDK context here and nowhere else.

``cdk.json`` holds ``stages``; ``-c stage=<name>`` chooses one. A stage may name another in ``extends`` and then gives only its
differences. ``-c api_url=…`` and ``-c override='{"training": {"spot": true}}'`` change single values from the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from infra.machines import gpu_count

Fraction = Annotated[float, Field(ge=0, le=1)]
InstanceType = Annotated[str, Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")]
HostName = Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")]
Origin = Annotated[str, Field(pattern=r"^https?://[a-z0-9.-]+(:[0-9]{1,5})?$")]
SubnetId = Annotated[str, Field(pattern=r"^subnet-[0-9a-f]{8,17}$")]
SecurityGroupId = Annotated[str, Field(pattern=r"^sg-[0-9a-f]{8,17}$")]
KeyArn = Annotated[str, Field(pattern=r"^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$")]
TagKey = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9 .:/=+@_-]+$")]
TagValue = Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9 .:/=+@_-]*$")]
BucketName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")]

RECIPES = ("head", "finetune", "lp-ft", "scratch")
FEATURE_RECIPES = ("head", "lp-ft")
"""Recipes that train a linear layer on the frozen backbone's features, which CacheFeatures computes once for all trials."""
STRATEGIES = ("Bayesian", "Random", "Grid", "Hyperband")
WARM_START_TYPES = ("TransferLearning", "IdenticalDataAndAlgorithm")
SCALES = ("Auto", "Linear", "Logarithmic", "ReverseLogarithmic")

# Longest prefix that leaves room for "-" and 16 hash digits in a tuning job's 32 characters, with a little to spare.
MAX_PREFIX = 12


class ConfigError(SystemExit):
    """A configuration that must not be deployed. As a ``SystemExit`` it ends the program with one line and status 1."""


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Range(Section):
    """A searched hyperparameter between two numbers, both included."""

    min: float
    max: float
    scale: Literal["Auto", "Linear", "Logarithmic", "ReverseLogarithmic"] = "Auto"
    integer: bool = False

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min is {self.min:g} and max {self.max:g}; expected min < max")
        if self.scale == "Logarithmic" and self.min <= 0:
            raise ValueError(f"min is {self.min:g} with scale Logarithmic; expected more than 0, or scale Linear")
        if self.scale == "ReverseLogarithmic" and (self.integer or self.min < 0 or self.max >= 1):
            raise ValueError("scale is ReverseLogarithmic; expected numbers from 0 to below 1, not integers, or scale Linear")
        if self.integer and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError(f"min is {self.min:g} and max {self.max:g} with integer true; expected whole numbers")
        return self


def _search_kind(value: Any) -> str:
    """Which of the two forms of a searched hyperparameter ``value`` is meant to be; the tag is a part of error messages."""
    return "range" if isinstance(value, Mapping | Range) else "list"


Choices = Annotated[tuple[str | bool | int | float, ...], Field(min_length=1, max_length=30)]
Searched = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("list")],
    Discriminator(_search_kind),
]
TuningJobName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,31}$")]


class Tuning(Section):
    """Defaults of the hyperparameter search, overridable field by field in the state machine's input."""

    strategy: Literal["Bayesian", "Random", "Grid", "Hyperband"] = "Bayesian"
    max_jobs: int = Field(default=4, ge=1, le=500)
    max_parallel_jobs: int = Field(default=2, ge=1, le=100)
    learning_rate: tuple[float, float] = (0.01, 0.1)
    """Smallest and largest learning rate, searched on a logarithmic scale."""
    batch_size: tuple[int, ...] = (64, 128, 256)
    early_stopping: Literal["Off", "Auto"] = "Off"
    ranges: Annotated[dict[str, Searched], Field(max_length=20)] = {}
    """Further searched hyperparameters by name: ``{"min", "max", "scale", "integer"}``, or a list of values."""
    warm_start: Annotated[tuple[TuningJobName, ...], Field(max_length=5)] = ()
    """Earlier tuning jobs whose trials inform this search, as SageMaker's warm start defines it."""
    warm_start_type: Literal["TransferLearning", "IdenticalDataAndAlgorithm"] = "TransferLearning"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.learning_rate
        if not 0 < low < high <= 10:
            raise ValueError(f"learning_rate is [{low}, {high}]; expected 0 < smallest < largest <= 10")
        if not self.batch_size or not all(1 <= size <= 8192 for size in self.batch_size):
            raise ValueError(f"batch_size is {list(self.batch_size)}; expected one or more integers from 1 to 8192")
        return self


class QualityGate(Section):
    """What a model must reach on the test set before it may serve."""

    min_top1: Fraction = 0.6
    max_drop: Fraction = 0.02
    """How far test top1 may lie below the serving model's on the same test set."""


class MachineInput(Section):
    """Defaults of the state machine's input: what an execution started with ``{}`` does."""

    action: Literal["train", "deploy", "batch"] = "train"
    source: str = Field(min_length=1)
    """``https://`` archive on an allowed host, ``s3://`` prefix or archive, or a key prefix in the data bucket."""
    recipe: Literal["head", "finetune", "lp-ft", "scratch"] = "head"
    backbone: str = Field(default="mobilenet_v2", pattern=r"^[a-z][a-z0-9_]*$")
    pretrained: str = "torchvision"
    """``torchvision``, ``none``, or a URI or key of a state dict (.pth, .pt, .safetensors)."""
    image_size: int = Field(default=224, ge=16, le=1024)
    hyperparameters: dict[str, str | bool | int | float] = {}
    tuning: Tuning = Tuning()
    quality_gate: QualityGate = QualityGate()
    model_package: str = ""
    """With action deploy: what to deploy. With action batch: what classifies, the serving model when empty."""
    input: str = ""
    """With action batch: an ``s3://`` prefix, or a key prefix in the data bucket, with the pictures to classify."""
    dry_run: bool = False
    """Ask for quotas, data and images only; start nothing."""

    @model_validator(mode="after")
    def _weights_fit_recipe(self) -> Self:
        if self.recipe != "scratch" and self.pretrained == "none":
            raise ValueError(f"recipe is {self.recipe} with pretrained none; expected weights, or recipe scratch")
        return self


class Jobs(Section):
    """Machines for one kind of job."""

    instance_type: InstanceType = "ml.m5.xlarge"
    instance_count: int = Field(default=1, ge=1, le=16)
    """Machines that a training or a trial shares its work over, by torchrun. Processing takes one; see ``prepare_instances``."""
    volume_gb: int = Field(default=30, ge=10, le=16384)
    max_runtime_s: int = Field(default=3600, ge=60, le=432_000)
    spot: bool = False
    """Managed spot training: cheaper, may be interrupted. Processing jobs have no spot."""
    max_wait_s: int = Field(default=0, ge=0, le=432_000)
    """Longest time for running plus waiting for spot capacity; 0 means twice ``max_runtime_s``."""

    @property
    def wait_s(self) -> int:
        """Longest time in seconds that a job may run and wait for capacity."""
        return (self.max_wait_s or 2 * self.max_runtime_s) if self.spot else self.max_runtime_s

    @property
    def gpu(self) -> bool:
        """Whether the machine has an NVIDIA GPU, so that the CUDA container is needed."""
        return self.instance_type.startswith(("ml.g", "ml.p"))

    @property
    def distributed(self) -> bool:
        """Whether a training takes more than one process: on several GPUs of a machine, or on several machines."""
        return self.instance_count > 1 or gpu_count(self.instance_type) > 1

    @model_validator(mode="after")
    def _known_machine(self) -> Self:
        gpu_count(self.instance_type)
        return self

    @model_validator(mode="after")
    def _wait_longer_than_run(self) -> Self:
        if self.spot and self.max_wait_s and self.max_wait_s < self.max_runtime_s:
            raise ValueError(f"max_wait_s is {self.max_wait_s}; expected 0 or at least max_runtime_s = {self.max_runtime_s}")
        return self


class Endpoint(Section):
    """How the model is served. ``serverless`` costs nothing when idle; ``realtime`` keeps machines running."""

    mode: Literal["serverless", "realtime"] = "serverless"
    memory_mb: Literal[1024, 2048, 3072, 4096, 5120, 6144] = 2048
    max_concurrency: int = Field(default=5, ge=1, le=200)
    instance_type: InstanceType = "ml.c6i.large"
    min_instances: int = Field(default=1, ge=1, le=100)
    """Machines of a real-time endpoint that always run, and are paid for, until the endpoint is deleted."""
    max_instances: int = Field(default=1, ge=1, le=100)
    """Machines that target tracking may go up to; equal to ``min_instances`` there is no scaling."""
    target_invocations_per_minute: int = Field(default=1200, ge=1, le=1_000_000)
    """Requests a minute and machine that scaling aims at (SageMakerVariantInvocationsPerInstance)."""
    scale_out_cooldown_s: int = Field(default=60, ge=0, le=3600)
    scale_in_cooldown_s: int = Field(default=300, ge=0, le=3600)
    update: Literal["all_at_once", "canary", "rolling"] = "all_at_once"
    """How a new model takes over on a real-time endpoint: all at once or after a canary on a second fleet (blue/green), or
    machine by machine (rolling)."""
    canary_percent: int = Field(default=10, ge=1, le=50)
    """Share of the new fleet that is tried first (canary), or that is replaced at a time (rolling)."""
    bake_s: int = Field(default=120, ge=0, le=3600)
    """How long the alarms are watched before the next step; when one rings, the old model serves on."""
    max_latency_ms: int = Field(default=1000, ge=1, le=60_000)
    """p99 of the model's own time above which a new model is taken back."""
    startup_s: int = Field(default=300, ge=60, le=3600)
    """How long a real-time container may take until it answers; a broken model is given up after this."""
    idle_hours: int = Field(default=0, ge=0, le=720)
    """A real-time endpoint that nobody has asked for so long is removed, and comes back when somebody asks; 0: never."""
    deadline_s: int = Field(default=1800, ge=60, le=14_400)
    """Longest time to wait for the endpoint to become InService."""

    @property
    def scales(self) -> bool:
        """Whether the number of machines follows the load."""
        return self.mode == "realtime" and self.max_instances > self.min_instances

    @property
    def sleeps(self) -> bool:
        """Whether an endpoint that nobody asks is removed."""
        return self.mode == "realtime" and self.idle_hours > 0

    @property
    def gpu(self) -> bool:
        """Whether the machine has an NVIDIA GPU, so that the serving image with torch is needed."""
        return self.mode == "realtime" and self.instance_type.startswith(("ml.g", "ml.p"))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_instances < self.min_instances:
            raise ValueError(f"max_instances is {self.max_instances}; expected at least min_instances = {self.min_instances}")
        if self.mode == "serverless" and self.idle_hours:
            raise ValueError(f"idle_hours is {self.idle_hours} with mode serverless; expected 0: it costs nothing when idle anyway")
        if self.update == "rolling" and self.canary_percent < 5:
            raise ValueError(
                f"canary_percent is {self.canary_percent} with update rolling; expected 5 to 50, as SageMaker takes it"
            )
        if self.update != "all_at_once" and self.mode == "realtime" and self.min_instances < 2:
            # SageMaker's canary is at most half of the new fleet.
            raise ValueError(f"update is {self.update} with min_instances 1; expected at least 2 machines, or update all_at_once")
        return self


class Network(Section):
    """Where jobs and endpoint have their network interfaces; by default AWS's own network, with a way to the internet."""

    vpc: Literal["none", "create", "existing"] = "none"
    """``create``: a VPC with private subnets and endpoints to AWS's services, without a way to the internet. It costs money by the
    hour, used or not (docs/costs.md). ``existing``: the subnets and security groups that are named here."""
    subnet_ids: Annotated[tuple[SubnetId, ...], Field(max_length=16)] = ()
    security_group_ids: Annotated[tuple[SecurityGroupId, ...], Field(max_length=5)] = ()
    isolation: bool = False
    """No network at all for what runs a model: trials, training, feature caching, batch jobs and a real-time endpoint. Their code,
    packages and weights come through channels. PrepareData, Evaluate and Report talk to S3 and SageMaker, and keep the network."""
    wheels: str = Field(default="", pattern=r"^$|^[a-z][a-z0-9/_-]*/$")
    """Key prefix in the data bucket with the Python packages of model_code/requirements.txt as wheels; empty: from PyPI."""

    @property
    def own(self) -> bool:
        """Whether jobs and endpoint are placed in a VPC."""
        return self.vpc != "none"

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        named = bool(self.subnet_ids) and bool(self.security_group_ids)
        if self.vpc == "existing" and not named:
            raise ValueError("vpc is existing; expected subnet_ids and security_group_ids of that VPC")
        if self.vpc != "existing" and (self.subnet_ids or self.security_group_ids):
            raise ValueError(f"subnet_ids and security_group_ids are given with vpc {self.vpc}; expected vpc existing")
        if self.isolation and not self.wheels:
            raise ValueError("isolation is true without wheels; expected a prefix such as wheels/: there is no way to PyPI")
        if self.vpc == "create" and not self.wheels:
            raise ValueError("vpc is create without wheels; expected a prefix such as wheels/: there is no way to PyPI")
        return self


class Triggers(Section):
    """What starts executions by itself. Off by default: every execution costs money."""

    schedule: str = Field(default="", pattern=r"^$|^(rate|cron)\([a-zA-Z0-9 *?/,#-]+\)$")
    """EventBridge's ``rate(7 days)`` or ``cron(0 3 ? * MON *)``, in UTC; empty: none."""
    incoming: bool = False
    """Whether new files under ``incoming/`` of the data bucket start an execution: one for many files, see ``quiet_s``."""
    quiet_s: int = Field(default=900, ge=60, le=86_400)
    """How long no further file must arrive before the execution starts."""


class Api(Section):
    """The public HTTP interface."""

    auth: Literal["token", "iam"] = "token"
    throttle_rate: float = Field(default=20, gt=0, le=10_000)
    """Requests per second, over all callers."""
    throttle_burst: int = Field(default=40, ge=1, le=5_000)
    max_megapixels: int = Field(default=50, ge=1, le=500)
    """Pictures with more pixels are refused from their header, before anything is decoded."""
    cors_origins: Annotated[tuple[Origin, ...], Field(max_length=10)] = ()
    """Origins of other web pages that may call the API from a browser, such as ``https://www.example.com``."""


class StageConfig(Section):
    """Everything that differs between stages."""

    stage: str = Field(pattern=r"^[a-z][a-z0-9]{0,9}$")
    name: str = Field(default="dogs", pattern=r"^[a-z][a-z0-9-]*$")
    removal: Literal["destroy", "retain"] = "destroy"
    """What happens to data when the stack is deleted."""
    retention_days: Literal[1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731] = 14
    """How long logs, checkpoints and superseded object versions are kept."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    input: MachineInput
    allowed_hosts: tuple[HostName, ...] = ()
    """Hosts from which PrepareData may download an archive."""
    source_buckets: tuple[BucketName, ...] = ()
    """Further buckets that PrepareData may read, in this account or another's; docs/deployment.md has the policy they need."""
    source_keys: tuple[KeyArn, ...] = ()
    """KMS keys with which the objects of ``source_buckets`` are encrypted."""
    data_bucket: Literal[""] | BucketName = ""
    """An existing bucket to use instead of one of our own; its encryption, life cycle and logs stay its owner's."""
    kms_key: Literal["", "create"] | KeyArn = ""
    """Empty: AWS's own keys. ``create``: a customer key of this stack for all that is stored; or the ARN of an existing key."""
    permissions_boundary: str = Field(default="", pattern=r"^$|^arn:aws[a-z-]*:iam::[0-9]{12}:policy/[\w+=,.@/-]+$")
    """ARN of the policy that limits every role of the stack."""
    tags: Annotated[dict[TagKey, TagValue], Field(max_length=40)] = {}
    """Tags of everything that the stack and its executions make, beside ``project`` and ``run``."""
    network: Network = Network()
    triggers: Triggers = Triggers()
    tracing: bool = True
    """Whether X-Ray follows executions and requests."""
    monthly_budget_usd: int = Field(default=0, ge=0, le=1_000_000)
    """With ``alarm_email``: a message when this stage's tagged costs of a month reach 80 % of it, and when they are forecast to
    exceed it; 0: none."""
    processing: Jobs = Jobs()
    prepare_instances: int = Field(default=1, ge=1, le=20)
    """Machines that PrepareData shares the pictures over."""
    batch_instances: int = Field(default=1, ge=1, le=20)
    """Machines that ``action: batch`` shares the pictures over."""
    tuning_jobs: Jobs = Jobs()
    training: Jobs = Jobs()
    max_trials: int = Field(default=100, ge=1, le=500)
    """Upper limit of ``tuning.max_jobs`` in an execution's input: a guard against an expensive typing error."""
    endpoint: Endpoint = Endpoint()
    api: Api = Api()
    api_url: str = "https://{api}.execute-api.{region}.{suffix}/{stage}"
    """Address of the API: ``{api}``, ``{region}``, ``{suffix}`` (amazonaws.com) and ``{stage}`` are filled in on deployment."""
    managed_debugger: bool = False
    """Adds SageMaker Debugger's own fields to the training request, beside our own hook, rules and report.

    Off by default: the service is closed to new customers since 2026-07-30, and need not accept its fields from them."""
    serving_image_uri: str = Field(
        default="",
        pattern=r"^$|^[0-9]{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/[a-z0-9._/-]+(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]{64})$",
    )
    """An existing serving image in ECR; empty: CodeBuild builds one from model_code/Dockerfile when it is missing."""
    poll_seconds: int = Field(default=15, ge=1, le=300)
    """Pause between two looks at a changing endpoint."""
    alarm_email: str = Field(default="", pattern=r"^$|^[^@\s]+@[^@\s]+$")

    @property
    def prefix(self) -> str:
        """Common start of every name that this stage makes, e.g. ``dogs-dev``."""
        return f"{self.name}-{self.stage}"

    @property
    def stack_name(self) -> str:
        """Name of the CloudFormation stack. With ``name`` in it, a renamed stage is a stack of its own: CloudFormation would
        otherwise change the old one, and forget the endpoint that executions had made under the old name."""
        return f"ImageClassifier-{self.prefix}"

    @property
    def destroys_data(self) -> bool:
        """Whether deleting the stack deletes its data."""
        return self.removal == "destroy"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.prefix) > MAX_PREFIX:
            raise ValueError(f"name and stage make {self.prefix!r}; expected at most {MAX_PREFIX} characters: shorten name")
        if "{api}" not in self.api_url:
            raise ValueError(f"api_url is {self.api_url!r}; expected a template with {{api}}")
        if self.input.tuning.max_jobs > self.max_trials:
            raise ValueError(
                f"input.tuning.max_jobs is {self.input.tuning.max_jobs}; expected at most max_trials = {self.max_trials}"
            )
        if self.processing.spot:
            raise ValueError("processing.spot is true; expected false: SageMaker has no spot for processing jobs")
        if self.processing.instance_count > 1:
            raise ValueError(
                f"processing.instance_count is {self.processing.instance_count}; expected 1: only PrepareData shares its work, "
                "use prepare_instances"
            )
        return self

    @model_validator(mode="after")
    def _company_rules(self) -> Self:
        if self.network.isolation and self.input.pretrained == "torchvision":
            raise ValueError(
                "input.pretrained is torchvision with network.isolation; expected a key such as pretrained/resnet50.pth, or none "
                "with recipe scratch: the weights come through the channel pretrained"
            )
        if self.network.vpc == "create" and self.allowed_hosts:
            raise ValueError(
                f"allowed_hosts is {list(self.allowed_hosts)} with network.vpc create; expected []: there is no way to the "
                "internet, upload the archive to incoming/"
            )
        if (self.network.own or self.network.isolation) and self.endpoint.mode == "serverless":
            raise ValueError(
                "endpoint.mode is serverless with network.vpc or network.isolation; expected realtime: SageMaker keeps serverless "
                "endpoints in its own network"
            )
        if self.source_keys and not self.source_buckets:
            raise ValueError("source_keys are given without source_buckets; expected the buckets whose objects they encrypt")
        for name in self.tags:
            if name.lower() in ("project", "run") or name.lower().startswith("aws:"):
                raise ValueError(f"tags names {name}; expected another name: project, run and aws:… are set by others")
        if self.monthly_budget_usd and not self.alarm_email:
            raise ValueError(f"monthly_budget_usd is {self.monthly_budget_usd} without alarm_email; expected an address to tell")
        return self

    @model_validator(mode="after")
    def _machines_pay_off(self) -> Self:
        for name, jobs in (("training", self.training), ("tuning_jobs", self.tuning_jobs)):
            if self.input.recipe == "head" and jobs.instance_count > 1:
                raise ValueError(
                    f"{name}.instance_count is {jobs.instance_count} with recipe head; expected 1: a linear layer on cached "
                    "features takes seconds, further machines would only cost. Or choose recipe finetune, lp-ft or scratch"
                )
        return self


class ContextReader(Protocol):
    """What ``load`` needs of a CDK construct node."""

    def try_get_context(self, key: str) -> Any:
        """The value of a context key, or None."""
        ...


class FileContext:
    """``cdk.json``'s context with changes, read as CDK's command line reads it."""

    def __init__(self, **changes: Any) -> None:
        context = json.loads((Path(__file__).resolve().parent.parent / "cdk.json").read_text())["context"]
        self.values = merged(context, changes)

    def try_get_context(self, key: str) -> Any:
        """The value of a context key, or None."""
        return self.values.get(key)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``base``, object by object; lists and scalars replace."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def load(node: ContextReader) -> StageConfig:
    """The configuration that the context names.

    Raises ConfigError, with one line saying value, expectation and remedy, for anything that must not be deployed.
    """
    stage = node.try_get_context("stage") or "dev"
    stages = node.try_get_context("stages")
    if not isinstance(stages, Mapping):
        raise ConfigError("cdk.json: context.stages is missing; expected an object with one entry per stage, such as dev.")
    values = _resolved(stages, stage)
    values = merged(values, _override(node.try_get_context("override")))
    if node.try_get_context("api_url"):
        values["api_url"] = node.try_get_context("api_url")
    try:
        return StageConfig(**values, stage=stage)
    except (ValidationError, TypeError) as error:
        raise ConfigError(_message(stage, error)) from None


def _resolved(stages: Mapping[str, Any], stage: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The stage's values with those of the stages it extends below them."""
    if stage not in stages:
        raise ConfigError(f"stage is {stage!r}; expected one of {', '.join(sorted(stages))}: -c stage=… or cdk.json stages.")
    if stage in seen:
        raise ConfigError(f"cdk.json stages: {' -> '.join((*seen, stage))} extend each other; remove one 'extends'.")
    values = dict(stages[stage])
    parent = values.pop("extends", None)
    return values if parent is None else merged(_resolved(stages, parent, (*seen, stage)), values)


def _override(text: Any) -> dict[str, Any]:
    """The object given as ``-c override='{…}'``."""
    if not text:
        return {}
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ConfigError(f"override is {text!r}; expected a JSON object ({error}).") from None
    if not isinstance(value, dict):
        raise ConfigError(f'override is {text!r}; expected a JSON object such as \'{{"training": {{"spot": true}}}}\'.')
    return value


def _message(stage: str, error: ValidationError | TypeError) -> str:
    """One line for all problems of a configuration."""
    if isinstance(error, TypeError):
        return f"cdk.json stage {stage}: {error}; remove the name 'stage' from the stage's own values."
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{path} is unknown; expected one of {', '.join(_names_at(item['loc'][:-1]))}")
        elif item["type"] == "missing":
            problems.append(f"{path} is missing; add it to the stage in cdk.json")
        else:
            problems.append(f"{path} is {item['input']!r}: {item['msg']}" if path else item["msg"])
    return f"cdk.json stage {stage}: {'; '.join(problems)}."


def _names_at(path: tuple[int | str, ...]) -> list[str]:
    """The field names of the section at ``path``."""
    model: type[BaseModel] = StageConfig
    for part in path:
        field = model.model_fields.get(str(part))
        # Inside tuning.ranges come a hyperparameter's name and the tag of its form.
        annotation = field.annotation if field else Range
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return sorted(model.model_fields)
