"""The model behind the API: SageMaker's endpoint, and the champion's class names in S3."""

from __future__ import annotations

import json
import time
from typing import Any, cast
from urllib.parse import urlparse

import boto3
from answers import HttpError
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError

# API Gateway gives up after 29 s: answer before it does, with a reason.
_RUNTIME = Config(connect_timeout=3, read_timeout=22, retries={"max_attempts": 0})
_LABELS_TTL_S = 60

_TRANSIENT = {
    "ThrottlingException": HttpError(429, "throttled", "Too many requests at once; send it again in a moment.", 1),
    "ModelNotReadyException": HttpError(503, "model_starting", "The model is starting; send it again in some seconds.", 5),
    "ServiceUnavailable": HttpError(503, "unavailable", "The model's service is busy; send it again in some seconds.", 5),
    "InternalDependencyException": HttpError(503, "unavailable", "The model's service is busy; send it again.", 5),
    "InternalFailure": HttpError(503, "unavailable", "The model's service failed; send it again.", 5),
}


class Model:
    """One endpoint and the champion beside it. Clients are made on first use and kept for the Lambda's life."""

    def __init__(self, *, endpoint: str, bucket: str, state_machine: str, on_demand: bool = False) -> None:
        """``on_demand``: the endpoint starts with the first request after a pause, which may take longer than a request may."""
        self.endpoint = endpoint
        self.bucket = bucket
        self.state_machine = state_machine
        self.on_demand = on_demand
        self.runtime = boto3.client("sagemaker-runtime", config=_RUNTIME)
        self.s3 = boto3.client("s3", config=Config(connect_timeout=3, read_timeout=5))
        self._labels: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def predict(self, picture: bytes, content_type: str, top_k: int) -> dict[str, Any]:
        """The endpoint's answer. Raises HttpError."""
        try:
            response = self.runtime.invoke_endpoint(
                EndpointName=self.endpoint,
                Body=picture,
                ContentType=content_type,
                Accept="application/json",
                CustomAttributes=f"top_k={top_k}",
            )
            result: dict[str, Any] = json.loads(response["Body"].read())
            return result
        except ClientError as error:
            raise self._explained(error) from error
        except (ReadTimeoutError, ConnectTimeoutError) as error:
            if self.on_demand:
                message = "The model is starting after a pause; send it again in some seconds."
                raise HttpError(503, "model_starting", message, 10) from error
            raise HttpError(504, "timeout", "The model did not answer in time; send a smaller picture or try again.", 5) from error
        except EndpointConnectionError as error:
            raise HttpError(503, "unavailable", "The model's service cannot be reached; try again in some seconds.", 5) from error

    def labels(self) -> dict[str, Any]:
        """The champion's class names and origin, at most a minute old. Raises HttpError when no model is deployed."""
        age = time.monotonic() - self._labels[0]
        if age > _LABELS_TTL_S:
            self._labels = (time.monotonic(), self._read_labels())
        return self._labels[1]

    def _read_labels(self) -> dict[str, Any]:
        try:
            champion = json.loads(self.s3.get_object(Bucket=self.bucket, Key="champion.json")["Body"].read())
        except ClientError as error:
            # Who may not list the whole bucket is told AccessDenied instead of NoSuchKey.
            if error.response["Error"]["Code"] in {"NoSuchKey", "404", "AccessDenied", "403"}:
                raise self._no_model() from error
            raise
        address = urlparse(champion["labels_uri"])
        labels = json.loads(self.s3.get_object(Bucket=address.netloc, Key=address.path.lstrip("/"))["Body"].read())
        model = {name: champion.get(name) for name in ("run", "dataset_hash", "top1")}
        return {"labels": labels, "model": model}

    def _no_model(self) -> HttpError:
        """What to do when nothing has been deployed."""
        return HttpError(
            503,
            "no_model",
            f"No model is deployed yet. Start the state machine {self.state_machine} with the input {{}} and wait for it to end.",
            60,
        )

    def _explained(self, error: ClientError) -> HttpError:
        """SageMaker's error as ours."""
        code = error.response["Error"]["Code"]
        message = error.response["Error"].get("Message", "")
        if code == "ModelError":
            return _model_error(error)
        if code in {"ValidationError", "ValidationException"}:
            if "not found" in message or "ould not find" in message:
                return self._no_model()
            # An endpoint that is being created or has failed exists, but cannot be asked.
            return HttpError(503, "model_starting", "The model is not ready yet; send it again in some seconds.", 10)
        return _TRANSIENT.get(code, HttpError(502, "model_failed", f"The model's service answered {code}.", None))


def _model_error(error: ClientError) -> HttpError:
    """The server's own answer, where it is one of ours; anything else is the model's fault."""
    response = cast(dict[str, Any], error.response)
    status = int(response.get("OriginalStatusCode", 500))
    try:
        inner = json.loads(response.get("OriginalMessage", ""))["error"]
        code, message = str(inner["code"]), str(inner["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "model_failed", "The model failed on this picture; its log in CloudWatch says why."
    if status in {400, 413, 415, 422}:
        return HttpError(status, code, message)
    if status in {429, 503}:
        return HttpError(status, code, message, 2)
    return HttpError(502, "model_failed", message)
