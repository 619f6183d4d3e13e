"""``{"dry_run": true}``: asks AWS for everything that an execution will need, within a minute. Starts nothing and writes nothing.

Three questions: do the account's quotas allow the machines, can the data and the weights be read, are the container images there.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import ClientError

TIMEOUT_S = 15

Check = dict[str, str]


class DryRunError(Exception):
    """An execution would fail. The message names every question with a bad answer, and what to do."""


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """``{"source", "weights", "parallel"}`` in, ``{"checks": [{"check", "found"}]}`` out. Raises DryRunError.

    ``source`` and ``weights`` are addresses, empty where there is nothing to read; ``parallel``: trials at once.
    """
    good: list[Check] = []
    bad: list[str] = []
    for check, found, problem in _answers(str(event["source"]), str(event["weights"]), int(event["parallel"])):
        good.append({"check": check, "found": found})
        if problem:
            bad.append(f"{check}: {found}; {problem}")
    if bad:
        raise DryRunError(" ".join(f"{line}." for line in bad))
    return {"checks": good}


def _answers(source: str, weights: str, parallel: int) -> Iterator[tuple[str, str, str]]:
    """``(question, what was found, what to do)``; nothing to do means that all is well."""
    yield from quotas(json.loads(os.environ["MACHINES"]), parallel)
    if source:
        yield ("source", *readable(source))
    if weights:
        yield ("pretrained", *readable(weights))
    for image in json.loads(os.environ["IMAGES"]):
        yield (f"image {image.rpartition('/')[2]}", *available(image))


def quotas(machines: list[dict[str, Any]], parallel: int) -> Iterator[tuple[str, str, str]]:
    """Whether SageMaker gives the machines at once: ``[{"quota": its name, "count": machines, "per_trial": bool}]``."""
    wanted: dict[str, int] = {}
    for machine in machines:
        count = machine["count"] * (parallel if machine.get("per_trial") else 1)
        # The states run one after the other: of two needs of one quota the larger counts.
        wanted[machine["quota"]] = max(count, wanted.get(machine["quota"], 0))
    known: dict[str, float] = {}
    for page in boto3.client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker"):
        known |= {q["QuotaName"]: float(q["Value"]) for q in page["Quotas"] if q["QuotaName"] in wanted}
        if len(known) == len(wanted):
            break
    for name, count in wanted.items():
        if name not in known:
            yield name, "AWS lists no value of this account's own, so its default applies", ""
        elif known[name] < count:
            yield name, f"{known[name]:g}", f"expected at least {count}: ask for more under Service Quotas, Amazon SageMaker"
        else:
            yield name, f"{known[name]:g}, {count} needed", ""


def readable(address: str) -> tuple[str, str]:
    """``(what was found, what to do)`` for a prefix or object in S3, or an archive behind ``https://``."""
    return _in_s3(address) if address.startswith("s3://") else _on_the_web(address)


def _in_s3(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    try:
        found = boto3.client("s3").list_objects_v2(Bucket=parts.netloc, Prefix=parts.path.lstrip("/"), MaxKeys=1)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        return f"{address} answers {code}", "correct the address, or let this stage's roles read it (source_buckets in cdk.json)"
    if not found.get("KeyCount"):
        return f"nothing lies under {address}", "upload the pictures or weights there, or correct the address"
    return f"{address} can be read", ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The host that was allowed answers itself, or not at all."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow nothing."""


def _on_the_web(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    if parts.scheme != "https" or parts.hostname not in os.environ["ALLOWED_HOSTS"].split(","):
        return f"{address} is on no allowed host", "add the host to allowed_hosts in cdk.json"
    request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - https on an allowed host
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S) as answer:
            return f"{address} answers {answer.status}, {answer.headers.get('Content-Length', 'unknown')} bytes", ""
    except urllib.error.HTTPError as error:
        return f"{address} answers {error.code}", "correct the address"
    except OSError as error:
        return f"{address} cannot be reached ({error})", "correct the address, or try again later"


def available(image: str) -> tuple[str, str]:
    """``(what was found, what to do)`` for a container image. One of our own that is missing is built by the execution."""
    registry, _, name = image.partition("/")
    repository, digest = name.split("@") if "@" in name else (name.partition(":")[0], "")
    wanted: Any = {"imageDigest": digest} if digest else {"imageTag": name.partition(":")[2]}
    try:
        found = boto3.client("ecr").batch_get_image(
            registryId=registry.split(".")[0], repositoryName=repository, imageIds=[wanted]
        )["images"]
    except ClientError as error:
        return f"{image}: {error.response['Error']['Code']}", "check the image's address and this region's registry"
    if found:
        return "is there", ""
    if image == os.environ.get("BUILT_IMAGE"):
        return "is not built yet; the execution builds it in about five minutes", ""
    return f"{image} does not exist", "correct serving_image_uri, or take a newer release of this project"
