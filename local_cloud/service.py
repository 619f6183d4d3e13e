"""What an emulated service sees of the local cloud, and what the local cloud expects of a service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import boto3


class ServiceError(Exception):
    """An error of the AWS protocol: botocore raises it at the client as ``ClientError`` with this code."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status


@dataclass(frozen=True)
class Caller:
    """Who signed a request. ``arn`` is the STS form, e.g. ``arn:aws:sts::000000000000:assumed-role/X/session``."""

    access_key_id: str
    arn: str


@dataclass(frozen=True)
class Permission:
    """One IAM check a request needs: ``sagemaker:CreateTrainingJob`` on an ARN, with the context keys AWS sets."""

    action: str
    resource: str
    context: dict[str, Any] = field(default_factory=dict)


class Cloud(Protocol):
    """The local cloud as its services see it."""

    root: Path
    """Folder for everything the cloud writes; removed when it stops."""
    url: str
    """Endpoint of every service, ``http://localhost:<port>``."""
    region: str
    account: str

    def session(self, role_arn: str, service: str, name: str) -> boto3.Session:
        """Credentials of ``role_arn`` as the service principal ``service`` (``sagemaker.amazonaws.com``) would assume it.

        Raises ``ServiceError`` when the role is missing or its trust policy does not name the service.
        """
        ...

    def admin(self) -> boto3.Session:
        """The account's root credentials: for the cloud's own book-keeping, never for a job."""
        ...


class Service(Protocol):
    """One AWS service spoken over its JSON protocol. Requests arrive validated against botocore's model."""

    def permissions(self, operation: str, request: dict[str, Any]) -> list[Permission]:
        """Every permission the caller needs for this request, ``iam:PassRole`` and tags included."""
        ...

    def call(self, operation: str, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Answer with AWS's own field names (datetimes as aware ``datetime``) or raise ``ServiceError``.

        Called from worker threads: several calls can be under way at once.
        """
        ...

    def stop(self) -> None:
        """End every child process and thread, and wait for them."""
        ...
