"""The local cloud: one process on one port that speaks AWS's protocols. ``python -m local_cloud.cloud --port 4566 --root DIR``.

A request signed for SageMaker, Step Functions' executions or CodeBuild's builds is answered by our services; every other request
goes to ministack, unmodified. Both are checked by the same policy engine against the roles that the template made.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3

from local_cloud import emulator, validation
from local_cloud.codebuild import CodeBuild
from local_cloud.faults import Faults, name_of
from local_cloud.images import Images, aws_images
from local_cloud.live import PREFIX, LiveReports
from local_cloud.quotas import Quotas
from local_cloud.sagemaker import SageMaker, Settings
from local_cloud.scaling import Scaling
from local_cloud.service import Caller, Permission, Service, ServiceError
from local_cloud.stepfunctions import OPERATIONS as EXECUTION_OPERATIONS
from local_cloud.stepfunctions import StepFunctions

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_MAX_BODY_BYTES = 32 * 1024 * 1024
_INVOKE = re.compile(r"/endpoints/([^/]+)/invocations")
_SHUTDOWN_LIMIT_S = 5
_BUILD_OPERATIONS = frozenset({"StartBuild", "BatchGetBuilds", "StopBuild"})


class LocalCloud:
    """The account: its services, its working folder, and the ASGI application in front of them."""

    def __init__(self, root: Path, port: int, settings: Settings | None = None) -> None:
        self.root = root
        self.url = f"http://localhost:{port}"
        self.region = emulator.REGION
        self.account = emulator.ACCOUNT
        self._sessions: dict[tuple[str, str, str], tuple[float, boto3.Session]] = {}
        self._sessions_lock = threading.Lock()
        images, states = Images(self), StepFunctions(self)
        self._sagemaker = SageMaker(self, images, settings)
        self._services: dict[str, Service] = {
            "sagemaker": self._sagemaker,
            "stepfunctions": states,
            "codebuild": CodeBuild(self, images),
            "application-autoscaling": Scaling(self, self._sagemaker.endpoints.variants),
            "service-quotas": Quotas(),
        }
        self._live = LiveReports(self, states.executions)
        self._faults = Faults(root)
        self._ministack = emulator.application()
        _add_resource_types(self._sagemaker)
        emulator.correct_secrets()
        emulator.correct_bucket_tags()
        emulator.correct_build_logs()
        emulator.correct_log_group_arns()
        emulator.correct_function_deletion()
        emulator.bound_function_processes()
        emulator.watch_repository_deletion(images.remove)
        emulator.count_embedded_metrics()
        emulator.correct_alarms()
        emulator.record_decisions(lambda found: self._note("decisions", found))

    # -- What the services see (local_cloud.service.Cloud) --

    def session(self, role_arn: str, service: str, name: str) -> boto3.Session:
        """See ``local_cloud.service.Cloud``; sessions are kept for half an hour."""
        key = (role_arn, service, name)
        with self._sessions_lock:
            made_s, session = self._sessions.get(key, (0.0, None))
            if session is None or time.monotonic() - made_s > 1800:
                session = emulator.assume(role_arn, service, name)
                self._sessions[key] = (time.monotonic(), session)
            return session

    def admin(self) -> boto3.Session:
        """See ``local_cloud.service.Cloud``."""
        return emulator.root_session()

    def stop(self) -> None:
        """Stop executions first, so that they stop their jobs; then the services, whose children are waited for."""
        for name in ("stepfunctions", "codebuild", "sagemaker"):
            self._services[name].stop()
        self._live.stop()

    # -- ASGI --

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._ministack(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        call = name_of(scope, headers)
        fault = None
        if call:
            caller = emulator.caller(headers, scope.get("query_string", b""))
            self._note("calls", {"call": call, "caller": caller})
            fault = self._faults.take(call, caller)
        if fault is None:
            await self._dispatch(scope, headers, receive, send)
            return
        await asyncio.sleep(fault.delay_s)
        if not fault.code:
            await self._dispatch(scope, headers, receive, send)
            return
        if fault.after:
            await self._dispatch(scope, headers, receive, _lost)
        await _send(send, *fault.answer())

    async def _dispatch(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        if _asks_for_report(scope, headers):
            await _send(send, *await asyncio.to_thread(self._live.answer, scope["path"], headers.get("host", "")))
            return
        target = _target(scope, headers)
        if headers.get("x-amz-target", "").endswith(".BatchGetImage"):
            body = await _read(receive)
            found = aws_images(body)
            if found is not None:
                await _send(send, *await asyncio.to_thread(self._aws_image, scope, headers, body, found))
                return
            receive = _again(body)
        if target is None:
            # The loopback interface stands for TLS: a load balancer that ended it would say so with this header.
            secure = {**scope, "headers": [*scope["headers"], (b"x-forwarded-proto", b"https")]}
            await self._ministack(secure, receive, _watched(send, self._denied, scope, headers))
            return
        body = await _read(receive)
        await _send(send, *await asyncio.to_thread(self._answer, target, scope, headers, body))

    def _answer(
        self, target: tuple[str, str], scope: Scope, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        service, operation = target
        request_id = str(uuid.uuid4())
        try:
            if operation == "InvokeEndpoint":
                return self._invoke(scope, headers, body)
            answer = self._call(service, operation, scope, headers, body)
            content = json.dumps(answer, default=_json_value).encode() if answer is not None else b""
            return 200, {"content-type": "application/x-amz-json-1.1", "x-amzn-requestid": request_id}, content
        except ServiceError as error:
            if "AccessDenied" in error.code:
                self._denied(operation, error.message)
            return _error_answer(error, request_id)

    def _call(self, service: str, operation: str, scope: Scope, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        model = validation.service_model(service)
        if operation not in model.operation_names:
            raise ServiceError("UnknownOperationException", f"{service} has no operation {operation}")
        try:
            request = json.loads(body or b"{}")
        except ValueError as error:
            raise ServiceError("SerializationException", f"The body is not JSON: {error}") from error
        found = validation.problems(model.operation_model(operation), request)
        if found:
            raise ServiceError("ValidationException", "; ".join(found))
        handler = self._services[service]
        caller = emulator.authenticate(scope, headers, body, handler.permissions(operation, request), service)
        return handler.call(operation, request, caller)

    def _aws_image(
        self, scope: Scope, headers: dict[str, str], body: bytes, found: dict[str, Any]
    ) -> tuple[int, dict[str, str], bytes]:
        """What AWS's own registries say of the containers that this cloud runs."""
        resource = f"arn:aws:ecr:{self.region}:{found['images'][0]['registryId'] if found['images'] else '*'}:repository/pytorch"
        request_id = str(uuid.uuid4())
        try:
            emulator.authenticate(scope, headers, body, [Permission("ecr:BatchGetImage", resource)], "ecr")
        except ServiceError as error:
            self._denied("BatchGetImage", error.message)
            return _error_answer(error, request_id)
        return 200, {"content-type": "application/x-amz-json-1.1", "x-amzn-requestid": request_id}, json.dumps(found).encode()

    def _invoke(self, scope: Scope, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        match = _INVOKE.fullmatch(scope["path"])
        name = match.group(1) if match else ""
        permissions = self._sagemaker.permissions("InvokeEndpoint", {"EndpointName": name})
        emulator.authenticate(scope, headers, body, permissions, "sagemaker")
        return self._sagemaker.invoke_endpoint(name, body, headers)

    def _denied(self, action: str, message: str) -> None:
        """Keep a record of every refused call: a run that saw none proves that the roles suffice."""
        self._note("denied", {"time": time.time(), "action": action, "message": message[:500]})

    def _note(self, name: str, content: dict[str, Any]) -> None:
        """A line into one of the cloud's records: ``calls``, ``decisions`` (of IAM) and ``denied``, each ``<name>.jsonl``."""
        with (self.root / f"{name}.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(content) + "\n")


def _asks_for_report(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether a browser asks for a run's page. S3 would be asked for a bucket of that name with a signature."""
    signed = "authorization" in headers or b"Signature=" in scope.get("query_string", b"")
    return scope["method"] == "GET" and not signed and (scope["path"] == "/report" or scope["path"].startswith(PREFIX))


async def _send(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": _encode(headers)})
    await send({"type": "http.response.body", "body": body})


def _target(scope: Scope, headers: dict[str, str]) -> tuple[str, str] | None:
    """(service, operation) of a request that is ours, None for ministack's."""
    scope_match = re.search(r"Credential=[^/]+/\d{8}/[^/]+/([^/]+)/", headers.get("authorization", ""))
    signed_for = scope_match.group(1) if scope_match else ""
    _, _, operation = headers.get("x-amz-target", "").partition(".")
    if signed_for == "sagemaker":
        return ("sagemaker", "InvokeEndpoint" if _INVOKE.fullmatch(scope["path"]) else operation)
    if signed_for == "states" and operation in EXECUTION_OPERATIONS:
        return ("stepfunctions", operation)
    if signed_for == "application-autoscaling":
        return (signed_for, operation)
    if signed_for == "servicequotas":
        return ("service-quotas", operation)
    if signed_for == "codebuild" and operation in _BUILD_OPERATIONS:
        return ("codebuild", operation)
    return None


async def _lost(message: dict[str, Any]) -> None:
    """An answer that reaches nobody."""


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > _MAX_BODY_BYTES or not message.get("more_body"):
            return body


def _again(body: bytes) -> Receive:
    """A body that was read already, for somebody else to read."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _watched(send: Send, denied: Callable[[str, str], None], scope: Scope, headers: dict[str, str]) -> Send:
    """Pass on ministack's answer, noting one that refuses a signed call for want of a permission."""
    status = 0

    async def watch(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        body = message.get("body", b"")
        if status in (400, 403) and headers.get("authorization", "").startswith("AWS4") and b"not authorized to perform" in body:
            denied(headers.get("x-amz-target") or f"{scope['method']} {scope['path']}", body.decode("utf-8", "replace"))
        await send(message)

    return watch


def _json_value(value: Any) -> Any:
    """AWS's JSON protocols: times as epoch seconds, blobs as base64."""
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"cannot serialise {type(value).__name__}")


def _error_answer(error: ServiceError, request_id: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"content-type": "application/x-amz-json-1.1", "x-amzn-requestid": request_id, "x-amzn-errortype": error.code}
    body = {"__type": error.code, "message": error.message, "Message": error.message, **getattr(error, "fields", {})}
    return error.status, headers, json.dumps(body).encode()


def _encode(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _add_resource_types(sagemaker: SageMaker) -> None:
    """CloudFormation types of the template that ministack lacks."""
    group = "AWS::SageMaker::ModelPackageGroup"
    root = Caller("", f"arn:aws:iam::{emulator.ACCOUNT}:root")

    def create(_: str, properties: dict[str, Any], __: str) -> tuple[str, dict[str, Any]]:
        arn = sagemaker.call("CreateModelPackageGroup", properties, root)["ModelPackageGroupArn"]
        return str(arn), {"ModelPackageGroupArn": arn}

    def delete(physical_id: str, _: dict[str, Any]) -> None:
        sagemaker.call("DeleteModelPackageGroup", {"ModelPackageGroupName": physical_id.rsplit("/", 1)[-1]}, root)

    emulator.add_resource_type(group, create, delete)
    # Nothing costs money here: a budget is taken, and never spent.
    emulator.add_resource_type("AWS::Budgets::Budget", lambda logical_id, _, __: (logical_id, {}), lambda _, __: None)


async def _serve(cloud: LocalCloud, port: int, lifeline: bool) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{port}", f"[::1]:{port}"] if _has_ipv6(port) else [f"127.0.0.1:{port}"]
    config.keep_alive_timeout = 75
    config.graceful_timeout = 2
    config.loglevel = "WARNING"
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if lifeline:
        # The launcher holds the other end of this pipe; it closes when the launcher ends, however hard.
        loop.add_reader(sys.stdin.fileno(), stopped.set)

    async def until_stopped() -> None:
        await stopped.wait()
        await asyncio.to_thread(cloud.stop)
        # Children are gone by now. A request that hangs (a deployment waiting for its Lambda) must not keep the port.
        threading.Timer(_SHUTDOWN_LIMIT_S, _leave, [cloud.root]).start()

    await serve(cloud, config, shutdown_trigger=until_stopped)  # type: ignore[arg-type]


def _leave(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    os._exit(0)


def _has_ipv6(port: int) -> bool:
    """Whether ``localhost`` may resolve to ::1 here; clients try it first."""
    import socket

    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("::1", port))
            return True
    except OSError:
        return False


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=4566, help="port on the loopback interface")
    parser.add_argument("--root", type=Path, required=True, help="folder for everything the cloud writes; removed at its end")
    parser.add_argument("--lifeline", action="store_true", help="stop when standard input closes")
    parser.add_argument(
        "--interrupt-spot-after",
        type=float,
        metavar="SECONDS",
        help="take the machine away from each managed spot job with checkpoints, once, when it has run so long",
    )
    arguments = parser.parse_args()
    emulator.configure(arguments.root, arguments.port)
    settings = Settings(interrupt_after=arguments.interrupt_spot_after)
    cloud = LocalCloud(arguments.root, arguments.port, settings)
    try:
        asyncio.run(_serve(cloud, arguments.port, arguments.lifeline))
    finally:
        _leave(arguments.root)


if __name__ == "__main__":
    main()
