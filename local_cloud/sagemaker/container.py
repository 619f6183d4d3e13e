"""One run of a job's container: its private ``/opt/ml``, role, log, process, deadline and stop.

Training and processing build on it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from local_cloud.images import Image, Images
from local_cloud.sagemaker.common import Record, invalid, now
from local_cloud.sagemaker.logs import JobLog
from local_cloud.sagemaker.process import Child, aws_environment, mounted, network_environment
from local_cloud.sagemaker.s3_transfer import FolderSync, TransferError
from local_cloud.service import Cloud, ServiceError

_POLL = 0.05
_MESSAGE_LIMIT = 1024


@dataclass(frozen=True)
class Settings:
    """Times of the local cloud, in seconds, and whether finished jobs keep their folders."""

    grace: float = 120.0
    """Between SIGTERM and SIGKILL when a job is stopped (SageMaker: 120)."""
    sync_interval: float = 3.0
    """Between two uploads of checkpoints and continuous outputs."""
    health_deadline: float = 180.0
    """For a server to answer /ping with 200 (SageMaker serverless: 180)."""
    ping_interval: float = 0.1
    invocation_timeout: float = 60.0
    """For a server to answer one invocation (SageMaker: 60)."""
    deployment_speed: float = 60.0
    """How many seconds of an update's waits pass in one: what takes five minutes on AWS takes five seconds."""
    alarm_interval: float = 0.5
    """Between two looks at the alarms of an update."""
    keep_folders: bool = False
    """Keep the folders of finished jobs, to look into them."""
    interrupt_after: float | None = None
    """Take the machine away from every managed spot job with checkpoints, once, when it has run so long."""


class JobFailureError(Exception):
    """The job failed; the message is its FailureReason."""


class _InterruptedError(Exception):
    """The spot machine was taken away: the container has been stopped and must start again on a new one."""


