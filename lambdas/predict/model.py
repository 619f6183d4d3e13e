"""The model behind the API: SageMaker's endpoint, and the champion's class names in S3."""

from __future__ import annotations

import json
import math
import time
from typing import Any, cast
from urllib.parse import quote, unquote, urlparse

import boto3
from answers import HttpError
from bodies import Body
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError
from counting import count
from waking import Waker

# API Gateway gives up after 29 s: answer before it does, with a reason. A second try must fit in too.
_RUNTIME = Config(connect_timeout=2, read_timeout=18, retries={"max_attempts": 0})
RETRY_WITHIN_S = 5
"""A failed call is repeated if it failed this fast: while a new model takes over, the next call most likely meets the old one."""
TRIES = 3
_OTHERS = Config(connect_timeout=1, read_timeout=7, retries={"max_attempts": 0})
"""For S3 and Step Functions; a waking request makes three such calls at most. A client that is told 503 tries again by itself."""
_LABELS_TTL_S = 60

_TRANSIENT = {
    "ThrottlingException": HttpError(429, "throttled", "Too many requests at once; send it again in a moment.", 1),
    "ModelNotReadyException": HttpError(503, "model_starting", "The model is starting; send it again in some seconds.", 5),
    "ServiceUnavailable": HttpError(503, "unavailable", "The model's service is busy; send it again in some seconds.", 5),
    "InternalDependencyException": HttpError(503, "unavailable", "The model's service is busy; send it again.", 5),
    "InternalFailure": HttpError(503, "unavailable", "The model's service failed; send it again.", 5),
}


class InvalidAnswerError(ValueError):
    """An answer of the endpoint that no model should give."""


class Model:
    """One endpoint and the champion beside it. Clients are made on first use and kept for the Lambda's life."""

    def __init__(self, *, endpoint: str, bucket: str, state_machine: str, on_demand: bool = False, wakes: str = "") -> None:
        """``on_demand``: the endpoint starts with the first request after a pause, which may take longer than a request may.

        ``wakes``: ARN of the state machine that brings a sleeping endpoint back; empty where none sleeps.
        """
        self.endpoint = endpoint
        self.bucket = bucket
        self.state_machine = state_machine
        self.on_demand = on_demand
        self.runtime = boto3.client("sagemaker-runtime", config=_RUNTIME)
        self.s3 = boto3.client("s3", config=_OTHERS)
        self.waker = Waker(boto3.client("stepfunctions", config=_OTHERS), wakes) if wakes else None
        self._labels: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def predict(self, body: Body, top_k: int, threshold: float) -> dict[str, Any]:
        """The endpoint's answer to one picture. Raises HttpError."""
        return self._classified(body, f"top_k={top_k},threshold={threshold:g}", _check_one)

    def predict_batch(self, body: Body, top_k: int, threshold: float) -> dict[str, Any]:
        """The endpoint's answers to several pictures, each with its predictions or its own error. Raises HttpError."""
        return self._classified(body, f"top_k={top_k},threshold={threshold:g}", lambda found: _check_batch(found, body.pictures))

    def _classified(self, body: Body, attributes: str, check: Any) -> dict[str, Any]:
        def read(response: dict[str, Any]) -> dict[str, Any]:
            found = json.loads(response["Body"].read())
            check(found)
            return cast(dict[str, Any], found)

        return cast(dict[str, Any], self._asked(body, attributes, "application/json", read))

    def explain(self, body: Body, label: str) -> tuple[bytes, str, float]:
        """``(PNG, class, probability)``: where in the picture the class is seen. Raises HttpError."""

        def read(response: dict[str, Any]) -> tuple[bytes, str, float]:
            content = response["Body"].read()
            pairs = (part.partition("=") for part in response.get("CustomAttributes", "").split(","))
            found = {name: value for name, _, value in pairs}
            if not content.startswith(b"\x89PNG") or "label" not in found:
                raise InvalidAnswerError("no heat map")
            return content, unquote(found["label"]), float(found["probability"])

        attributes = "explain=true" + (f",label={quote(label, safe='')}" if label else "")
        return cast(tuple[bytes, str, float], self._asked(body, attributes, "image/png", read))

    def _asked(self, body: Body, attributes: str, accept: str, read: Any) -> Any:
        """Ask the endpoint; again when the model fails fast, as one of two models may while they change. Raises HttpError."""
        started = time.monotonic()
        for _ in range(TRIES - 1):
            try:
                return self._once(body, attributes, accept, read)
            except HttpError as error:
                if error.code != "model_failed" or time.monotonic() - started > RETRY_WITHIN_S:
                    raise
        return self._once(body, attributes, accept, read)

    def _once(self, body: Body, attributes: str, accept: str, read: Any) -> Any:
        """One call; what is the model's fault is counted. Raises HttpError."""
        try:
            return read(self._invoke(body, attributes, accept))
        except (ValueError, KeyError, TypeError) as error:
            count("InvalidAnswers")
            raise HttpError(502, "model_failed", "The model's answer made no sense; send the picture again.", 5) from error
        except HttpError as error:
            if error.code == "model_failed":
                count("ModelErrors")
            raise

    def _invoke(self, body: Body, attributes: str, accept: str) -> dict[str, Any]:
        """InvokeEndpoint. Raises HttpError."""
        try:
            return cast(
                dict[str, Any],
                self.runtime.invoke_endpoint(
                    EndpointName=self.endpoint,
                    Body=body.content,
                    ContentType=body.content_type,
                    Accept=accept,
                    CustomAttributes=attributes,
                ),
            )
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

    def _champion(self) -> dict[str, Any]:
        """champion.json. Raises HttpError when no model has been deployed."""
        try:
            return cast(dict[str, Any], json.loads(self.s3.get_object(Bucket=self.bucket, Key="champion.json")["Body"].read()))
        except ClientError as error:
            # Who may not list the whole bucket is told AccessDenied instead of NoSuchKey.
            if error.response["Error"]["Code"] in {"NoSuchKey", "404", "AccessDenied", "403"}:
                raise self._no_model() from error
            raise

    def _read_labels(self) -> dict[str, Any]:
        champion = self._champion()
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
                return self.waker.wake(self._champion()) if self.waker else self._no_model()
            # An endpoint that is being created or has failed exists, but cannot be asked.
            return HttpError(503, "model_starting", "The model is not ready yet; send it again in some seconds.", 10)
        return _TRANSIENT.get(code, HttpError(502, "endpoint_refused", f"The model's service answered {code}."))


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


def _check_one(found: dict[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError for what is no answer to a picture."""
    for entry in found["predictions"]:
        if not isinstance(entry["label"], str) or not (math.isfinite(entry["probability"]) and 0 <= entry["probability"] <= 1):
            raise InvalidAnswerError("a prediction without a label or with an impossible probability")


def _check_batch(found: dict[str, Any], pictures: int) -> None:
    """Raises like ``_check_one`` unless there is an answer or an error for each picture."""
    if len(found["results"]) != pictures:
        raise InvalidAnswerError(f"{len(found['results'])} results for {pictures} pictures")
    for result in found["results"]:
        if "error" not in result:
            _check_one(result)
