"""CodeBuild on this machine: the effect of ``docker build`` and ``docker push``, with the build's own role, and without Docker.

Projects stay in ministack. A build downloads the project's source, executes its Dockerfile as an environment
(``dockerfile.py``), and puts the image's tag into ECR. The buildspec's commands are not run one by one: a build is accepted
only if they build and push an image, and what they do is done.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from local_cloud.dockerfile import Builder, DockerfileError, Result
from local_cloud.images import Images
from local_cloud.sagemaker.common import Record, Request, now
from local_cloud.sagemaker.logs import JobLog
from local_cloud.sagemaker.process import Child
from local_cloud.sagemaker.s3_transfer import TransferError, download_object
from local_cloud.service import Caller, Cloud, Permission, ServiceError

SUPPORTED = frozenset({"projectName", "environmentVariablesOverride", "timeoutInMinutesOverride", "idempotencyToken"})
"""Fields of StartBuild that act as on AWS."""
IGNORED = {
    "computeTypeOverride": "builds run on this machine",
    "imageOverride": "builds run on this machine",
    "environmentTypeOverride": "builds run on this machine",
    "privilegedModeOverride": "there is no Docker daemon",
    "queuedTimeoutInMinutesOverride": "builds start at once",
}
"""Fields of StartBuild accepted without effect: field → reason. Every other field is refused by name."""
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_TAKEN = frozenset({"ImageTagAlreadyExistsException", "ImageAlreadyExistsException"})
_STEPS = ("SUBMITTED", "QUEUED", "PROVISIONING", "DOWNLOAD_SOURCE", "INSTALL", "PRE_BUILD", "BUILD", "POST_BUILD", "FINALIZING")


def _bad_input(message: str) -> ServiceError:
    return ServiceError("InvalidInputException", message)


class BuildError(Exception):
    """A phase failed: AWS's status code and a message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StoppedError(Exception):
    """The build was stopped or ran out of time."""


