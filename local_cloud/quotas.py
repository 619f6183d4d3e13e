"""Service Quotas for SageMaker, as an account in use has them: some machines of each kind. They limit nothing here."""

from __future__ import annotations

from typing import Any

from infra.machines import GPUS
from local_cloud.service import Caller, Permission, ServiceError

Record = dict[str, Any]
_USES = ("training job usage", "spot training job usage", "processing job usage", "endpoint usage")
_CPU = [
    f"ml.{family}.{size}" for family in ("t3", "m5", "c5", "c6i") for size in ("medium", "large", "xlarge", "2xlarge", "4xlarge")
]
MACHINES = 20


class Quotas:
    """The service; see ``local_cloud.service.Service``. ``limits`` changes single quotas by name."""

    def __init__(self, limits: dict[str, float] | None = None) -> None:
        names = [f"{machine} for {use}" for machine in (*_CPU, *GPUS) for use in _USES]
        self._values = {name: float(MACHINES) for name in names} | (limits or {})

    def permissions(self, operation: str, request: Record) -> list[Permission]:
        """Lists know no resource."""
        return [Permission(f"servicequotas:{operation}", "*")]

    def call(self, operation: str, request: Record, caller: Caller) -> Record:
        """ListServiceQuotas, page by page."""
        if operation != "ListServiceQuotas" or request["ServiceCode"] != "sagemaker":
            raise ServiceError("NoSuchResourceException", f"{operation} is emulated for ListServiceQuotas of sagemaker only")
        start, size = int(request.get("NextToken", 0)), int(request.get("MaxResults", 100))
        names = sorted(self._values)
        page = [
            {"ServiceCode": "sagemaker", "ServiceName": "Amazon SageMaker", "QuotaName": name, "Value": self._values[name]}
            for name in names[start : start + size]
        ]
        more = {"NextToken": str(start + size)} if start + size < len(names) else {}
        return {"Quotas": page, **more}

    def stop(self) -> None:
        """Nothing runs."""
