"""Endpoints: real server processes behind InvokeEndpoint, with health checks, updates without a gap, and one restart."""

from __future__ import annotations

import contextlib
import copy
import gzip
import http.client
import json
import math
import random
import shutil
import socket
import stat
import tarfile
import threading
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import boto3

from local_cloud.images import Image, Images
from local_cloud.sagemaker.common import Record, Request, Tags, arn, invalid, now, page, select
from local_cloud.sagemaker.container import Settings
from local_cloud.sagemaker.endpoint_metrics import EndpointMetrics
from local_cloud.sagemaker.logs import JobLog
from local_cloud.sagemaker.process import Child, aws_environment, mounted, network_environment
from local_cloud.sagemaker.registry import Registry
from local_cloud.sagemaker.s3_transfer import TransferError, download_object
from local_cloud.service import Cloud, ServiceError

REAL_TIME_BODY = 6_291_456
"""Bytes of a real-time invocation, at most."""
SERVERLESS_BODY = 4_194_304
"""Bytes of a serverless invocation, at most."""
_BLOCK_BYTES = 1 << 20
_DRAIN = 60.0
_FORWARDED = ("content-type", "accept", "x-amzn-sagemaker-custom-attributes", "x-amzn-sagemaker-inference-id")
_BUSY = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"

Answer = tuple[int, dict[str, str], bytes]


class StartError(Exception):
    """A server did not become healthy; the message is the FailureReason."""


class RollbackError(Exception):
    """An update was taken back; the message is the FailureReason."""


class ThrottledError(Exception):
    """More invocations at once than the variant's MaxConcurrency."""