class Build:
    """One build and its thread."""

    def __init__(self, cloud: Cloud, images: Images, project: Record, request: Request, number: int, initiator: str) -> None:
        self._cloud, self._images, self._project = cloud, images, project
        name = project["name"]
        self.identifier = f"{name}:{uuid.uuid4()}"
        self.lock = threading.RLock()
        self._variables = _variables(project, request)
        minutes = request.get("timeoutInMinutesOverride") or project.get("timeoutInMinutes") or 60
        self._deadline = time.monotonic() + 60.0 * minutes
        self._stop = threading.Event()
        self._shutdown = False
        self._log: JobLog | None = None
        self._session: boto3.Session | None = None
        self._result: Result | None = None
        self._target = cloud.root / "images" / self._repository() / "made" / self.identifier.split(":")[1]
        settings = (project.get("logsConfig") or {}).get("cloudWatchLogs") or {}
        self._group = settings.get("groupName") or f"/aws/codebuild/{name}"
        prefix = settings.get("streamName")
        self._stream = f"{prefix}/{self.identifier.split(':')[1]}" if prefix else self.identifier.split(":")[1]
        environment = copy.deepcopy(project.get("environment") or {})
        environment["environmentVariables"] = [{"name": key, "value": value} for key, value in self._variables.items()]
        self.record: Record = {
            "id": self.identifier,
            "arn": f"arn:aws:codebuild:{cloud.region}:{cloud.account}:build/{self.identifier}",
            "buildNumber": number,
            "startTime": now(),
            "currentPhase": "SUBMITTED",
            "buildStatus": "IN_PROGRESS",
            "projectName": name,
            "phases": [],
            "source": copy.deepcopy(project["source"]),
            "artifacts": {"location": ""},
            "environment": environment,
            "serviceRole": project["serviceRole"],
            "logs": {"groupName": self._group, "streamName": self._stream},
            "timeoutInMinutes": int(minutes),
            "queuedTimeoutInMinutes": int(project.get("queuedTimeoutInMinutes") or 480),
            "buildComplete": False,
            "initiator": initiator,
        }
        self._thread = threading.Thread(target=self._run, name=f"build-{self.identifier}", daemon=True)

    def _repository(self) -> str:
        return self._variables["REPOSITORY_URI"].partition("/")[2]

    def start(self) -> None:
        """Run in the background."""
        self._thread.start()

    def stop(self, *, shutdown: bool = False) -> None:
        """End the program under way and the build."""
        self._shutdown = self._shutdown or shutdown
        self._stop.set()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread.ident is not None:
            self._thread.join(30)

    def describe(self) -> Record:
        """A copy of the record."""
        with self.lock:
            return copy.deepcopy(self.record)

    # -- the run -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        work = {
            "PROVISIONING": self._provision,
            "DOWNLOAD_SOURCE": self._download,
            "PRE_BUILD": self._log_in,
            "BUILD": self._build,
            "POST_BUILD": self._push,
        }
        status = "SUCCEEDED"
        for phase in _STEPS:
            if status == "SUCCEEDED" or phase == "FINALIZING":
                outcome = self._phase(phase, work.get(phase, lambda: None))
                status = outcome if status == "SUCCEEDED" else status
        if self._log is not None:
            self._log.close()
        shutil.rmtree(self._source, ignore_errors=True)
        if status != "SUCCEEDED":
            shutil.rmtree(self._target, ignore_errors=True)
        with self.lock:
            moment = now()
            self.record["phases"].append({"phaseType": "COMPLETED", "startTime": moment})
            self.record.update(currentPhase="COMPLETED", buildStatus=status, endTime=moment, buildComplete=True)

    def _phase(self, name: str, work: Any) -> str:
        entry: Record = {"phaseType": name, "startTime": now()}
        with self.lock:
            self.record["currentPhase"] = name
            self.record["phases"].append(entry)
        status, context = "SUCCEEDED", {"statusCode": "", "message": ""}
        try:
            work()
        except StoppedError:
            status = "STOPPED" if self._stop.is_set() else "TIMED_OUT"
        except (DockerfileError, BuildError) as error:
            code = error.code if isinstance(error, BuildError) else "COMMAND_EXECUTION_ERROR"
            status, context = "FAILED", {"statusCode": code, "message": str(error)}
        except ServiceError as error:
            status, context = "FAILED", {"statusCode": error.code, "message": error.message}
        except Exception as error:  # a build must always end in a status
            status, context = "FAULT", {"statusCode": "INTERNAL_SERVICE_ERROR", "message": f"{type(error).__name__}: {error}"}
        if context["message"]:
            self._say(f"{name} {status}: {context['message']}")
        with self.lock:
            end = now()
            seconds = round((end - entry["startTime"]).total_seconds())
            entry.update(phaseStatus=status, endTime=end, durationInSeconds=seconds, contexts=[context])
        return status

    def _provision(self) -> None:
        self._session = self._cloud.session(self._project["serviceRole"], "codebuild.amazonaws.com", "AWSCodeBuild")
        path = self._cloud.root / "logs" / "builds" / f"{self.identifier.replace(':', '-')}.log"
        self._log = JobLog(self._cloud, self._session, path=path, group=self._group, stream=self._stream)

    @property
    def _source(self) -> Path:
        return self._cloud.root / "builds" / self.identifier.replace(":", "-")

    @property
    def _role(self) -> boto3.Session:
        if self._session is None:
            raise BuildError("INTERNAL_SERVICE_ERROR", "the build has no credentials")
        return self._session

    def _download(self) -> None:
        archive = self._source / "source.zip"
        try:
            download_object(self._cloud, self._role, f"s3://{self._project['source']['location']}", archive)
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(self._source / "src")  # zipfile drops absolute paths and ".." itself
        except (TransferError, zipfile.BadZipFile) as error:
            raise BuildError("CLIENT_ERROR", f"the source {self._project['source']['location']} cannot be read: {error}") from error
        archive.unlink()

    def _log_in(self) -> None:
        self._ecr("get_authorization_token")

    def _build(self) -> None:
        file = self._source / "src" / "Dockerfile"
        if not file.is_file():
            raise BuildError("COMMAND_EXECUTION_ERROR", "the source has no Dockerfile at its top: docker build needs one there.")
        self._target.mkdir(parents=True)
        builder = Builder(self._source / "src", self._target, self._execute, self._say)
        self._result = builder.build(file.read_text())

    def _push(self) -> None:
        if self._result is None:
            raise BuildError("INTERNAL_SERVICE_ERROR", "nothing was built")
        result, tag = self._result, self._variables["IMAGE_TAG"]
        data = {
            "venv": str(result.venv),
            "root": str(result.root),
            "entrypoint": result.entrypoint,
            "cmd": result.cmd,
            "env": result.env,
            "workdir": result.workdir,
            "paths": sorted(result.paths),
            "base": result.base,
        }
        manifest = _manifest(json.dumps(data, sort_keys=True).encode())
        with self._images.pushing:
            try:
                answer = self._ecr(
                    "put_image",
                    repositoryName=self._repository(),
                    imageManifest=manifest,
                    imageManifestMediaType=_MANIFEST,
                    imageTag=tag,
                )
            except BuildError as error:
                self._use_other(tag, error)
                return
            data["digest"] = answer["image"]["imageId"]["imageDigest"]
            file = self._images.built(self._repository(), tag)
            temporary = file.with_suffix(".new")
            temporary.write_text(json.dumps(data, indent=2))
            temporary.replace(file)
        self._say(f"{tag}: digest: {data['digest']}")

    def _use_other(self, tag: str, error: BuildError) -> None:
        """An immutable tag that another build pushed meanwhile is no failure to a buildspec that then looks at it."""
        cause = error.__cause__
        taken = isinstance(cause, ClientError) and cause.response["Error"]["Code"] in _TAKEN
        if not taken or "docker manifest inspect" not in self._project["source"]["buildspec"]:
            raise error
        self._say(f"docker push: {error}")
        answer = self._ecr("batch_get_image", repositoryName=self._repository(), imageIds=[{"imageTag": tag}])
        self._say(f"{tag}: digest of the other build: {answer['images'][0]['imageId']['imageDigest']}")
        shutil.rmtree(self._target, ignore_errors=True)

    def _ecr(self, operation: str, **request: Any) -> Record:
        ecr: Any = self._role.client("ecr", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        try:
            answer: Record = getattr(ecr, operation)(**request)
        except (ClientError, BotoCoreError) as error:
            raise BuildError("COMMAND_EXECUTION_ERROR", f"ECR refused: {error}") from error
        finally:
            ecr.close()
        return answer

    def _execute(self, command: Sequence[str], env: Mapping[str, str], folder: Path) -> int:
        """Run one program of the build, its output in the log. Raises ``StoppedError``."""
        if self._stop.is_set():
            raise StoppedError
        child = Child(command, env=env, cwd=folder)
        reader = threading.Thread(target=self._follow, args=(child,), daemon=True)
        reader.start()
        while child.running() and not self._stop.is_set() and time.monotonic() < self._deadline:
            self._stop.wait(0.05)
        stopped = child.running()
        child.kill()
        code = child.wait()
        reader.join()
        if stopped:
            raise StoppedError
        return code

    def _follow(self, child: Child) -> None:
        for line in child.lines():
            self._say(line)

    def _say(self, line: str) -> None:
        if self._log is not None:
            self._log.write(line)


class CodeBuild:
    """StartBuild, BatchGetBuilds, StopBuild. Implements ``local_cloud.service.Service``."""

    def __init__(self, cloud: Cloud, images: Images) -> None:
        self._cloud, self._images = cloud, images
        self._lock = threading.Lock()
        self._builds: dict[str, Build] = {}
        self._tokens: dict[str, str] = {}

    def permissions(self, operation: str, request: Request) -> list[Permission]:
        """Every action of CodeBuild is checked on the project."""
        names: dict[str, Callable[[], list[str]]] = {
            "StartBuild": lambda: [request["projectName"]],
            "StopBuild": lambda: [_project_of(request["id"])],
            "BatchGetBuilds": lambda: sorted({_project_of(identifier) for identifier in request["ids"]}),
        }
        projects = names[operation]() if operation in names else ["*"]
        return [Permission(f"codebuild:{operation}", self._project_arn(name)) for name in projects]

    def call(self, operation: str, request: Request, caller: Caller) -> Record:
        """Answer a request or raise ``ServiceError``."""
        if operation == "StartBuild":
            return self._start(request, caller)
        if operation == "BatchGetBuilds":
            return self._get(request)
        if operation == "StopBuild":
            return self._stop_build(request)
        raise _bad_input(f"{operation} is not emulated by the local CodeBuild: StartBuild, BatchGetBuilds and StopBuild are.")

    def stop(self) -> None:
        """End every build and wait for it."""
        for build in list(self._builds.values()):
            build.stop(shutdown=True)
        for build in list(self._builds.values()):
            build.join()

    def _project_arn(self, name: str) -> str:
        short = name.rsplit("/", 1)[-1]
        return f"arn:aws:codebuild:{self._cloud.region}:{self._cloud.account}:project/{short}"

    def _start(self, request: Request, caller: Caller) -> Record:
        for field in request:
            if field not in SUPPORTED and field not in IGNORED:
                raise _bad_input(f"StartBuild: {field} is not emulated by the local CodeBuild: remove it.")
        project = self._project(request["projectName"])
        _check(project, _variables(project, request))
        token = request.get("idempotencyToken")
        with self._lock:
            if token in self._tokens:
                return {"build": self._builds[self._tokens[token]].describe()}
            number = 1 + sum(build.record["projectName"] == project["name"] for build in self._builds.values())
            build = Build(self._cloud, self._images, project, request, number, caller.arn.rpartition(":")[2])
            self._builds[build.identifier] = build
            if token:
                self._tokens[token] = build.identifier
        answer = build.describe()
        build.start()
        return {"build": answer}

    def _project(self, name: str) -> Record:
        client: Any = self._cloud.admin().client("codebuild", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        try:
            found: list[Record] = client.batch_get_projects(names=[name.rsplit("/", 1)[-1]])["projects"]
        finally:
            client.close()
        if not found:
            raise ServiceError("ResourceNotFoundException", f"Project cannot be found: {self._project_arn(name)}")
        return found[0]

    def _get(self, request: Request) -> Record:
        found = {name: self._builds.get(_build_id(name)) for name in request["ids"]}
        known = [build.describe() for build in found.values() if build is not None]
        return {"builds": known, "buildsNotFound": [name for name, build in found.items() if build is None]}

    def _stop_build(self, request: Request) -> Record:
        build = self._builds.get(_build_id(request["id"]))
        if build is None:
            raise ServiceError("ResourceNotFoundException", f"Build cannot be found: {request['id']}")
        build.stop()
        build.join()
        return {"build": build.describe()}


def _build_id(name: str) -> str:
    """Identifier of a build given by identifier or ARN."""
    return name.split(":build/", 1)[-1]


def _project_of(name: str) -> str:
    return _build_id(name).partition(":")[0]


def _variables(project: Record, request: Request) -> dict[str, str]:
    """Environment variables of the build, overrides last."""
    given = (project.get("environment") or {}).get("environmentVariables") or []
    found: dict[str, str] = {}
    for item in [*given, *request.get("environmentVariablesOverride", [])]:
        if (item.get("type") or "PLAINTEXT") != "PLAINTEXT":
            raise _bad_input(
                f"The variable {item['name']} has type {item['type']}: only PLAINTEXT is emulated by the local CodeBuild."
            )
        found[item["name"]] = item["value"]
    return found


def _check(project: Record, variables: Mapping[str, str]) -> None:
    """Refuse a project whose effect is not the building and pushing of one image."""
    source = project.get("source") or {}
    if source.get("type") != "S3" or not str(source.get("location", "")).endswith(".zip"):
        given = f"{source.get('type')} {source.get('location')}"
        raise _bad_input(f"The project's source is {given}: the local CodeBuild reads a .zip in S3.")
    commands = source.get("buildspec") or ""
    if "docker build" not in commands or "docker push" not in commands:
        raise _bad_input(
            "The project's buildspec must run `docker build` and `docker push`: nothing else is emulated by the local CodeBuild."
        )
    for name in ("REPOSITORY_URI", "IMAGE_TAG"):
        if not variables.get(name):
            raise _bad_input(f"The environment variable {name} is missing: the local CodeBuild pushes $REPOSITORY_URI:$IMAGE_TAG.")
    if "/" not in variables["REPOSITORY_URI"]:
        raise _bad_input(f"REPOSITORY_URI={variables['REPOSITORY_URI']!r} must be <registry>/<repository>.")


def _manifest(config: bytes) -> str:
    """A schema-2 manifest without layers whose configuration is the environment's description."""
    digest = "sha256:" + hashlib.sha256(config).hexdigest()
    part = {"mediaType": "application/vnd.docker.container.image.v1+json", "size": len(config), "digest": digest}
    return json.dumps({"schemaVersion": 2, "mediaType": _MANIFEST, "config": part, "layers": []})
