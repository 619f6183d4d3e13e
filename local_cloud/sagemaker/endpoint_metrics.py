"""What SageMaker tells CloudWatch of an endpoint's invocations, once a second, away from the requests' path.

https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

from local_cloud.service import Cloud

EVERY_S = 1.0
MAX_VALUES = 150
"""Values of one datum, CloudWatch's limit."""
_NAMESPACE = "AWS/SageMaker"


class EndpointMetrics:
    """Counts and times since the last report."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, endpoint: str, variant: str, status: int, seconds: float) -> None:
        """One invocation: the container's HTTP status (0 when it did not answer) and how long it took."""
        with self._lock:
            self._seen[endpoint, variant].append((status, seconds))
            if self._thread is None:
                self._thread = threading.Thread(target=self._report_on, name="endpoint-metrics", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the reports."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5)

    def _report_on(self) -> None:
        client = self._cloud.admin().client("cloudwatch", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        while not self._stopped.wait(EVERY_S):
            with self._lock:
                # Endpoints that nobody asks are reported too: alarms must fall silent again.
                seen, self._seen = self._seen, defaultdict(list, {name: [] for name in self._seen})
            for (endpoint, variant), calls in seen.items():
                data = _data(endpoint, variant, calls)
                try:
                    client.put_metric_data(Namespace=_NAMESPACE, MetricData=data)
                except Exception as error:
                    if not self._stopped.is_set():
                        print(f"note: metrics of endpoint {endpoint} were not kept ({error})", flush=True)


def _data(endpoint: str, variant: str, calls: list[tuple[int, float]]) -> list[dict[str, Any]]:
    dimensions = [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": variant}]
    errors = sum(1 for status, _ in calls if status == 0 or status >= 500)
    counts = {
        "Invocations": len(calls),
        "InvocationsPerInstance": len(calls),
        "Invocation4XXErrors": sum(1 for status, _ in calls if 400 <= status < 500),
        "Invocation5XXErrors": errors,
    }
    data: list[dict[str, Any]] = [
        {"MetricName": name, "Dimensions": dimensions, "Value": float(count), "Unit": "Count"} for name, count in counts.items()
    ]
    times = [seconds * 1e6 for _, seconds in calls]
    for start in range(0, len(times), MAX_VALUES):
        part = times[start : start + MAX_VALUES]
        data.append({"MetricName": "ModelLatency", "Dimensions": dimensions, "Values": part, "Unit": "Microseconds"})
    return data
