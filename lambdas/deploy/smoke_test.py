"""Posts pictures with known classes to the real API, with its token, before a new model counts as deployed."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlparse

import boto3
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest

DEADLINE_S = 240
PAUSE_S = 3
_TYPES = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp", "bmp": "image/bmp"}


class SmokeTestError(Exception):
    """The API does not answer, or the answers are wrong. The message says which."""


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"smoke_uri", "run"}`` in, counts out. Raises SmokeTestError when more than one picture is classified otherwise."""
    folder, examples = read_examples(boto3.client("s3"), event["smoke_uri"])
    deadline = time.monotonic() + DEADLINE_S
    wrong = []
    for example in examples:
        label, run = ask(example["file"], read(folder, example["file"]), deadline)
        if run is not None and event.get("run") and run != event["run"]:
            raise SmokeTestError(f"The API answered with the model of run {run}; expected run {event['run']}.")
        if label != example["expected"]:
            wrong.append(f"{example['file']}: {label}, expected {example['expected']}")
    if len(wrong) > (1 if len(examples) > 1 else 0):
        raise SmokeTestError(f"{len(wrong)} of {len(examples)} pictures were classified otherwise: {'; '.join(wrong)}.")
    return {"pictures": len(examples), "correct": len(examples) - len(wrong)}


def read_examples(s3: Any, uri: str) -> tuple[tuple[Any, str, str], list[dict[str, str]]]:
    """The folder with the pictures (client, bucket, key prefix), and smoke.json's entries."""
    address = urlparse(uri)
    key = address.path.lstrip("/")
    prefix = key.rpartition("/")[0] if key.endswith(".json") else key.rstrip("/")
    folder = (s3, address.netloc, prefix)
    examples = json.loads(read(folder, "smoke.json"))
    if not examples:
        raise SmokeTestError(f"{uri} names no picture; expected one to four that the evaluation classified correctly.")
    return folder, examples


def read(folder: tuple[Any, str, str], name: str) -> bytes:
    """One object of the folder."""
    s3, bucket, prefix = folder
    content: bytes = s3.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
    return content


def ask(name: str, picture: bytes, deadline: float) -> tuple[str, str | None]:
    """The API's first label for a picture, and the run of the model that answered. A starting model is waited for."""
    url = f"{os.environ['API_URL'].rstrip('/')}/predict"
    kind = _TYPES.get(name.rpartition(".")[2].lower(), "application/x-image")
    while True:
        request = urllib.request.Request(url, data=picture, headers=_headers(url, picture, kind), method="POST")  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - the address is our own API
                answer = json.loads(response.read())
                return str(answer["predictions"][0]["label"]), answer.get("model", {}).get("run")
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")[:500]
            problem = f"POST {url} answered {error.code}: {text}"
            if error.code not in {429, 500, 502, 503, 504}:
                raise SmokeTestError(problem) from None
        except OSError as error:
            problem = f"POST {url} failed: {error}"
        if time.monotonic() + PAUSE_S > deadline:
            raise SmokeTestError(f"{problem} (after {DEADLINE_S} s of trying)")
        time.sleep(PAUSE_S)


def _headers(url: str, picture: bytes, kind: str) -> dict[str, str]:
    """Content type, and the token or an IAM signature."""
    if os.environ.get("AUTH", "token") == "token":
        return {"Content-Type": kind, "Authorization": f"Bearer {_token()}"}
    session = boto3.Session()
    credentials = session.get_credentials()
    if credentials is None:
        raise SmokeTestError("No AWS credentials; expected the Lambda's role to give some.")
    request = AWSRequest(method="POST", url=url, data=picture, headers={"Content-Type": kind})
    SigV4Auth(credentials, "execute-api", session.region_name).add_auth(request)
    return dict(request.headers.items())


def _token() -> str:
    """The API's token."""
    value: str = boto3.client("secretsmanager").get_secret_value(SecretId=os.environ["TOKEN_SECRET_ARN"])["SecretString"]
    return value
