"""What companies ask for, as overrides of a stage: each is synthesised, verified and tested.

``CONFIGURATIONS`` maps a name to the CDK context that chooses it. The stages of cdk.json come first.
"""

from __future__ import annotations

import json
from typing import Any

from infra.config import FileContext, StageConfig, load
from infra.verify.deployment import ACCOUNT, REGION

LOCAL_URL = "http://localhost:4566/restapis/{api}/{stage}/_user_request_"
OWN_IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/own:1"


def _context(stage: str, override: dict[str, Any], **more: str) -> dict[str, str]:
    return {"stage": stage, "override": json.dumps(override), **more}


CONFIGURATIONS: dict[str, dict[str, str]] = {
    "dev": {"stage": "dev"},
    "prod": {"stage": "prod"},
    "local": {"stage": "local", "api_url": LOCAL_URL},
    "variant": _context("dev", {"api": {"auth": "iam"}, "serving_image_uri": OWN_IMAGE, "managed_debugger": True}),
    # A company's VPC, with a way to PyPI through its own proxy.
    "existing-vpc": _context(
        "prod",
        {
            "network": {
                "vpc": "existing",
                "subnet_ids": ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"],
                "security_group_ids": ["sg-0123456789abcdef0"],
            }
        },
    ),
    # Nothing leaves, nothing comes in: a VPC of the stack's own, no network for what runs a model, packages and weights by channel.
    "isolated": _context(
        "prod",
        {
            "network": {"vpc": "create", "isolation": True, "wheels": "wheels/"},
            "allowed_hosts": [],
            "input": {"source": "incoming/dogs/", "pretrained": "pretrained/resnet50.pth"},
        },
    ),
    "own-key": _context("prod", {"kms_key": "create", "training": {"instance_type": "ml.m5.xlarge"}}),
    "existing-key": _context("dev", {"kms_key": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/0123abcd-0123-0123-0123-0123456789ab"}),
    "boundary-and-tags": _context(
        "dev",
        {"permissions_boundary": f"arn:aws:iam::{ACCOUNT}:policy/boundary", "tags": {"cost-center": "4711", "owner": "vision"}},
    ),
    "existing-bucket": _context("dev", {"data_bucket": "company-pictures"}),
    "foreign-data": _context(
        "dev",
        {
            "source_buckets": ["their-pictures"],
            "source_keys": ["arn:aws:kms:us-east-1:444455556666:key/0123abcd-0123"],
            "input": {"source": "s3://their-pictures/dogs/"},
        },
    ),
    "quiet": _context("dev", {"tracing": False, "log_level": "ERROR", "retention_days": 1}),
    "big": _context(
        "prod",
        {
            "training": {"instance_type": "ml.g5.12xlarge", "instance_count": 2, "spot": False},
            "prepare_instances": 4,
            "batch_instances": 3,
            "endpoint": {"instance_type": "ml.g5.xlarge", "update": "rolling"},
        },
    ),
    "triggered": _context(
        "dev",
        {
            "triggers": {"schedule": "cron(0 3 ? * MON *)", "incoming": True},
            "alarm_email": "team@example.com",
            "monthly_budget_usd": 100,
        },
    ),
    "beside": _context("dev", {"name": "cats"}),
    "idle": _context("prod", {"endpoint": {"idle_hours": 2}, "api": {"cors_origins": ["https://www.example.com"]}}),
}
"""Name -> context."""


def config_of(context: dict[str, str]) -> StageConfig:
    """The configuration that a context chooses."""
    return load(FileContext(**context))
