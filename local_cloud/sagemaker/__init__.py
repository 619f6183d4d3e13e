"""SageMaker on this machine: jobs as subprocesses, tuning, the model registry, endpoints as servers.

What is emulated, ignored and refused stands in ``options.py``. Everything else is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from local_cloud.images import Images
from local_cloud.sagemaker import options
from local_cloud.sagemaker.access import permissions
from local_cloud.sagemaker.common import Record, Request, Tags
from local_cloud.sagemaker.container import Settings
from local_cloud.sagemaker.endpoints import Answer, Endpoints
from local_cloud.sagemaker.jobs import Jobs
from local_cloud.sagemaker.options import IGNORED, REFUSED, SUPPORTED, VALUES
from local_cloud.sagemaker.registry import Registry
from local_cloud.sagemaker.tuning import Tuning
from local_cloud.service import Caller, Cloud, Permission

__all__ = ["IGNORED", "REFUSED", "SUPPORTED", "VALUES", "SageMaker", "Settings"]


class SageMaker:
    """The SageMaker API (``call``) and runtime (``invoke_endpoint``). Implements ``local_cloud.service.Service``."""

    def __init__(self, cloud: Cloud, images: Images, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self._cloud = cloud
        self.tags = Tags()
        self.jobs = Jobs(cloud, images, self.tags, settings)
        self.tuning = Tuning(cloud, self.jobs, self.tags)
        self.registry = Registry(cloud, images, self.tags)
        self.endpoints = Endpoints(cloud, images, self.registry, self.tags, settings)
        self._operations = self._table()

    def permissions(self, operation: str, request: Request) -> list[Permission]:
        """Every IAM check of a request; ``InvokeEndpoint`` included."""
        return permissions(self._cloud, self.registry, operation, request)

    def call(self, operation: str, request: Request, caller: Caller) -> Record:
        """Answer a request or raise ``ServiceError``; fields that are not emulated are refused by name."""
        options.check(operation, request)
        return self._operations[operation](request, caller)

    def invoke_endpoint(self, name: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The runtime's InvokeEndpoint: status, headers, body. Errors come as answers of the REST-JSON protocol, never raised."""
        return self.endpoints.invoke(name, body, headers)

    def stop(self) -> None:
        """End every job and server, and wait for them."""
        self.tuning.stop()
        self.jobs.stop()
        self.endpoints.stop()
        self.tuning.join()

    def _table(self) -> dict[str, Callable[[Request, Caller], Record]]:
        jobs, tuning, registry, endpoints = self.jobs, self.tuning, self.registry, self.endpoints
        plain: dict[str, Callable[[Request], Record]] = {
            "CreateTrainingJob": jobs.call_create_training,
            "DescribeTrainingJob": jobs.describe_training,
            "StopTrainingJob": jobs.stop_training,
            "ListTrainingJobs": jobs.list_training,
            "CreateProcessingJob": jobs.create_processing,
            "DescribeProcessingJob": jobs.describe_processing,
            "StopProcessingJob": jobs.stop_processing,
            "ListProcessingJobs": jobs.list_processing,
            "CreateHyperParameterTuningJob": tuning.create,
            "DescribeHyperParameterTuningJob": tuning.describe,
            "StopHyperParameterTuningJob": tuning.stop_job,
            "ListHyperParameterTuningJobs": tuning.list_jobs,
            "ListTrainingJobsForHyperParameterTuningJob": tuning.list_training,
            "CreateModel": registry.create_model,
            "DescribeModel": registry.describe_model,
            "DeleteModel": registry.delete_model,
            "ListModels": registry.list_models,
            "CreateEndpointConfig": registry.create_config,
            "DescribeEndpointConfig": registry.describe_config,
            "DeleteEndpointConfig": registry.delete_config,
            "ListEndpointConfigs": registry.list_configs,
            "CreateEndpoint": endpoints.create,
            "DescribeEndpoint": endpoints.describe,
            "UpdateEndpoint": endpoints.update,
            "DeleteEndpoint": endpoints.delete,
            "ListEndpoints": endpoints.list_endpoints,
            "DescribeModelPackageGroup": registry.describe_group,
            "DeleteModelPackageGroup": registry.delete_group,
            "ListModelPackageGroups": registry.list_groups,
            "DescribeModelPackage": registry.describe_package,
            "DeleteModelPackage": registry.delete_package,
            "ListModelPackages": registry.list_packages,
            "AddTags": self._add_tags,
            "ListTags": self._list_tags,
            "DeleteTags": self._delete_tags,
        }
        with_caller: dict[str, Callable[[Request, Caller], Record]] = {
            "CreateModelPackageGroup": registry.create_group,
            "CreateModelPackage": registry.create_package,
            "UpdateModelPackage": registry.update_package,
        }
        return {**{name: _without_caller(function) for name, function in plain.items()}, **with_caller}

    def _add_tags(self, request: Request) -> Record:
        return {"Tags": self.tags.add(request["ResourceArn"], request["Tags"])}

    def _list_tags(self, request: Request) -> Record:
        return {"Tags": self.tags.of(request["ResourceArn"])}

    def _delete_tags(self, request: Request) -> Record:
        self.tags.remove(request["ResourceArn"], request["TagKeys"])
        return {}


def _without_caller(function: Callable[[Request], Record]) -> Callable[[Request, Caller], Record]:
    def call(request: Request, caller: Caller) -> dict[str, Any]:
        del caller
        return function(request)

    return call
