"""Which request fields are emulated, which are ignored because they change nothing here, and which are refused.

``check`` reads the tables: a field in ``SUPPORTED`` acts as on AWS; one in ``IGNORED`` is accepted, recorded and described, with a
reason why it changes nothing locally; a value outside ``VALUES`` and every other field are refused by name. ``REFUSED`` gives the
reasons. ``local_cloud/tables.py`` makes the README's lists from these tables. Paths are AWS's field names joined by dots; lists add
nothing to a path; a path covers everything below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from local_cloud.sagemaker.common import invalid

_TAGS = "Tags"


def _below(prefix: str, *names: str) -> frozenset[str]:
    return frozenset(f"{prefix}.{name}" for name in names)


_S3_CHANNEL = _below(
    "InputDataConfig",
    *("ChannelName", "ContentType", "InputMode", "CompressionType", "RecordWrapperType"),
    *(f"DataSource.S3DataSource.{name}" for name in ("S3DataType", "S3Uri", "S3DataDistributionType")),
)
_TRAINING: frozenset[str] = (
    frozenset({"RoleArn", "Environment", "EnableNetworkIsolation", "CheckpointConfig", "OutputDataConfig.S3OutputPath"})
    | {"EnableManagedSpotTraining"}
    | _S3_CHANNEL
    | _below("AlgorithmSpecification", "TrainingImage", "TrainingInputMode", "MetricDefinitions")
    | _below("ResourceConfig", "InstanceCount")
    | _below("StoppingCondition", "MaxRuntimeInSeconds")
    | _below("OutputDataConfig", "CompressionType")
)
_CONTAINER = ("Image", "ModelDataUrl", "Environment", "ModelPackageName", "Mode")
_LIST = frozenset(
    {"NextToken", "MaxResults", "NameContains", "SortBy", "SortOrder"}
    | {"StatusEquals", "CreationTimeAfter", "CreationTimeBefore", "LastModifiedTimeAfter", "LastModifiedTimeBefore"}
)
_PACKAGE = frozenset(
    {"InferenceSpecification", "ModelApprovalStatus", "CustomerMetadataProperties", "SourceUri", "ModelLifeCycle"}
    | {"ModelCard", "ClientToken"}
)

_SHIFT = (
    *("TrafficRoutingConfiguration.Type", "TrafficRoutingConfiguration.WaitIntervalInSeconds"),
    *("TrafficRoutingConfiguration.CanarySize", "TrafficRoutingConfiguration.LinearStepSize"),
)
_DEPLOYMENT = (
    _below("DeploymentConfig.BlueGreenUpdatePolicy", *_SHIFT)
    | _below("DeploymentConfig.RollingUpdatePolicy", "MaximumBatchSize", "WaitIntervalInSeconds")
    | _below("DeploymentConfig.AutoRollbackConfiguration", "Alarms")
)

SUPPORTED: dict[str, frozenset[str]] = {
    "CreateTrainingJob": _TRAINING
    | {"TrainingJobName", "HyperParameters", _TAGS}
    | _below("AlgorithmSpecification", "ContainerEntrypoint", "ContainerArguments"),
    "CreateProcessingJob": frozenset({"ProcessingJobName", "RoleArn", "Environment", "AppSpecification", _TAGS})
    | _below("ProcessingInputs", "InputName", "S3Input")
    | _below("ProcessingOutputConfig.Outputs", "OutputName", "S3Output")
    | _below("ProcessingResources.ClusterConfig", "InstanceCount")
    | _below("StoppingCondition", "MaxRuntimeInSeconds")
    | _below("NetworkConfig", "EnableNetworkIsolation"),
    "CreateHyperParameterTuningJob": frozenset({"HyperParameterTuningJobName", "WarmStartConfig", _TAGS})
    | _below(
        "HyperParameterTuningJobConfig",
        *("Strategy", "StrategyConfig", "HyperParameterTuningJobObjective", "ResourceLimits", "RandomSeed"),
        *("TrainingJobEarlyStoppingType", "ParameterRanges.IntegerParameterRanges"),
        *("ParameterRanges.ContinuousParameterRanges", "ParameterRanges.CategoricalParameterRanges"),
    )
    | frozenset(f"TrainingJobDefinition.{path}" for path in _TRAINING)
    | _below("TrainingJobDefinition", "DefinitionName", "StaticHyperParameters"),
    "CreateModel": frozenset({"ModelName", "ExecutionRoleArn", "EnableNetworkIsolation", _TAGS})
    | _below("PrimaryContainer", *_CONTAINER)
    | _below("Containers", *_CONTAINER),
    "CreateEndpointConfig": frozenset({"EndpointConfigName", _TAGS})
    | _below(
        "ProductionVariants",
        *(
            "VariantName",
            "ModelName",
            "InitialInstanceCount",
            "InitialVariantWeight",
            "ContainerStartupHealthCheckTimeoutInSeconds",
        ),
        *("ServerlessConfig.MemorySizeInMB", "ServerlessConfig.MaxConcurrency"),
    ),
    "CreateEndpoint": frozenset({"EndpointName", "EndpointConfigName", _TAGS}),
    "UpdateEndpoint": frozenset({"EndpointName", "EndpointConfigName", "RetainAllVariantProperties"}) | _DEPLOYMENT,
    "CreateModelPackageGroup": frozenset({"ModelPackageGroupName", "ModelPackageGroupDescription", _TAGS}),
    "CreateModelPackage": _PACKAGE
    | {"ModelPackageName", "ModelPackageGroupName", "ModelPackageDescription", "MetadataProperties", "ModelMetrics", _TAGS}
    | {"Domain", "Task", "SamplePayloadUrl", "SkipModelValidation", "DriftCheckBaselines"},
    "UpdateModelPackage": _PACKAGE | {"ModelPackageArn", "ApprovalDescription", "CustomerMetadataPropertiesToRemove"},
    "ListTrainingJobs": _LIST,
    "ListProcessingJobs": _LIST,
    "ListHyperParameterTuningJobs": _LIST,
    "ListTrainingJobsForHyperParameterTuningJob": _LIST | {"HyperParameterTuningJobName"},
    "ListModels": _LIST,
    "ListEndpoints": _LIST,
    "ListEndpointConfigs": _LIST,
    "ListModelPackageGroups": _LIST,
    "ListModelPackages": _LIST | {"ModelApprovalStatus", "ModelPackageGroupName", "ModelPackageType"},
    "AddTags": frozenset({"ResourceArn", "Tags"}),
    "ListTags": frozenset({"ResourceArn", "NextToken", "MaxResults"}),
    "DeleteTags": frozenset({"ResourceArn", "TagKeys"}),
}
"""Fields that act as on AWS. Describe, Stop and Delete take one name each and are not listed."""

for _operation, _field in {
    **dict.fromkeys(("DescribeTrainingJob", "StopTrainingJob"), "TrainingJobName"),
    **dict.fromkeys(("DescribeProcessingJob", "StopProcessingJob"), "ProcessingJobName"),
    **dict.fromkeys(("DescribeHyperParameterTuningJob", "StopHyperParameterTuningJob"), "HyperParameterTuningJobName"),
    **dict.fromkeys(("DescribeModel", "DeleteModel"), "ModelName"),
    **dict.fromkeys(("DescribeEndpointConfig", "DeleteEndpointConfig"), "EndpointConfigName"),
    **dict.fromkeys(("DescribeEndpoint", "DeleteEndpoint"), "EndpointName"),
    **dict.fromkeys(("DescribeModelPackageGroup", "DeleteModelPackageGroup"), "ModelPackageGroupName"),
    **dict.fromkeys(("DescribeModelPackage", "DeleteModelPackage"), "ModelPackageName"),
}.items():
    SUPPORTED[_operation] = frozenset({_field})

_MACHINE = "jobs and servers run on this machine, whatever instance is named"
_KEY = "the local S3 and disks hold no KMS-encrypted data"
_TRAINING_IGNORED = {
    "ResourceConfig.InstanceType": _MACHINE,
    "ResourceConfig.VolumeSizeInGB": "jobs use this machine's disk without a quota",
    "ResourceConfig.VolumeKmsKeyId": _KEY,
    "OutputDataConfig.KmsKeyId": _KEY,
    "EnableInterContainerTrafficEncryption": "there is one container",
    "StoppingCondition.MaxWaitTimeInSeconds": "there is no wait for spot capacity",
    "StoppingCondition.MaxPendingTimeInSeconds": "there is no wait for capacity",
    "RetryStrategy": "it concerns internal server errors of the service only",
}

IGNORED: dict[str, dict[str, str]] = {
    "CreateTrainingJob": {
        **_TRAINING_IGNORED,
        "ResourceConfig.KeepAlivePeriodInSeconds": "there is no cluster to keep warm",
        "AlgorithmSpecification.EnableSageMakerMetricsTimeSeries": "metrics are kept with the job in any case",
        **dict.fromkeys(
            ("DebugHookConfig", "DebugRuleConfigurations", "ProfilerConfig", "ProfilerRuleConfigurations"),
            "the managed debugger's agent and rules are AWS's containers; the job's own hook and rules run here too",
        ),
    },
    "CreateProcessingJob": {
        "ProcessingResources.ClusterConfig.InstanceType": _MACHINE,
        "ProcessingResources.ClusterConfig.VolumeSizeInGB": "jobs use this machine's disk without a quota",
        "ProcessingResources.ClusterConfig.VolumeKmsKeyId": _KEY,
        "ProcessingOutputConfig.KmsKeyId": _KEY,
        "NetworkConfig.EnableInterContainerTrafficEncryption": "there is one container",
    },
    "CreateHyperParameterTuningJob": {f"TrainingJobDefinition.{path}": why for path, why in _TRAINING_IGNORED.items()},
    "CreateModel": {
        "PrimaryContainer.ContainerHostname": "there is one container",
        "Containers.ContainerHostname": "there is one container",
    },
    "CreateEndpointConfig": {
        "ProductionVariants.InstanceType": _MACHINE,
        "ProductionVariants.VolumeSizeInGB": "servers use this machine's disk without a quota",
        "ProductionVariants.ModelDataDownloadTimeoutInSeconds": "the copy is local",
        "KmsKeyId": _KEY,
    },
    "CreateModelPackage": {"CertifyForMarketplace": "there is no marketplace"},
}
"""Accepted, described, without effect here: field → reason."""
IGNORED["UpdateEndpoint"] = {
    "DeploymentConfig.BlueGreenUpdatePolicy.TerminationWaitInSeconds": "the old server stops when its requests are answered",
    **{
        f"DeploymentConfig.{policy}.MaximumExecutionTimeoutInSeconds": "the health check has its own deadline"
        for policy in ("BlueGreenUpdatePolicy", "RollingUpdatePolicy")
    },
}

_VPC = "local containers share this machine's network"
_ONE = "one instance per job is emulated"
_ONE_JOB = "jobs run on this machine alone: several instances, and torchrun over them, need AWS"
_PLAIN = "files are handed over as they are: unpack in the job"

VALUES: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "CreateTrainingJob": {
        "AlgorithmSpecification.TrainingInputMode": (("File", "FastFile"), "FastFile is treated as File; there are no pipes"),
        "InputDataConfig.InputMode": (("File", "FastFile"), "FastFile is treated as File; there are no pipes"),
        "InputDataConfig.CompressionType": (("None",), _PLAIN),
        "InputDataConfig.RecordWrapperType": (("None",), _PLAIN),
        "InputDataConfig.DataSource.S3DataSource.S3DataType": (("S3Prefix",), "manifests are not emulated: give a prefix"),
        "InputDataConfig.DataSource.S3DataSource.S3DataDistributionType": (("FullyReplicated",), _ONE),
        "OutputDataConfig.CompressionType": (("GZIP",), "the model is always packed as model.tar.gz"),
        "ResourceConfig.InstanceCount": ((1,), _ONE_JOB),
        "EnableNetworkIsolation": ((False,), _VPC),
    },
    "CreateProcessingJob": {
        "ProcessingInputs.S3Input.S3DataType": (("S3Prefix",), "manifests are not emulated: give a prefix"),
        "ProcessingInputs.S3Input.S3InputMode": (("File",), "there are no pipes"),
        "ProcessingInputs.S3Input.S3CompressionType": (("None",), _PLAIN),
        "ProcessingResources.ClusterConfig.InstanceCount": ((1,), _ONE_JOB),
        "NetworkConfig.EnableNetworkIsolation": ((False,), _VPC),
    },
    "CreateModel": {
        "EnableNetworkIsolation": ((False,), _VPC),
        "PrimaryContainer.Mode": (("SingleModel",), "one model per server"),
        "Containers.Mode": (("SingleModel",), "one model per server"),
    },
}
"""Fields of which only some values are emulated: field → (values, reason)."""
VALUES["CreateHyperParameterTuningJob"] = {
    f"TrainingJobDefinition.{path}": rule for path, rule in VALUES["CreateTrainingJob"].items()
}

REFUSED: dict[str, dict[str, str]] = {
    "CreateTrainingJob": {
        "VpcConfig": _VPC,
        "TensorBoardOutputConfig": "write to the output folder or S3 instead",
        "ExperimentConfig": "SageMaker Experiments are not emulated",
        "AlgorithmSpecification.AlgorithmName": "marketplace algorithms need their containers",
        "AlgorithmSpecification.TrainingImageConfig": "images come from ECR or the deep learning containers",
        "InputDataConfig.DataSource.FileSystemDataSource": "there is no EFS or FSx",
        "InputDataConfig.DataSource.DatasetSource": "give an S3 prefix",
        "InputDataConfig.ShuffleConfig": "it only shuffles manifests and pipes",
        "ResourceConfig.InstanceGroups": _ONE,
        "ResourceConfig.InstancePreferences": "name one InstanceType",
        "ResourceConfig.TrainingPlanArn": "there is no capacity to reserve",
        "ResourceConfig.InstancePlacementConfig": _ONE,
        "RemoteDebugConfig": "attach to the process on this machine instead",
        "InfraCheckConfig": "there is no GPU cluster to check",
        "SessionChainingConfig": "session tags are not emulated",
        "ServerlessJobConfig": "AWS's own fine-tuning service",
        "MlflowConfig": "there is no managed MLflow",
        "ModelPackageConfig": "register the model with CreateModelPackage",
    },
    "CreateProcessingJob": {
        "NetworkConfig.VpcConfig": _VPC,
        "ExperimentConfig": "SageMaker Experiments are not emulated",
        "ProcessingInputs.DatasetDefinition": "there is no Athena or Redshift",
        "ProcessingInputs.AppManaged": "give S3Input",
        "ProcessingOutputConfig.Outputs.FeatureStoreOutput": "there is no Feature Store",
        "ProcessingOutputConfig.Outputs.AppManaged": "give S3Output",
    },
    "CreateHyperParameterTuningJob": {
        "TrainingJobDefinitions": "one TrainingJobDefinition is emulated",
        "Autotune": "give the ranges",
        "HyperParameterTuningJobConfig.ParameterRanges.AutoParameters": "give the ranges",
        "HyperParameterTuningJobConfig.TuningJobCompletionCriteria": "ResourceLimits are the only end",
        "TrainingJobDefinition.TuningObjective": "it belongs to TrainingJobDefinitions",
        "TrainingJobDefinition.HyperParameterRanges": "it belongs to TrainingJobDefinitions",
        "TrainingJobDefinition.HyperParameterTuningResourceConfig": "give ResourceConfig",
        "TrainingJobDefinition.VpcConfig": _VPC,
    },
    "CreateModel": {
        "VpcConfig": _VPC,
        "InferenceExecutionConfig": "one container per model is emulated",
        "PrimaryContainer.ModelDataSource": "give ModelDataUrl with a model.tar.gz",
        "PrimaryContainer.AdditionalModelDataSources": "give ModelDataUrl with a model.tar.gz",
        "PrimaryContainer.MultiModelConfig": "one model per server",
        "PrimaryContainer.ImageConfig": "images come from ECR",
    },
    "CreateEndpointConfig": {
        "DataCaptureConfig": "requests are not captured",
        "AsyncInferenceConfig": "only synchronous invocations are emulated",
        "ExplainerConfig": "Clarify is not emulated",
        "ShadowProductionVariants": "there is no shadow traffic",
        "VpcConfig": _VPC,
        "ExecutionRoleArn": "inference components are not emulated",
        "EnableNetworkIsolation": _VPC,
        "MetricsConfig": "endpoint metrics are published as they are",
        "ProductionVariants.AcceleratorType": "there is no accelerator",
        "ProductionVariants.ServerlessConfig.ProvisionedConcurrency": "servers are always warm here",
        "ProductionVariants.ManagedInstanceScaling": _ONE,
        "ProductionVariants.RoutingConfig": _ONE,
        "ProductionVariants.InstancePools": _ONE,
        "ProductionVariants.CoreDumpConfig": "core dumps stay on this machine",
        "ProductionVariants.InferenceAmiVersion": "there is no machine image",
        "ProductionVariants.EnableSSMAccess": "the server runs on this machine",
        "ProductionVariants.CapacityReservationConfig": "there is no capacity to reserve",
    },
    "CreateEndpoint": {"DeploymentConfig": "there is nothing to shift traffic from: give it with an update"},
    "UpdateEndpoint": {
        "ExcludeRetainedVariantProperties": "the number of machines is the one property that is kept",
        "RetainDeploymentConfig": "name the DeploymentConfig with each update",
        "DeploymentConfig.RollingUpdatePolicy.RollbackMaximumBatchSize": "a rollback moves all traffic at once",
    },
    "CreateModelPackage": {
        "ValidationSpecification": "validation needs batch transform",
        "SourceAlgorithmSpecification": "marketplace algorithms need their containers",
        "AdditionalInferenceSpecifications": "one InferenceSpecification is emulated",
        "SecurityConfig": _KEY,
        "ManagedStorageType": "artifacts stay in your bucket",
        "ModelPackageRegistrationType": "every package is Registered",
    },
}
"""Why a field is refused. A field in no table at all is refused too."""
REFUSED["UpdateModelPackage"] = {"AdditionalInferenceSpecificationsToAdd": "one InferenceSpecification is emulated"}


def check(operation: str, request: Mapping[str, Any]) -> None:
    """Raise ``ValidationException`` naming the first field or value of ``request`` that is not emulated."""
    if operation not in SUPPORTED:
        message = f"{operation} is not emulated by the local cloud. Emulated: {', '.join(sorted(SUPPORTED))}."
        raise invalid(message)
    accepted = SUPPORTED[operation] | IGNORED.get(operation, {}).keys()
    for path, value in _leaves(request, "", accepted):
        if path not in accepted:
            raise invalid(f"{operation}: {path} is not emulated by the local cloud ({_reason(operation, path)}): remove it.")
        if value == {} or value == []:
            continue
        _check_values(operation, path, value)


def _check_values(operation: str, path: str, value: Any) -> None:
    """``path`` may cover fields below it that have rules of their own."""
    rules = VALUES.get(operation, {})
    for found, part in _everything(value, path):
        if found in rules and part not in rules[found][0]:
            allowed = " or ".join(repr(item) for item in rules[found][0])
            message = f"{operation}: {found}={part!r} is not emulated by the local cloud ({rules[found][1]}): use {allowed}."
            raise invalid(message)


def _leaves(value: Any, path: str, accepted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Fields down to the first accepted path or to a plain value."""
    if path and path in accepted:
        yield path, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else name, accepted)
        if path and not value and not any(known.startswith(f"{path}.") for known in accepted):
            yield path, value
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, path, accepted)
        if not value and not any(known.startswith(f"{path}.") for known in accepted):
            yield path, value
    else:
        yield path, value


def _everything(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _everything(part, f"{path}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from _everything(part, path)
    else:
        yield path, value


def _reason(operation: str, path: str) -> str:
    reasons = REFUSED.get(operation, {})
    if operation == "CreateHyperParameterTuningJob" and path.startswith("TrainingJobDefinition."):
        training = {f"TrainingJobDefinition.{name}": why for name, why in REFUSED["CreateTrainingJob"].items()}
        reasons = {**training, **reasons}
    matching = [known for known in reasons if path == known or path.startswith(f"{known}.")]
    return reasons[max(matching, key=len)] if matching else "it would have no effect here"
