"""GPUs of SageMaker's instance types: how many processes torchrun starts on each machine.

A table, not a call: neither CDK nor botocore knows it. Counts as on AWS's pages "Amazon EC2 accelerated computing instances"; a
test holds them against the SDK's own (partial) table and asks that no type that SageMaker trains on is missing. The G7 family is
left out: AWS's pages at hand did not give its counts yet.
"""

from __future__ import annotations

from collections.abc import Mapping

_MANY: dict[int, str] = {
    2: "g7e.12xlarge",
    4: "g4dn.12xlarge g5.12xlarge g5.24xlarge g6.12xlarge g6.24xlarge g6e.12xlarge g6e.24xlarge g7e.24xlarge p3.8xlarge "
    "p6e-gb200.36xlarge",
    8: "g5.48xlarge g6.48xlarge g6e.48xlarge g7e.48xlarge p2.8xlarge p3.16xlarge p3dn.24xlarge p4d.24xlarge p4de.24xlarge "
    "p5.48xlarge p5e.48xlarge p5en.48xlarge p6-b200.48xlarge p6-b300.48xlarge",
    16: "p2.16xlarge",
}
_ONE = (
    *(f"g4dn.{size}xlarge" for size in ("", 2, 4, 8, 16)),
    *(f"{family}.{size}xlarge" for family in ("g5", "g6", "g6e") for size in ("", 2, 4, 8, 16)),
    *(f"g7e.{size}xlarge" for size in (2, 4, 8)),
    *("p2.xlarge", "p3.2xlarge", "p5.4xlarge"),
)

GPUS: Mapping[str, int] = {
    **{f"ml.{name}": 1 for name in _ONE},
    **{f"ml.{name}": count for count, names in _MANY.items() for name in names.split()},
}
"""Instance type -> number of NVIDIA GPUs."""


def gpu_count(instance_type: str) -> int:
    """GPUs of one machine, 0 for a type without. Raises ValueError for a GPU type that the table does not know."""
    if not instance_type.startswith(("ml.g", "ml.p")):
        return 0
    if instance_type not in GPUS:
        raise ValueError(
            f"instance_type is {instance_type!r}; expected a machine without a GPU or one of {', '.join(sorted(GPUS))}: "
            "choose one, or add it with its number of GPUs to infra/machines.py"
        )
    return GPUS[instance_type]


_LOCAL_DISKS = (
    "c5d",
    "g4dn",
    "g5",
    "g6",
    "g6e",
    "g7e",
    "i3",
    "i3en",
    "m5d",
    "p3dn",
    "p4d",
    "p4de",
    "p5",
    "p5e",
    "p5en",
    "r5d",
    "trn1",
    "trn1n",
    "trn2",
)
"""Families with NVMe disks of their own, as on AWS's page "Instance store volumes"."""


def has_local_storage(instance_type: str) -> bool:
    """Whether the machine keeps a job's data on disks of its own, which it encrypts itself, instead of on a volume."""
    family = instance_type.split(".")[1]
    return family in _LOCAL_DISKS or family.startswith("p6")
