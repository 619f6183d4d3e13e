"""Models, endpoint configurations, model package groups and model packages: records without processes."""

from __future__ import annotations

import copy
import threading
from typing import Any

from local_cloud.images import Images
from local_cloud.sagemaker.common import Record, Request, Tags, arn, invalid, now, page, select
from local_cloud.sagemaker.container import assume
from local_cloud.service import Caller, Cloud, ServiceError

_MEMORY_SIZES = (1024, 2048, 3072, 4096, 5120, 6144)
_MAX_CONCURRENCY = 200


def _user(caller: Caller) -> Record:
    return {"IamIdentity": {"Arn": caller.arn, "PrincipalId": caller.access_key_id}}


class Registry:
    """The records. Reads return copies."""

    def __init__(self, cloud: Cloud, images: Images, tags: Tags) -> None:
        self._cloud, self._images, self._tags = cloud, images, tags
        self._lock = threading.RLock()
        self._models: dict[str, Record] = {}
        self._configs: dict[str, Record] = {}
        self._groups: dict[str, Record] = {}
        self._packages: dict[str, Record] = {}
        self._versions: dict[str, int] = {}

    # -- models --------------------------------------------------------------------------------------------------------

    def create_model(self, request: Request) -> Record:
        """CreateModel."""
        name, resource = request["ModelName"], arn(self._cloud, "model", request["ModelName"])
        container = self._container(request)
        if "ExecutionRoleArn" not in request:
            raise invalid("ExecutionRoleArn is required to read the model's data and image.")
        self._images.check(container["Image"])
        assume(self._cloud, request["ExecutionRoleArn"], name)
        kept = {key: copy.deepcopy(value) for key, value in request.items() if key != "Tags"}
        with self._lock:
            if name in self._models:
                raise invalid(f'Cannot create already existing model "{resource}".')
            self._models[name] = {**kept, "ModelArn": resource, "CreationTime": now()}
            self._tags.add(resource, request.get("Tags", []))
        return {"ModelArn": resource}

    def _container(self, request: Request) -> Record:
        """The one container, a model package resolved to what it holds."""
        containers = [request["PrimaryContainer"]] if "PrimaryContainer" in request else request.get("Containers", [])
        if len(containers) != 1:
            raise invalid(f"A model needs exactly one container here, got {len(containers)}: give PrimaryContainer.")
        container = dict(containers[0])
        if "ModelPackageName" in container:
            package = self.package(container["ModelPackageName"])
            if package.get("ModelApprovalStatus", "Approved") != "Approved":
                state = package["ModelApprovalStatus"]
                raise invalid(f"Model package {package['ModelPackageArn']} is {state}: approve it with UpdateModelPackage first.")
            if "InferenceSpecification" not in package:
                raise invalid(f"Model package {package['ModelPackageArn']} has no InferenceSpecification.")
            source = package["InferenceSpecification"]["Containers"][0]
            container = {**{key: source[key] for key in ("Image", "ModelDataUrl", "Environment") if key in source}, **container}
        if "Image" not in container:
            raise invalid("PrimaryContainer needs Image or ModelPackageName.")
        return container

    def container(self, model: str) -> tuple[Record, str]:
        """Container and execution role of a model."""
        record = self.describe_model({"ModelName": model})
        return self._container(record), str(record["ExecutionRoleArn"])

    def describe_model(self, request: Request) -> Record:
        """DescribeModel."""
        return self._get(self._models, request["ModelName"], "model", "model")

    def delete_model(self, request: Request) -> Record:
        """DeleteModel."""
        return self._delete(self._models, request["ModelName"], "model", "model")

    def list_models(self, request: Request) -> Record:
        """ListModels."""
        items = self._items(self._models, ("ModelName", "ModelArn", "CreationTime"))
        return page("Models", select(items, request, name="ModelName"), request)

    # -- endpoint configurations -----------------------------------------------------------------------------------------

    def create_config(self, request: Request) -> Record:
        """CreateEndpointConfig."""
        name, resource = request["EndpointConfigName"], arn(self._cloud, "endpoint-config", request["EndpointConfigName"])
        variants = request["ProductionVariants"]
        names = [variant["VariantName"] for variant in variants]
        if len(set(names)) != len(names) or not names:
            raise invalid(f"ProductionVariants need different names and at least one variant, got {names}.")
        for variant in variants:
            self._check_variant(variant)
        kept = {key: copy.deepcopy(value) for key, value in request.items() if key != "Tags"}
        for variant in kept["ProductionVariants"]:
            variant.setdefault("InitialVariantWeight", 1.0)
        with self._lock:
            if name in self._configs:
                raise invalid(f'Cannot create already existing endpoint configuration "{resource}".')
            self._configs[name] = {**kept, "EndpointConfigArn": resource, "CreationTime": now()}
            self._tags.add(resource, request.get("Tags", []))
        return {"EndpointConfigArn": resource}

    def _check_variant(self, variant: Record) -> None:
        name = variant["VariantName"]
        if "ModelName" not in variant:
            raise invalid(f"Variant {name!r} needs ModelName: inference components are not emulated.")
        if variant["ModelName"] not in self._models:
            raise invalid(f'Could not find model "{arn(self._cloud, "model", variant["ModelName"])}".')
        serverless = variant.get("ServerlessConfig")
        if serverless is None:
            if "InstanceType" not in variant or "InitialInstanceCount" not in variant:
                raise invalid(f"Variant {name!r} needs ServerlessConfig, or InstanceType and InitialInstanceCount.")
            return
        if "InstanceType" in variant or "InitialInstanceCount" in variant:
            raise invalid(f"Variant {name!r} has both ServerlessConfig and instances: give one of them.")
        if serverless["MemorySizeInMB"] not in _MEMORY_SIZES:
            raise invalid(f"MemorySizeInMB={serverless['MemorySizeInMB']} must be one of {_MEMORY_SIZES}.")
        if not 1 <= serverless["MaxConcurrency"] <= _MAX_CONCURRENCY:
            raise invalid(f"MaxConcurrency={serverless['MaxConcurrency']} must be in [1, {_MAX_CONCURRENCY}].")

    def describe_config(self, request: Request) -> Record:
        """DescribeEndpointConfig."""
        return self._get(self._configs, request["EndpointConfigName"], "endpoint-config", "endpoint configuration")

    def delete_config(self, request: Request) -> Record:
        """DeleteEndpointConfig."""
        return self._delete(self._configs, request["EndpointConfigName"], "endpoint-config", "endpoint configuration")

    def list_configs(self, request: Request) -> Record:
        """ListEndpointConfigs."""
        items = self._items(self._configs, ("EndpointConfigName", "EndpointConfigArn", "CreationTime"))
        return page("EndpointConfigs", select(items, request, name="EndpointConfigName"), request)

    # -- model package groups --------------------------------------------------------------------------------------------

    def create_group(self, request: Request, caller: Caller) -> Record:
        """CreateModelPackageGroup."""
        name, resource = request["ModelPackageGroupName"], arn(self._cloud, "model-package-group", request["ModelPackageGroupName"])
        kept = {key: value for key, value in request.items() if key != "Tags"}
        with self._lock:
            if name in self._groups:
                raise invalid(f"Model Package Group already exists: {resource}")
            more = {"ModelPackageGroupArn": resource, "CreationTime": now(), "CreatedBy": _user(caller)}
            self._groups[name] = {**kept, **more, "ModelPackageGroupStatus": "Completed"}
            self._tags.add(resource, request.get("Tags", []))
        return {"ModelPackageGroupArn": resource}

    def _group(self, name: str) -> Record:
        short = name.rsplit("/", 1)[-1]
        with self._lock:
            if short not in self._groups:
                raise invalid(f"ModelPackageGroup {arn(self._cloud, 'model-package-group', short)} does not exist.")
            return self._groups[short]

    def describe_group(self, request: Request) -> Record:
        """DescribeModelPackageGroup."""
        return copy.deepcopy(self._group(request["ModelPackageGroupName"]))

    def delete_group(self, request: Request) -> Record:
        """DeleteModelPackageGroup: only an empty one."""
        group = self._group(request["ModelPackageGroupName"])
        with self._lock:
            name = group["ModelPackageGroupName"]
            if any(package.get("ModelPackageGroupName") == name for package in self._packages.values()):
                message = f"Model Package Group {group['ModelPackageGroupArn']} cannot be deleted: it still contains packages."
                raise ServiceError("ConflictException", message)
            del self._groups[name]
            self._tags.drop(group["ModelPackageGroupArn"])
        return {}

    def list_groups(self, request: Request) -> Record:
        """ListModelPackageGroups."""
        fields = ("ModelPackageGroupName", "ModelPackageGroupArn", "ModelPackageGroupDescription", "CreationTime")
        items = self._items(self._groups, (*fields, "ModelPackageGroupStatus"))
        chosen = select(items, request, name="ModelPackageGroupName")
        return page("ModelPackageGroupSummaryList", chosen, request)

    # -- model packages ------------------------------------------------------------------------------------------------

    def next_package_arn(self, request: Request) -> str:
        """ARN that CreateModelPackage will give."""
        if "ModelPackageGroupName" not in request:
            return arn(self._cloud, "model-package", request.get("ModelPackageName", "*"))
        group = request["ModelPackageGroupName"].rsplit("/", 1)[-1]
        with self._lock:
            return arn(self._cloud, "model-package", f"{group}/{self._versions.get(group, 0) + 1}")

    def create_package(self, request: Request, caller: Caller) -> Record:
        """CreateModelPackage."""
        if ("ModelPackageName" in request) == ("ModelPackageGroupName" in request):
            raise invalid("Give ModelPackageGroupName for a versioned model package, or ModelPackageName for one without versions.")
        kept = {key: copy.deepcopy(value) for key, value in request.items() if key not in ("Tags", "ClientToken")}
        with self._lock:
            if "ModelPackageGroupName" in request:
                group = self._group(request["ModelPackageGroupName"])["ModelPackageGroupName"]
                version = self._versions.get(group, 0) + 1
                resource = arn(self._cloud, "model-package", f"{group}/{version}")
                self._versions[group] = version
                kept.update(ModelPackageGroupName=group, ModelPackageVersion=version, ModelPackageName=group)
                kept.setdefault("ModelApprovalStatus", "PendingManualApproval")
            else:
                resource = arn(self._cloud, "model-package", request["ModelPackageName"])
            if resource in self._packages:
                raise ServiceError("ConflictException", f"Model Package already exists: {resource}")
            more = {"ModelPackageArn": resource, "CreationTime": now(), "CreatedBy": _user(caller), "LastModifiedTime": now()}
            details: Record = {"ValidationStatuses": [], "ImageScanStatuses": []}
            state = {"ModelPackageStatus": "Completed", "ModelPackageStatusDetails": details}
            self._packages[resource] = {**kept, **more, **state, "CertifyForMarketplace": False}
            self._tags.add(resource, request.get("Tags", []))
        return {"ModelPackageArn": resource}

    def package_arn(self, name: str) -> str:
        """ARN of a package given by name or ARN."""
        return name.lower() if name.startswith("arn:") else arn(self._cloud, "model-package", name)

    def package(self, name: str) -> Record:
        """A copy of a package's record."""
        resource = self.package_arn(name)
        with self._lock:
            if resource not in self._packages:
                raise invalid(f"ModelPackage {resource} does not exist.")
            return copy.deepcopy(self._packages[resource])

    def describe_package(self, request: Request) -> Record:
        """DescribeModelPackage."""
        return self.package(request["ModelPackageName"])

    def update_package(self, request: Request, caller: Caller) -> Record:
        """UpdateModelPackage."""
        resource = self.package(request["ModelPackageArn"])["ModelPackageArn"]
        skipped = ("ModelPackageArn", "ClientToken", "CustomerMetadataProperties", "CustomerMetadataPropertiesToRemove")
        with self._lock:
            record = self._packages[resource]
            record.update({key: copy.deepcopy(value) for key, value in request.items() if key not in skipped})
            properties = {**record.get("CustomerMetadataProperties", {}), **request.get("CustomerMetadataProperties", {})}
            for key in request.get("CustomerMetadataPropertiesToRemove", []):
                properties.pop(key, None)
            if properties or "CustomerMetadataProperties" in record:
                record["CustomerMetadataProperties"] = properties
            record.update(LastModifiedTime=now(), LastModifiedBy=_user(caller))
        return {"ModelPackageArn": resource}

    def delete_package(self, request: Request) -> Record:
        """DeleteModelPackage."""
        resource = self.package(request["ModelPackageName"])["ModelPackageArn"]
        with self._lock:
            self._packages.pop(resource, None)
            self._tags.drop(resource)
        return {}

    def list_packages(self, request: Request) -> Record:
        """ListModelPackages: without a group, those without versions, as AWS does (``ModelPackageType`` chooses)."""
        group = request.get("ModelPackageGroupName", "").rsplit("/", 1)[-1]
        kind = request.get("ModelPackageType", "Versioned" if group else "Unversioned")
        fields = ("ModelPackageName", "ModelPackageGroupName", "ModelPackageVersion", "ModelPackageArn", "ModelPackageDescription")
        items = self._items(
            self._packages, (*fields, "CreationTime", "ModelPackageStatus", "ModelApprovalStatus", "ModelLifeCycle")
        )
        chosen = [
            item
            for item in select(items, request, name="ModelPackageName", status="ModelPackageStatus")
            if (not group or item.get("ModelPackageGroupName") == group)
            and (kind == "Both" or (kind == "Versioned") == ("ModelPackageVersion" in item))
            and request.get("ModelApprovalStatus") in (None, item.get("ModelApprovalStatus"))
        ]
        return page("ModelPackageSummaryList", chosen, request)

    # -- shared --------------------------------------------------------------------------------------------------------

    def _get(self, records: dict[str, Record], name: str, kind: str, words: str) -> Record:
        with self._lock:
            if name not in records:
                raise invalid(f'Could not find {words} "{arn(self._cloud, kind, name)}".')
            return copy.deepcopy(records[name])

    def _delete(self, records: dict[str, Record], name: str, kind: str, words: str) -> Record:
        self._get(records, name, kind, words)
        with self._lock:
            records.pop(name, None)
            self._tags.drop(arn(self._cloud, kind, name))
        return {}

    def _items(self, records: dict[str, Record], fields: tuple[str, ...]) -> list[dict[str, Any]]:
        with self._lock:
            return [{key: record[key] for key in fields if key in record} for record in records.values()]
