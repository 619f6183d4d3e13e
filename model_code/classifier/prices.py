"""What an hour of a SageMaker instance costs, for estimates.

List prices on demand, training and processing (hosting for c6i), us-east-1, US dollars an hour, without discounts, spot, storage
and traffic, as known on PRICED_ON from https://aws.amazon.com/sagemaker/ai/pricing/; checked against no bill (docs/costs.md). A
type that is not here has no estimate rather than a wrong one.
"""

from __future__ import annotations

PRICED_ON = "2025-01"
REGION = "us-east-1"
USD_PER_HOUR = {
    "ml.t3.medium": 0.05,
    "ml.t3.large": 0.10,
    "ml.t3.xlarge": 0.20,
    "ml.m5.large": 0.115,
    "ml.m5.xlarge": 0.23,
    "ml.m5.2xlarge": 0.461,
    "ml.m5.4xlarge": 0.922,
    "ml.m5.12xlarge": 2.765,
    "ml.m5.24xlarge": 5.53,
    "ml.c6i.large": 0.102,
    "ml.c5.xlarge": 0.204,
    "ml.c5.2xlarge": 0.408,
    "ml.c5.4xlarge": 0.816,
    "ml.c5.9xlarge": 1.836,
    "ml.c5.18xlarge": 3.672,
    "ml.g4dn.xlarge": 0.736,
    "ml.g5.xlarge": 1.408,
    "ml.g5.2xlarge": 1.515,
    "ml.g5.4xlarge": 2.03,
    "ml.g5.12xlarge": 7.09,
    "ml.g5.48xlarge": 20.36,
    "ml.p3.2xlarge": 3.825,
    "ml.p3.8xlarge": 14.688,
    "ml.p3.16xlarge": 28.152,
}


def cost_usd(instance: str | None, seconds: float | None, count: int = 1) -> tuple[float | None, str]:
    """``(estimate in US dollars, why there is none)`` of ``count`` instances over ``seconds`` billable seconds."""
    if instance == "local":
        return None, "ran on a machine of one's own"
    if seconds is None:
        return None, "its duration is not known"
    if instance not in USD_PER_HOUR:
        return None, f"no list price for {instance or 'an unknown instance'} here"
    return USD_PER_HOUR[instance] * seconds * count / 3600, ""
