"""Processes of local containers: started under ``guard.py``, read line by line, stopped as a container is stopped."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import boto3

    from local_cloud.service import Cloud

_GUARD = Path(__file__).with_name("guard.py")
_MOUNT = re.compile(r"(?<![\w.-])/opt/ml(?![\w.-])")
_NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "AWS_CA_BUNDLE"),
)
_LONGEST_LINE = 64 * 1024


def mounted(text: str, base: Path) -> str:
    """``text`` with the container's ``/opt/ml`` replaced by ``base``, which stands for the mount. Longer names stay as they are."""
    return _MOUNT.sub(lambda _: str(base), text)


def network_environment() -> dict[str, str]:
    """What a machine needs to reach the network: proxies and certificates. The only variables a job inherits."""
    found = {name: os.environ[name] for name in _NETWORK if name in os.environ}
    if any(name.lower().endswith("_proxy") for name in found):
        hosts = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "", "localhost", "127.0.0.1"]
        found["NO_PROXY"] = found["no_proxy"] = ",".join(host for host in hosts if host)
    return found


def aws_environment(cloud: Cloud, session: boto3.Session) -> dict[str, str]:
    """Region, endpoint and the role's temporary credentials, as AWS SDKs read them."""
    credentials: Any = session.get_credentials()
    if credentials is None:
        msg = "the cloud gave a session without credentials: Cloud.session must assume the role"
        raise RuntimeError(msg)
    frozen = credentials.get_frozen_credentials()
    found = {
        "AWS_REGION": cloud.region,
        "AWS_DEFAULT_REGION": cloud.region,
        "AWS_ENDPOINT_URL": cloud.url,
        "AWS_ACCESS_KEY_ID": frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    if frozen.token:
        found["AWS_SESSION_TOKEN"] = frozen.token
    return found


class Child:
    """One command with its descendants. ``lines`` must be read to the end, or the command blocks on a full pipe."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        self._closing = threading.Lock()

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def lines(self) -> Iterator[str]:
        """Lines of standard output and error without their ends; very long lines come in pieces."""
        if self._process.stdout is None:
            return
        with self._process.stdout as stream:
            while raw := stream.readline(_LONGEST_LINE):
                yield raw.decode("utf-8", "replace").rstrip("\r\n")

    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """SIGTERM to the command's process group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the command and all its descendants, through the lifeline."""
        with self._closing, contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def wait(self, timeout: float | None = None) -> int:
        """Exit code as a container reports it (128 + n for signal n). Raises ``subprocess.TimeoutExpired``."""
        code = self._process.wait(timeout)
        self.kill()
        return code if code >= 0 else 128 - code

    def stop(self, grace: float) -> int:
        """SIGTERM, then SIGKILL after ``grace`` seconds, as SageMaker stops a container. Returns the exit code."""
        self.terminate()
        try:
            return self.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait()