class ContainerJob(ABC):
    """A job under way. ``record`` is what Describe answers; every change happens under ``lock``."""

    kind: str
    """``training`` or ``processing``: folder of its files and logs."""
    log_group: str

    def __init__(
        self, cloud: Cloud, images: Images, settings: Settings, *, name: str, request: Record, changed: threading.Condition
    ) -> None:
        self.cloud, self.images, self.settings = cloud, images, settings
        self.name, self.request, self.changed = name, request, changed
        self.record: Record = {}
        self.folder = cloud.root / "jobs" / self.kind / name
        self.base = self.folder / "opt" / "ml"
        self.ended = threading.Event()
        self._stop = threading.Event()
        self._shutdown = False
        self._timed_out = False
        self._interrupted = False
        self._ran = 0.0
        self._log: JobLog | None = None
        self._thread = threading.Thread(target=self._run, name=f"{self.kind}-{name}", daemon=True)

    # -- what a kind of job adds ---------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self) -> None:
        """Write configuration files and download inputs."""

    @abstractmethod
    def command(self, image: Image) -> Sequence[str]:
        """The container's command line."""

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """The kind's own variables."""

    @abstractmethod
    def syncs(self) -> Sequence[FolderSync]:
        """Folders copied to S3 while the job runs."""

    @abstractmethod
    def collect(self, code: int | None) -> None:
        """Upload what the container left, and set the final status. ``code`` is None when the container was stopped."""

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Set the status Failed with this reason."""

    @abstractmethod
    def stopped(self) -> None:
        """Set the status Stopped: stopped before the container ran."""

    @abstractmethod
    def on_line(self, line: str) -> None:
        """Called with each line of the log."""

    @abstractmethod
    def on_started(self) -> None:
        """Called when the container has started."""

    @abstractmethod
    def on_interrupted(self) -> None:
        """Called when the machine was taken away; the checkpoints are in S3."""

    @property
    @abstractmethod
    def spot(self) -> bool:
        """Whether the job runs on spare capacity, which may be taken away, and can go on where it was."""

    # -- from outside --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run in the background."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the container to end: SIGTERM, then SIGKILL after the grace period."""
        self._stop.set()

    def shut_down(self) -> None:
        """Kill the container at once and upload nothing: the cloud ends."""
        self._shutdown = True
        self._stop.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    @property
    def timed_out(self) -> bool:
        """Whether MaxRuntimeInSeconds ended it."""
        return self._timed_out

    @property
    def max_runtime(self) -> float:
        """Seconds the container may run."""
        return float(self.record["StoppingCondition"]["MaxRuntimeInSeconds"])

    # -- for the kinds -------------------------------------------------------------------------------------------------

    def session(self) -> boto3.Session:
        """Fresh credentials of the job's role."""
        return self.cloud.session(self.request["RoleArn"], "sagemaker.amazonaws.com", self.name)

    def update(self, **changes: Any) -> None:
        """Change the record and tell those who wait."""
        with self.changed:
            self.record.update(changes, LastModifiedTime=now())
            self.changed.notify_all()

    def write_config(self, name: str, content: Any) -> None:
        """Write ``content`` as JSON where containers read it: ``/opt/ml/input/config`` or ``/opt/ml/config``."""
        file = self.base / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2, default=str))

    def message(self, name: str) -> str:
        """A short file the container left, such as ``output/failure``: at most 1024 characters, empty when there is none."""
        file = self.base / name
        if not file.is_file():
            return ""
        with file.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(_MESSAGE_LIMIT)

    def mount(self, text: str) -> str:
        """``text`` with ``/opt/ml`` replaced by this job's folder."""
        return mounted(text, self.base)

    def say(self, line: str) -> None:
        """A line of our own in the log."""
        if self._log is not None:
            self._log.write(f"[local cloud] {line}")

    # -- the run -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._steps()
        except (TransferError, JobFailureError) as error:
            self._end_early(str(error))
        except ServiceError as error:
            self._end_early(f"ClientError: {error.message}")
        except Exception as error:  # a job must always end in a status
            self._end_early(f"InternalServerError: {type(error).__name__}: {error}")
        finally:
            if self._log is not None:
                self._log.close()
            if not self.settings.keep_folders:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.ended.set()
            with self.changed:
                self.changed.notify_all()

    def _end_early(self, reason: str) -> None:
        self.say(reason)
        self.fail(reason[:_MESSAGE_LIMIT])

    def _steps(self) -> None:
        session = self.session()
        stream = f"{self.name}/algo-1-{int(time.time())}"
        path = self.cloud.root / "logs" / self.kind / f"{self.name}.log"
        self._log = JobLog(self.cloud, session, path=path, group=self.log_group, stream=stream)
        self._make_folders()
        image = self.images.resolve(self._image_uri(), session)
        self.prepare()
        if self._stop.is_set():
            self.stopped()
            return
        code = self._run_container(image, session)
        if not self._shutdown:
            self._sync(final=True)
            self.collect(code)
        else:
            self.stopped()

    def _make_folders(self) -> None:
        for folder in ("work", "home", "tmp"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)

    def _run_container(self, image: Image, session: boto3.Session) -> int | None:
        """Run the container to its end, on a second machine when the first was taken away."""
        try:
            return self._execute(image, session)
        except _InterruptedError:
            if self._shutdown:
                return None
            self._sync(final=True)
        self.say("the spot machine was taken away; starting again with the checkpoints")
        self.on_interrupted()
        shutil.rmtree(self.folder)  # a new machine has nothing but what S3 gives it
        self._make_folders()
        self.prepare()
        return None if self._stop.is_set() else self._execute(image, session)

    @abstractmethod
    def _image_uri(self) -> str: ...

    def _execute(self, image: Image, session: boto3.Session) -> int | None:
        """Run the container to its end; the exit code, or None when it was stopped."""
        env = {
            **network_environment(),
            **image.environment(),
            **aws_environment(self.cloud, session),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "SAGEMAKER_BASE_DIR": str(self.base),
            **self.environment(),
            **{name: self.mount(value) for name, value in self.request.get("Environment", {}).items()},
        }
        command = [image.translate(self.mount(word)) for word in self.command(image)]
        child = Child(command, env=env, cwd=image.folder() or self.folder / "work")
        reader = threading.Thread(target=self._read, args=(child,), name=f"read-{self.name}", daemon=True)
        reader.start()
        self.on_started()
        try:
            return self._watch(child)
        finally:
            child.kill()
            reader.join()

    def _read(self, child: Child) -> None:
        for line in child.lines():
            if self._log is not None:
                self._log.write(line)
            self.on_line(line)

    def _watch(self, child: Child) -> int | None:
        started = time.monotonic()
        deadline = started + self.max_runtime - self._ran
        interruption = started + self._interruption()
        next_sync = started + self.settings.sync_interval
        while child.running():
            if self._stop.wait(_POLL):
                return self._halt(child)
            if time.monotonic() > deadline:
                self._timed_out = True
                return self._halt(child)
            if time.monotonic() > interruption:
                self._interrupted, self._ran = True, time.monotonic() - started
                self._halt(child)
                raise _InterruptedError
            if time.monotonic() > next_sync:
                self._sync()
                next_sync = time.monotonic() + self.settings.sync_interval
        code = child.wait()
        return None if self._stop.is_set() else code

    def _interruption(self) -> float:
        """Seconds until the machine is taken away: once in a job's life, and only on demand."""
        after = self.settings.interrupt_after
        return math.inf if after is None or self._interrupted or not self.spot else after

    def _halt(self, child: Child) -> int | None:
        if self._shutdown:
            child.kill()
            child.wait()
            return None
        child.terminate()
        until = time.monotonic() + self.settings.grace
        while child.running() and time.monotonic() < until and not self._shutdown:
            time.sleep(_POLL)
        child.kill()
        child.wait()
        return None

    def _sync(self, *, final: bool = False) -> None:
        """Copy what changed; while the job runs a file may vanish between listing and reading, at its end not."""
        with contextlib.nullcontext() if final else contextlib.suppress(FileNotFoundError):
            for folder in self.syncs():
                folder.sync(self.session())


def assume(cloud: Cloud, role: str, name: str) -> None:
    """Check at creation that SageMaker may assume ``role``, with AWS's message."""
    try:
        cloud.session(role, "sagemaker.amazonaws.com", name)
    except ServiceError as error:
        message = (
            f"Could not assume role {role}. Please ensure that the role exists and allows principal 'sagemaker.amazonaws.com' to "
            f"assume the role. ({error.message})"
        )
        raise invalid(message) from error


def require_mounted(field: str, path: str) -> None:
    """Refuse a container path that is not below /opt/ml: only that folder is private to a local job."""
    if not path.startswith("/opt/ml/") or ".." in Path(path).parts:
        message = f"{field}={path!r} must be a folder below /opt/ml/: choose one there."
        raise invalid(message)
