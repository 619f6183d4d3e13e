"""Counts for CloudWatch, written as log lines in its embedded metric format: no call, no waiting, no permission.

https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
"""

from __future__ import annotations

import json
import os
import time


def count(name: str) -> None:
    """One more of ``name``: ``InvalidAnswers``, which a rollback alarm watches, or ``ModelErrors``, which SageMaker counts too."""
    namespace = os.environ.get("METRIC_NAMESPACE")
    if not namespace:
        return
    metrics = {"Namespace": namespace, "Dimensions": [["Endpoint"]], "Metrics": [{"Name": name, "Unit": "Count"}]}
    about = {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [metrics]}
    # print, not logging: CloudWatch wants the JSON alone on its line.
    print(json.dumps({"_aws": about, "Endpoint": os.environ.get("ENDPOINT_NAME", ""), name: 1}), flush=True)
