"""A small stand-in for the local cloud: moto's server for S3, logs, ECR and CodeBuild, roles by name only."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.model import Shape
from moto.server import ThreadedMotoServer

from local_cloud.service import Caller, ServiceError
from local_cloud.validation import service_model

ROLE = "arn:aws:iam::123456789012:role/job"
IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch:2.13-cpu-amzn2023-sagemaker"
CALLER = Caller("AKIA", "arn:aws:sts::123456789012:assumed-role/machine/x")
BUCKET = "data"


class FakeCloud:
    """Satisfies ``local_cloud.service.Cloud``. Any role but ``…/nobody`` may be assumed."""

    account = "123456789012"
    region = "us-east-1"

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.assumed: list[tuple[str, str, str]] = []

    def session(self, role_arn: str, service: str, name: str) -> boto3.Session:
        if role_arn.endswith("/nobody"):
            raise ServiceError("AccessDenied", f"{role_arn} does not trust {service}", 403)
        self.assumed.append((role_arn, service, name))
        return boto3.Session("ASIAJOB", "secret", "token", region_name=self.region)

    def admin(self) -> boto3.Session:
        return boto3.Session("ADMIN", "secret", region_name=self.region)

    def client(self, service: str) -> Any:
        return self.admin().client(service, endpoint_url=self.url)

    def put(self, key: str, body: bytes | str) -> None:
        s3 = self.client("s3")
        s3.put_object(Bucket=BUCKET, Key=key, Body=body)
        s3.close()

    def get(self, key: str) -> bytes:
        s3 = self.client("s3")
        try:
            return s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        finally:
            s3.close()

    def keys(self, prefix: str) -> list[str]:
        s3 = self.client("s3")
        try:
            return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
        finally:
            s3.close()


@contextlib.contextmanager
def moto_cloud(root: Path) -> Iterator[FakeCloud]:
    """A fake cloud with its bucket, on moto's own server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        cloud = FakeCloud(root, f"http://{host}:{port}")
        urllib.request.urlopen(f"{cloud.url}/moto-api/reset", data=b"").close()  # moto's state belongs to the process
        s3 = cloud.client("s3")
        s3.create_bucket(Bucket=BUCKET)
        s3.close()
        yield cloud
    finally:
        server.stop()


SERVER_URI = "123456789012.dkr.ecr.us-east-1.amazonaws.com/server:t1"


@contextlib.contextmanager
def serving_cloud(root: Path, program: str) -> Iterator[FakeCloud]:
    """A fake cloud whose registry has a serving image, SERVER_URI, that runs ``program``."""
    with moto_cloud(root) as cloud:
        ecr = cloud.client("ecr")
        ecr.create_repository(repositoryName="server")
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        part = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2, "digest": "sha256:" + "a" * 64}
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": part, "layers": []})
        made = ecr.put_image(repositoryName="server", imageManifest=manifest, imageManifestMediaType=kind, imageTag="t1")
        ecr.close()
        write_image(cloud.root, "server", "t1", program, made["image"]["imageId"]["imageDigest"])
        yield cloud


class Client:
    """Calls a service as the local cloud's front door does: request and answer checked against botocore's model."""

    def __init__(self, service: Any, name: str = "sagemaker") -> None:
        self.service = service
        self._model = service_model(name)

    def __call__(self, operation: str, **request: Any) -> dict[str, Any]:
        model = self._model.operation_model(operation)
        answer = self.service.call(operation, request, CALLER)
        if model.output_shape is not None:
            problems = list(conformity(answer, model.output_shape, operation))
            assert not problems, problems
        return answer


_TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "long": int,
    "float": (int, float),
    "double": (int, float),
    "map": dict,
    "list": list,
    "structure": dict,
}


def conformity(value: Any, shape: Shape, path: str) -> Any:
    """Differences between an answer and botocore's output shape."""
    kind = shape.type_name
    if kind == "timestamp":
        if not (hasattr(value, "tzinfo") and value.tzinfo):
            yield f"{path}: {value!r} is no aware datetime"
        return
    if not isinstance(value, _TYPES[kind]):
        yield f"{path}: {value!r} is no {kind}"
        return
    if kind == "structure":
        for name in shape.required_members:
            if name not in value:
                yield f"{path}.{name} is missing"
        for name, part in value.items():
            if name not in shape.members:
                yield f"{path}.{name} is unknown"
            else:
                yield from conformity(part, shape.members[name], f"{path}.{name}")
    elif kind == "list":
        for part in value:
            yield from conformity(part, shape.member, f"{path}[]")
    elif kind == "map":
        for part in value.values():
            yield from conformity(part, shape.value, f"{path}{{}}")
    elif kind == "string" and getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{path}: {value!r} is not in {shape.enum}"


def wait(describe: Callable[[], dict[str, Any]], field: str, busy: tuple[str, ...], seconds: float = 40) -> dict[str, Any]:
    """Poll until ``field`` leaves the busy states."""
    deadline = time.monotonic() + seconds
    while (answer := describe())[field] in busy:
        assert time.monotonic() < deadline, f"still {answer[field]}"
        time.sleep(0.05)
    return answer


def archive(files: dict[str, str]) -> bytes:
    """A .tar.gz of text files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def names(data: bytes) -> list[str]:
    """Files in a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return sorted(member.name for member in tar.getmembers() if member.isfile())


def write_image(root: Path, repository: str, tag: str, server: str, digest: str) -> None:
    """An image as the local CodeBuild leaves it, with the running Python as its environment."""
    folder = root / "images" / repository / "made" / digest[-8:]
    (folder / "rootfs" / "opt" / "program").mkdir(parents=True)
    (folder / "rootfs" / "opt" / "program" / "server.py").write_text(server)
    data = {
        "venv": sys.prefix,
        "root": str(folder / "rootfs"),
        "entrypoint": ["python", "/opt/program/server.py"],
        "cmd": ["serve"],
        "env": {},
        "workdir": "/opt/program",
        "paths": ["/opt/program"],
        "digest": digest,
    }
    (root / "images" / repository / f"{tag}.json").write_text(json.dumps(data))