class Server:
    """One variant's container. ``start`` returns when /ping answers 200."""

    def __init__(
        self, cloud: Cloud, images: Images, settings: Settings, *, endpoint: str, variant: Record, container: Record, role: str
    ) -> None:
        self._cloud, self._images, self._settings = cloud, images, settings
        self.variant, self._container, self._role = variant, container, role
        self.instances: int = variant.get("InitialInstanceCount", 0)
        self.name: str = variant["VariantName"]
        identifier = uuid.uuid4().hex[:16]
        self._folder = cloud.root / "endpoints" / endpoint / f"{self.name}-{identifier}"
        self._base = self._folder / "opt" / "ml"
        self.log_group = f"/aws/sagemaker/Endpoints/{endpoint}"
        self._log_path = cloud.root / "logs" / "endpoints" / f"{endpoint}.log"
        self._stream = f"{self.name}/{identifier}"
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._active = 0
        self._closing = threading.Event()
        self._ready = threading.Event()
        self._child: Child | None = None
        self._port = 0
        self._log: JobLog | None = None
        self._thread: threading.Thread | None = None
        self._session: boto3.Session | None = None
        self._image: Image | None = None

    @property
    def serverless(self) -> Record | None:
        """ServerlessConfig of the variant, if it is one."""
        config: Record | None = self.variant.get("ServerlessConfig")
        return config

    @property
    def digest(self) -> str:
        """The image's digest."""
        return self._image.digest if self._image else ""

    @property
    def image_uri(self) -> str:
        """The image as the model names it."""
        return str(self._container["Image"])

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.running()

    @property
    def pid(self) -> int | None:
        """Process id of the container's guard."""
        return self._child.pid if self._child else None

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Download, unpack, run, wait until healthy. Raises ``StartError``."""
        try:
            self._session = self._cloud.session(self._role, "sagemaker.amazonaws.com", self.name)
            self._image = self._images.resolve(self.image_uri, self._session)
            if self._image.root is None:
                msg = f"The image {self.image_uri} is a training container and cannot serve: give the model a serving image."
                raise StartError(msg)
            self._unpack(self._session)
        except ServiceError as error:
            raise StartError(error.message) from error
        except (TransferError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
            url = self._container.get("ModelDataUrl")
            msg = f'Failed to download model data for container "container_1" from URL: "{url}". {error}'
            raise StartError(msg) from error
        self._log = JobLog(self._cloud, self._session, path=self._log_path, group=self.log_group, stream=self._stream)
        child = self._launch()
        self._thread = threading.Thread(target=self._supervise, args=(child,), name=f"serve-{self._stream}", daemon=True)
        self._thread.start()
        self._await_health(child)

    def _unpack(self, session: boto3.Session) -> None:
        model = self._base / "model"
        model.mkdir(parents=True)
        for folder in ("home", "tmp"):
            (self._folder / folder).mkdir(parents=True)
        if "ModelDataUrl" in self._container:
            archive = self._folder / "model.tar.gz"
            download_object(self._cloud, session, self._container["ModelDataUrl"], archive)
            with gzip.open(archive) as packed:
                with tarfile.open(fileobj=packed, mode="r:") as tar:
                    tar.extractall(model, filter="data")  # the data filter refuses links and paths that lead outside
                while packed.read(_BLOCK_BYTES):  # gzip's checksum stands at its end, and a tar ends before it
                    pass
            archive.unlink()
        _protect(model, writable=False)

    def _launch(self) -> Child:
        image, session = self._image, self._session
        if image is None or session is None:  # start() sets both
            msg = "the server was not started"
            raise StartError(msg)
        self._port = _free_port()
        env = {
            **network_environment(),
            **image.environment(),
            **aws_environment(self._cloud, session),
            "HOME": str(self._folder / "home"),
            "TMPDIR": str(self._folder / "tmp"),
            "SAGEMAKER_BASE_DIR": str(self._base),
            "SM_MODEL_DIR": str(self._base / "model"),
            "SAGEMAKER_BIND_TO_PORT": str(self._port),
            "BIND_HOST": "127.0.0.1",  # our server's own: there is no container's network around it here
            "PYTHONUNBUFFERED": "1",
            **{key: mounted(value, self._base) for key, value in self._container.get("Environment", {}).items()},
        }
        command = [image.translate(word) for word in (*image.entrypoint, "serve")]
        with self._lock:
            if self._closing.is_set():
                msg = "the endpoint is being deleted"
                raise StartError(msg)
            self._child = Child(command, env=env, cwd=image.folder() or self._folder / "tmp")
            return self._child

    def _await_health(self, child: Child) -> None:
        seconds = self.variant.get("ContainerStartupHealthCheckTimeoutInSeconds", self._settings.health_deadline)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and child.running() and not self._closing.is_set():
            if self._ping():
                self._ready.set()
                return
            self._closing.wait(self._settings.ping_interval)
        state = f"it did not answer 200 within {seconds:g} s" if child.running() else f"it ended with exit code {child.wait()}"
        msg = (
            f"The primary container for production variant {self.name} did not pass the ping health check ({state}). "
            f"Please check CloudWatch logs for this endpoint ({self._log_path})."
        )
        raise StartError(msg)

    def _ping(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return _http("GET", self._port, "/ping", None, {}, 2.0)[0] == http.client.OK
        return False

    def _supervise(self, child: Child) -> None:
        """Follow the log; when a healthy server dies, start it once more."""
        self._follow(child)
        child.wait()
        if self._closing.is_set() or not self._ready.is_set():
            return
        self._ready.clear()
        self._say(f"the server of variant {self.name} ended with exit code {child.wait()}: starting it once more")
        try:
            again = self._launch()
            waiter = threading.Thread(target=self._await_restart, args=(again,), daemon=True)
            waiter.start()
            self._follow(again)
            waiter.join()
            again.wait()
        except StartError as error:
            self._say(str(error))
        self._ready.clear()

    def _await_restart(self, child: Child) -> None:
        try:
            self._await_health(child)
        except StartError as error:
            self._say(str(error))
            child.kill()

    def _follow(self, child: Child) -> None:
        for line in child.lines():
            if self._log is not None:
                self._log.write(line)

    def _say(self, line: str) -> None:
        if self._log is not None:
            self._log.write(f"[local cloud] {line}")

    # -- use -----------------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Hold a place for an invocation, so that nobody ends the server before it is answered. Raises ``ThrottledError``."""
        with self._lock:
            if self.serverless is not None and self._active >= self.serverless["MaxConcurrency"]:
                raise ThrottledError
            self._active += 1

    def release(self) -> None:
        """Give a place back."""
        with self._idle:
            self._active -= 1
            self._idle.notify_all()

    def invoke(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """POST /invocations, with a place reserved. Raises ``TimeoutError``, ``OSError`` or ``http.client.HTTPException``."""
        if not self._ready.wait(self._settings.invocation_timeout if self.alive else 0):
            msg = "the server is not running"
            raise ConnectionError(msg)
        sent = {"content-type": "application/octet-stream", **headers}
        return _http("POST", self._port, "/invocations", body, sent, self._settings.invocation_timeout)

    def drain(self) -> None:
        """Wait for the invocations under way."""
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, timeout=_DRAIN)

    def stop(self, grace: float) -> None:
        """End the process and remove its files."""
        with self._lock:
            self._closing.set()
            child = self._child
        if child is not None:
            child.stop(grace)
        if self._thread is not None:
            self._thread.join(10)
        if self._log is not None:
            self._log.close()
            self._log = None
        _protect(self._folder, writable=True)
        shutil.rmtree(self._folder, ignore_errors=True)


