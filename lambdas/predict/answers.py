"""HTTP answers: one envelope for errors, the same security headers on everything."""

from __future__ import annotations

import base64
import json
from typing import Any

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'"


class HttpError(Exception):
    """An answer other than 200: status, a short code for programs, a sentence for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def answer(status: int, body: Any, request_id: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """API Gateway's proxy form of a JSON answer."""
    return raw(
        status,
        json.dumps(body, ensure_ascii=False),
        {"Content-Type": "application/json", "Content-Security-Policy": CLOSED_POLICY, **(headers or {})},
        request_id,
    )


def raw(status: int, text: str, headers: dict[str, str], request_id: str) -> dict[str, Any]:
    """API Gateway's proxy form of any text answer."""
    common = {**SECURITY_HEADERS, "Cache-Control": "no-store", "X-Request-Id": request_id}
    return {"statusCode": status, "headers": {**common, **headers}, "body": text, "isBase64Encoded": False}


def error_answer(error: HttpError, request_id: str) -> dict[str, Any]:
    """The error envelope, with Retry-After where waiting helps."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    body = {"error": {"code": error.code, "message": error.message}, "request_id": request_id}
    return answer(error.status, body, request_id, headers)


def picture_answer(content: bytes, headers: dict[str, str], request_id: str) -> dict[str, Any]:
    """API Gateway's proxy form of a PNG."""
    text = base64.b64encode(content).decode()
    kind = {"Content-Type": "image/png", "Content-Security-Policy": CLOSED_POLICY}
    return raw(200, text, {**kind, **headers}, request_id) | {"isBase64Encoded": True}
