"""Application Auto Scaling for endpoint variants: targets and policies are kept and described; nothing is scaled here."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from local_cloud.service import Caller, Cloud, Permission, ServiceError

Record = dict[str, Any]
_KEY = ("ServiceNamespace", "ResourceId", "ScalableDimension")
_DIMENSION = "sagemaker:variant:DesiredInstanceCount"


class Scaling:
    """The service; see ``local_cloud.service.Service``. ``variants`` names the variants of an endpoint, none for a missing one."""

    def __init__(self, cloud: Cloud, variants: Callable[[str], list[str]]) -> None:
        self._cloud, self._variants = cloud, variants
        self._prefix = f"arn:aws:application-autoscaling:{cloud.region}:{cloud.account}:scalable-target"
        self._lock = threading.Lock()
        self._targets: dict[tuple[str, ...], Record] = {}
        self._policies: dict[tuple[str, ...], Record] = {}

    def permissions(self, operation: str, request: Record) -> list[Permission]:
        """The action on the target, with the context keys that AWS sets."""
        found = self._targets.get(_key(request))
        resource = found["ScalableTargetARN"] if found else f"{self._prefix}/new"
        context = {"application-autoscaling:service-namespace": request.get("ServiceNamespace", "")}
        return [Permission(f"application-autoscaling:{operation}", resource, context)]

    def call(self, operation: str, request: Record, caller: Caller) -> Record:
        """Dispatch to the operation of the same name."""
        handlers: dict[str, Callable[[Record], Record]] = {
            "RegisterScalableTarget": self._register,
            "DeregisterScalableTarget": self._deregister,
            "PutScalingPolicy": self._put_policy,
            "DeleteScalingPolicy": self._delete_policy,
            "DescribeScalableTargets": lambda r: {"ScalableTargets": self._of(self._targets, r)},
            "DescribeScalingPolicies": lambda r: {"ScalingPolicies": self._of(self._policies, r)},
        }
        if operation not in handlers:
            raise ServiceError("ValidationException", f"{operation} is not emulated by the local cloud: {', '.join(handlers)}")
        with self._lock:
            return handlers[operation](request)

    def stop(self) -> None:
        """Nothing runs."""

    def _of(self, records: dict[tuple[str, ...], Record], request: Record) -> list[Record]:
        return [record for record in records.values() if record["ServiceNamespace"] == request["ServiceNamespace"]]

    def _register(self, request: Record) -> Record:
        key = _key(request)
        self._check_variant(request)
        known = self._targets.get(key)
        if known is None:
            if not {"MinCapacity", "MaxCapacity"} <= request.keys():
                raise ServiceError("ValidationException", "MinCapacity and MaxCapacity are required for a new scalable target")
            arn = f"{self._prefix}/{uuid.uuid4().hex[:19]}"
            known = {"ScalableTargetARN": arn, "CreationTime": datetime.now(UTC), "RoleARN": "service-linked"}
        self._targets[key] = {**known, **request}
        if self._targets[key]["MinCapacity"] > self._targets[key]["MaxCapacity"]:
            del self._targets[key]
            raise ServiceError("ValidationException", "Maximum capacity cannot be less than minimum capacity")
        return {"ScalableTargetARN": known["ScalableTargetARN"]}

    def _check_variant(self, request: Record) -> None:
        parts = request["ResourceId"].split("/")
        if request["ServiceNamespace"] != "sagemaker" or request["ScalableDimension"] != _DIMENSION or len(parts) != 4:
            raise ServiceError("ValidationException", f"Only {_DIMENSION} of endpoint/<name>/variant/<name> is emulated here")
        if parts[3] not in self._variants(parts[1]):
            message = f"SageMaker endpoint variant not found or not active: {request['ResourceId']}"
            raise ServiceError("ValidationException", message)

    def _deregister(self, request: Record) -> Record:
        key = _key(request)
        if self._targets.pop(key, None) is None:
            raise _missing("scalable target", request)
        for name in [name for name in self._policies if name[:3] == key]:
            del self._policies[name]
        return {}

    def _put_policy(self, request: Record) -> Record:
        if _key(request) not in self._targets:
            raise _missing("scalable target", request)
        name = (*_key(request), request["PolicyName"])
        prefix = f"arn:aws:autoscaling:{self._cloud.region}:{self._cloud.account}:scalingPolicy"
        arn = f"{prefix}:{uuid.uuid4()}:resource/sagemaker/{request['ResourceId']}:policyName/{request['PolicyName']}"
        self._policies[name] = {"CreationTime": datetime.now(UTC), "PolicyARN": arn, **self._policies.get(name, {}), **request}
        return {"PolicyARN": self._policies[name]["PolicyARN"], "Alarms": []}

    def _delete_policy(self, request: Record) -> Record:
        if self._policies.pop((*_key(request), request["PolicyName"]), None) is None:
            raise _missing("scaling policy", request)
        return {}


def _key(request: Record) -> tuple[str, ...]:
    return tuple(str(request.get(name, "")) for name in _KEY)


def _missing(what: str, request: Record) -> ServiceError:
    place = ", ".join(f"{name} {request[name]}" for name in _KEY)
    return ServiceError("ObjectNotFoundException", f"No {what} found for {place}")