class Endpoint:
    """An endpoint's record and its servers."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.servers: list[Server] = []
        """The fleet that serves; during an update the old one (blue)."""
        self.starting: list[Server] = []
        """The new fleet (green), until it is the one that serves."""
        self.shifted = 0.0
        """Share of the requests that the new fleet gets already."""
        self.thread: threading.Thread | None = None


class Endpoints:
    """All endpoints of the cloud."""

    def __init__(self, cloud: Cloud, images: Images, registry: Registry, tags: Tags, settings: Settings) -> None:
        self._cloud, self._images, self._registry = cloud, images, registry
        self._tags, self._settings = tags, settings
        self._lock = threading.RLock()
        self._endpoints: dict[str, Endpoint] = {}
        self._metrics = EndpointMetrics(cloud)
        self._stopping = threading.Event()

    # -- operations ----------------------------------------------------------------------------------------------------

    def create(self, request: Request) -> Record:
        """CreateEndpoint."""
        name, resource = request["EndpointName"], arn(self._cloud, "endpoint", request["EndpointName"])
        self._registry.describe_config(request)
        moment = now()
        record = {"EndpointName": name, "EndpointArn": resource, "EndpointConfigName": request["EndpointConfigName"]}
        record |= {"EndpointStatus": "Creating", "CreationTime": moment, "LastModifiedTime": moment}
        with self._lock:
            if name in self._endpoints:
                raise invalid(f'Cannot create already existing endpoint "{resource}".')
            endpoint = self._endpoints[name] = Endpoint(record)
            _begin(endpoint, request)
            self._tags.add(resource, request.get("Tags", []))
            self._background(endpoint, self._deploy, endpoint, request["EndpointConfigName"], {})
        return {"EndpointArn": resource}

    def update(self, request: Request) -> Record:
        """UpdateEndpoint."""
        endpoint = self._endpoint(request["EndpointName"])
        self._registry.describe_config(request)
        with self._lock:
            status, resource = endpoint.record["EndpointStatus"], endpoint.record["EndpointArn"]
            if status in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{resource}".')
            if status != "InService":
                raise invalid(f'Cannot update endpoint "{resource}" in status {status}: delete it and create it again.')
            self._set(endpoint, EndpointStatus="Updating")
            _begin(endpoint, request)
            endpoint.record.pop("FailureReason", None)
            # With several machines of a variant one server stands for all of them; their number is kept where it is asked for.
            kept = (
                {server.name: server.instances for server in endpoint.servers} if request.get("RetainAllVariantProperties") else {}
            )
            deployment = request.get("DeploymentConfig", {})
            self._background(endpoint, self._deploy, endpoint, request["EndpointConfigName"], deployment, kept)
        return {"EndpointArn": resource}

    def delete(self, request: Request) -> Record:
        """DeleteEndpoint."""
        endpoint = self._endpoint(request["EndpointName"])
        with self._lock:
            if endpoint.record["EndpointStatus"] in _BUSY:
                raise invalid(f'Cannot update in-progress endpoint "{endpoint.record["EndpointArn"]}".')
            self._set(endpoint, EndpointStatus="Deleting")
            self._background(endpoint, self._remove, endpoint)
        return {}

    def describe(self, request: Request) -> Record:
        """DescribeEndpoint."""
        endpoint = self._endpoint(request["EndpointName"])
        with self._lock:
            answer = copy.deepcopy(endpoint.record)
            if endpoint.servers:
                answer["ProductionVariants"] = [_variant_summary(server) for server in endpoint.servers]
            return answer

    def list_endpoints(self, request: Request) -> Record:
        """ListEndpoints."""
        fields = ("EndpointName", "EndpointArn", "CreationTime", "LastModifiedTime", "EndpointStatus")
        with self._lock:
            items = [{key: endpoint.record[key] for key in fields} for endpoint in self._endpoints.values()]
        return page("Endpoints", select(items, request, name="EndpointName", status="EndpointStatus"), request)

    def servers(self, name: str) -> list[Server]:
        """The servers that answer now."""
        with self._lock:
            return list(self._endpoint(name).servers)

    def variants(self, name: str) -> list[str]:
        """Names of an endpoint's variants on machines; none when there is no such endpoint."""
        with self._lock:
            endpoint = self._endpoints.get(name)
            return [server.name for server in endpoint.servers if not server.serverless] if endpoint else []

    def stop(self) -> None:
        """End every server at once."""
        self._stopping.set()
        self._metrics.stop()
        with self._lock:
            endpoints = list(self._endpoints.values())
            servers = [server for endpoint in endpoints for server in (*endpoint.servers, *endpoint.starting)]
        for server in servers:
            server.stop(0.2)
        for endpoint in endpoints:
            if endpoint.thread is not None:
                endpoint.thread.join(30)

    # -- deployment ----------------------------------------------------------------------------------------------------

    def _endpoint(self, name: str) -> Endpoint:
        with self._lock:
            if name not in self._endpoints:
                raise invalid(f'Could not find endpoint "{arn(self._cloud, "endpoint", name)}".')
            return self._endpoints[name]

    def _set(self, endpoint: Endpoint, **changes: Any) -> None:
        with self._lock:
            endpoint.record.update(changes, LastModifiedTime=now())

    def _background(self, endpoint: Endpoint, work: Any, *arguments: Any) -> None:
        name = endpoint.record["EndpointName"]
        endpoint.thread = threading.Thread(target=work, args=arguments, name=f"endpoint-{name}", daemon=True)
        endpoint.thread.start()

    def _deploy(
        self, endpoint: Endpoint, config_name: str, deployment: Record, kept: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Start the servers of a configuration; healthy, they take over as ``deployment`` says, else the old ones stay."""
        updating = endpoint.record["EndpointStatus"] == "Updating"
        try:
            self._start_servers(endpoint, config_name)
            for server in endpoint.starting:
                server.instances = kept.get(server.name, 0) or server.instances
            if updating:
                self._shift(endpoint, deployment)
        except Exception as error:  # an endpoint must always leave Creating and Updating
            reason = error.message if isinstance(error, ServiceError) else str(error)
            with self._lock:
                failed, endpoint.starting, endpoint.shifted = endpoint.starting, [], 0.0
                endpoint.record.pop("PendingDeploymentSummary", None)
                self._set(endpoint, EndpointStatus="InService" if updating else "Failed", FailureReason=reason[:1024])
            self._retire(failed)
            return
        with self._lock:
            old, endpoint.servers, endpoint.starting, endpoint.shifted = endpoint.servers, endpoint.starting, [], 0.0
            endpoint.record.pop("PendingDeploymentSummary", None)
            self._set(endpoint, EndpointStatus="InService", EndpointConfigName=config_name)
        self._retire(old)

    def _retire(self, servers: list[Server]) -> None:
        """Let servers answer what they have begun, then end them."""
        for server in servers:
            server.drain()
            server.stop(min(self._settings.grace, 30.0))

    def _shift(self, endpoint: Endpoint, deployment: Record) -> None:
        """Move traffic to the new fleet step by step, watching the alarms. Raises RollbackError when one rings."""
        alarms = [alarm["AlarmName"] for alarm in deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])]
        for share, wait_s in _steps(deployment):
            with self._lock:
                endpoint.shifted = share
            self._watch(endpoint, alarms, wait_s / self._settings.deployment_speed)

    def _watch(self, endpoint: Endpoint, alarms: list[str], seconds: float) -> None:
        """Wait, unless the new fleet dies or an alarm rings."""
        client = self._cloud.admin().client("cloudwatch", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        deadline = time.monotonic() + seconds
        while True:
            ringing = _ringing(client, alarms)
            if ringing or not all(server.alive for server in endpoint.starting):
                with self._lock:
                    endpoint.shifted = 0.0
                    self._set(endpoint, EndpointStatus="RollingBack")
                why = f"the alarm {ringing[0]} is in the state ALARM" if ringing else "a container of the new fleet ended"
                msg = f"The deployment was rolled back because {why}. The previous configuration serves."
                raise RollbackError(msg)
            if self._stopping.wait(min(self._settings.alarm_interval, max(0.0, deadline - time.monotonic()))):
                msg = "the local cloud is stopping"
                raise RollbackError(msg)
            if time.monotonic() >= deadline:
                return

    def _start_servers(self, endpoint: Endpoint, config_name: str) -> None:
        config = self._registry.describe_config({"EndpointConfigName": config_name})
        for variant in config["ProductionVariants"]:
            container, role = self._registry.container(variant["ModelName"])
            name = endpoint.record["EndpointName"]
            server = Server(
                self._cloud, self._images, self._settings, endpoint=name, variant=variant, container=container, role=role
            )
            with self._lock:
                if self._stopping.is_set():
                    msg = "the local cloud is stopping"
                    raise StartError(msg)
                endpoint.starting.append(server)
            server.start()

    def _remove(self, endpoint: Endpoint) -> None:
        with self._lock:
            servers, endpoint.servers = endpoint.servers, []
        for server in servers:
            server.drain()
            server.stop(min(self._settings.grace, 30.0))
        with self._lock:
            self._endpoints.pop(endpoint.record["EndpointName"], None)
            self._tags.drop(endpoint.record["EndpointArn"])

    # -- runtime -------------------------------------------------------------------------------------------------------

    def invoke(self, name: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """InvokeEndpoint: the model's answer, or an error of the runtime's protocol."""
        given = {key.lower(): value for key, value in headers.items()}
        try:
            server = self._choose(name, given.get("x-amzn-sagemaker-target-variant"))
        except ServiceError as error:
            return _error(400, "ValidationError", error.message)
        except ThrottledError:
            return _error(429, "ThrottlingException", "Rate exceeded: the endpoint's MaxConcurrency is reached. Try again later.")
        try:
            return self._invoke(name, server, body, given)
        finally:
            server.release()

    def _invoke(self, name: str, server: Server, body: bytes, given: Mapping[str, str]) -> Answer:
        """Ask a server that is reserved."""
        limit = SERVERLESS_BODY if server.serverless else REAL_TIME_BODY
        if len(body) > limit:
            return _error(413, "ValidationError", f"Request size {len(body)} bytes exceeds the limit of {limit} bytes: send less.")
        started = time.perf_counter()
        try:
            status, answered, content = server.invoke(body, {key: given[key] for key in _FORWARDED if key in given})
            self._metrics.note(name, server.name, status, time.perf_counter() - started)
        except TimeoutError:
            self._metrics.note(name, server.name, 0, time.perf_counter() - started)
            words = "Your invocation timed out while waiting for a response from container primary"
            return self._model_error(server, 0, words)
        except (OSError, http.client.HTTPException) as error:
            self._metrics.note(name, server.name, 0, time.perf_counter() - started)
            return self._model_error(server, 0, f"The container did not answer: {error}")
        if not 200 <= status < 300:
            return self._model_error(server, status, content.decode("utf-8", "replace"))
        result = {"Content-Type": answered.get("content-type", "application/octet-stream")}
        result["x-Amzn-Invoked-Production-Variant"] = server.name
        if _ATTRIBUTES in answered:
            result["X-Amzn-SageMaker-Custom-Attributes"] = answered[_ATTRIBUTES]
        return 200, result, content

    def _choose(self, name: str, target: str | None) -> Server:
        """A server with a place reserved. Raises ``ServiceError`` or ``ThrottledError``."""
        with self._lock:
            endpoint = self._endpoints.get(name)
            if endpoint is None:
                raise invalid(f"Endpoint {name} of account {self._cloud.account} not found.")
            # While an update goes on a share of the requests is the new fleet's.
            fleet = endpoint.starting if random.random() < endpoint.shifted else endpoint.servers  # noqa: S311 - spreads load
            servers = [server for server in fleet if target in (None, server.name)]
            if not servers and target is not None and endpoint.servers:
                raise invalid(f"Variant {target} not found in endpoint {name}.")
            if not servers:
                status = endpoint.record["EndpointStatus"]
                raise invalid(f"Endpoint {name} of account {self._cloud.account} is not in service: its status is {status}.")
            weights = [server.variant["InitialVariantWeight"] for server in servers]
            chosen = random.choices(servers, weights if sum(weights) else None)[0]  # noqa: S311 - spreads load, guards nothing
            chosen.reserve()  # while the fleets cannot change
            return chosen

    def _model_error(self, server: Server, status: int, message: str) -> Answer:
        side = "client" if 400 <= status < 500 else "server"
        region, account = self._cloud.region, self._cloud.account
        words = (
            f'Received {side} error ({status}) from primary with message "{message[:1024]}". See the log group {server.log_group} '
            f"in account {account} for more information."
        )
        stream = f"arn:aws:logs:{region}:{account}:log-group:{server.log_group}"
        return _error(424, "ModelError", words, OriginalStatusCode=status, OriginalMessage=message, LogStreamArn=stream)


def _begin(endpoint: Endpoint, request: Request) -> None:
    """Say in the description what is being deployed; the configuration there is the old one until that is done."""
    pending = {"EndpointConfigName": request["EndpointConfigName"], "StartTime": now()}
    endpoint.record["PendingDeploymentSummary"] = pending


def _ringing(client: Any, alarms: list[str]) -> list[str]:
    """Those of the alarms that ring."""
    if not alarms:
        return []
    found = client.describe_alarms(AlarmNames=alarms)["MetricAlarms"]
    missing = sorted(set(alarms) - {alarm["AlarmName"] for alarm in found})
    if missing:
        msg = f"the alarm {missing[0]} of the DeploymentConfig does not exist: create it, or correct its name"
        raise RollbackError(msg)
    return [str(alarm["AlarmName"]) for alarm in found if alarm["StateValue"] == "ALARM"]


def _steps(deployment: Record) -> list[tuple[float, float]]:
    """``(share of the traffic that the new fleet gets, seconds to watch it)`` of an update, the last one 1.0."""
    blue_green = deployment.get("BlueGreenUpdatePolicy", {})
    routing = blue_green.get("TrafficRoutingConfiguration", {})
    rolling = deployment.get("RollingUpdatePolicy")
    wait_s = float((rolling or routing).get("WaitIntervalInSeconds", 0))
    if rolling:
        size = _share(rolling["MaximumBatchSize"])
    elif routing.get("Type") == "CANARY":
        return [(_share(routing["CanarySize"]), wait_s), (1.0, wait_s)]
    elif routing.get("Type") == "LINEAR":
        size = _share(routing["LinearStepSize"])
    else:
        size = 1.0
    count = math.ceil(1.0 / size - 1e-9)
    return [(min(1.0, size * (step + 1)), wait_s) for step in range(count)]


def _share(capacity: Record) -> float:
    """A CapacitySize as a share; of one server that stands for all machines an INSTANCE_COUNT is a half."""
    return float(capacity["Value"]) / 100 if capacity["Type"] == "CAPACITY_PERCENT" else 0.5


def _error(status: int, code: str, message: str, **members: Any) -> Answer:
    headers = {"Content-Type": "application/json", "x-amzn-errortype": code}
    return status, headers, json.dumps({"Message": message, **members}).encode()


def _variant_summary(server: Server) -> Record:
    weight = server.variant["InitialVariantWeight"]
    image = {"SpecifiedImage": server.image_uri, "ResolutionTime": now()}
    if server.digest:
        image["ResolvedImage"] = f"{server.image_uri.rsplit(':', 1)[0]}@{server.digest}"
    found: Record = {"VariantName": server.name, "DeployedImages": [image], "CurrentWeight": weight, "DesiredWeight": weight}
    if server.serverless:
        return {**found, "CurrentServerlessConfig": dict(server.serverless), "CurrentInstanceCount": 0}
    return {**found, "CurrentInstanceCount": server.instances, "DesiredInstanceCount": server.instances}


def _http(
    method: str, port: int, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float
) -> tuple[int, dict[str, str], bytes]:
    """One request to a server of ours: status, headers with lower-case names, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _protect(folder: Path, *, writable: bool) -> None:
    """Take away (or give back) write permission below ``folder``: a container sees its model read-only."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() or not path.exists():
            continue
        mode = path.stat().st_mode
        path.chmod(mode | stat.S_IWUSR if writable else mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
