"""API Gateway's token authorizer: the bearer token must equal the secret."""

from __future__ import annotations

import functools
import hmac
import os
import time
from typing import Any

import boto3

SECRET_TTL_S = 30
"""With API Gateway's own cache of 30 s, a replaced token stops working within a minute."""


class Secret:
    """The token in Secrets Manager, read again when it is older than ``SECRET_TTL_S``."""

    def __init__(self, arn: str) -> None:
        self.arn = arn
        self.client = boto3.client("secretsmanager")
        self._value = ""
        self._read_at = float("-inf")

    def value(self) -> str:
        """The token."""
        if time.monotonic() - self._read_at > SECRET_TTL_S:
            self._value = self.client.get_secret_value(SecretId=self.arn)["SecretString"]
            self._read_at = time.monotonic()
        return self._value


@functools.cache
def secret() -> Secret:
    """The secret from the environment."""
    return Secret(os.environ["TOKEN_SECRET_ARN"])


def handle(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """An Allow policy for the whole stage, or ``Exception("Unauthorized")``, which API Gateway answers with 401."""
    scheme, _, token = str(event.get("authorizationToken") or "").partition(" ")
    expected = secret().value()
    # Compared as bytes in constant time: the answer's timing says nothing about the token.
    if scheme.lower() != "bearer" or not expected or not hmac.compare_digest(token.strip().encode(), expected.encode()):
        raise Exception("Unauthorized")  # the text is API Gateway's protocol
    return {"principalId": "token", "policyDocument": _allow(str(event["methodArn"]))}


def _allow(method_arn: str) -> dict[str, Any]:
    """Every method of the stage: API Gateway caches the policy by token, not by method."""
    api, stage = method_arn.split("/")[:2]
    statement = {"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": f"{api}/{stage}/*/*"}
    return {"Version": "2012-10-17", "Statement": [statement]}
