"""IAM checks of each operation, after AWS's service authorization reference for SageMaker."""

from __future__ import annotations

from typing import Any

from local_cloud.sagemaker.common import Request, arn
from local_cloud.sagemaker.registry import Registry
from local_cloud.service import Cloud, Permission

_PRINCIPAL = {"iam:PassedToService": "sagemaker.amazonaws.com"}
_RESOURCES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("CreateTrainingJob", "DescribeTrainingJob", "StopTrainingJob"), (("training-job", "TrainingJobName"),)),
    **dict.fromkeys(
        ("CreateProcessingJob", "DescribeProcessingJob", "StopProcessingJob"), (("processing-job", "ProcessingJobName"),)
    ),
    **dict.fromkeys(
        (
            *("CreateHyperParameterTuningJob", "DescribeHyperParameterTuningJob", "StopHyperParameterTuningJob"),
            "ListTrainingJobsForHyperParameterTuningJob",
        ),
        (("hyper-parameter-tuning-job", "HyperParameterTuningJobName"),),
    ),
    **dict.fromkeys(("CreateModel", "DescribeModel", "DeleteModel"), (("model", "ModelName"),)),
    **dict.fromkeys(
        ("CreateEndpointConfig", "DescribeEndpointConfig", "DeleteEndpointConfig"), (("endpoint-config", "EndpointConfigName"),)
    ),
    **dict.fromkeys(
        ("CreateEndpoint", "UpdateEndpoint"), (("endpoint", "EndpointName"), ("endpoint-config", "EndpointConfigName"))
    ),
    **dict.fromkeys(("DescribeEndpoint", "DeleteEndpoint", "InvokeEndpoint"), (("endpoint", "EndpointName"),)),
    **dict.fromkeys(
        ("CreateModelPackageGroup", "DescribeModelPackageGroup", "DeleteModelPackageGroup"),
        (("model-package-group", "ModelPackageGroupName"),),
    ),
}
"""Resource types of an operation and the request field that names each. Operations that name none are checked on ``*``."""
_PACKAGE_FIELDS = {
    "DescribeModelPackage": "ModelPackageName",
    "DeleteModelPackage": "ModelPackageName",
    "UpdateModelPackage": "ModelPackageArn",
}
_TAG_OPERATIONS = ("AddTags", "ListTags", "DeleteTags")


def permissions(cloud: Cloud, registry: Registry, operation: str, request: Request) -> list[Permission]:
    """The action on each of its resources, ``iam:PassRole`` for each role handed over, ``sagemaker:AddTags`` for tags."""
    resources = _resources(cloud, registry, operation, request)
    tags = _tag_context(request)
    checks = [Permission(f"sagemaker:{operation}", resource, dict(tags)) for resource in resources]
    if operation.startswith("Create") and request.get("Tags"):
        checks.append(Permission("sagemaker:AddTags", resources[0], dict(tags)))
    return checks + [Permission("iam:PassRole", role, dict(_PRINCIPAL)) for role in _roles(request)]


def _resources(cloud: Cloud, registry: Registry, operation: str, request: Request) -> list[str]:
    if operation in _TAG_OPERATIONS:
        return [request["ResourceArn"]]
    if operation in _PACKAGE_FIELDS:
        return [registry.package_arn(request[_PACKAGE_FIELDS[operation]])]
    if operation == "CreateModelPackage":
        return [registry.next_package_arn(request)]
    named = _RESOURCES.get(operation)
    if named is None:
        return ["*"]
    return [arn(cloud, kind, str(request[field]).rsplit("/", 1)[-1]) for kind, field in named]


def _roles(request: Request) -> list[str]:
    definition = request.get("TrainingJobDefinition", {})
    given = (request.get("RoleArn"), request.get("ExecutionRoleArn"), definition.get("RoleArn"))
    return [role for role in given if role]


def _tag_context(request: Request) -> dict[str, Any]:
    tags = request.get("Tags") or []
    if not tags:
        return {}
    return {"aws:TagKeys": [tag["Key"] for tag in tags], **{f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in tags}}
