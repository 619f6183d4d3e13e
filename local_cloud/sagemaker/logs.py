"""A job's log: every line to a file at once (the launcher follows it), and to CloudWatch Logs in batches with the job's role."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from local_cloud.sagemaker.s3_transfer import client
from local_cloud.service import Cloud

_INTERVAL = 1.0
_BATCH = 1000
_BATCH_BYTES = 900_000
_EVENT_BYTES = 250_000


class JobLog:
    """``<root>/logs/<kind>/<name>.log`` and the log stream ``stream`` in ``group``.

    As on AWS, a role without permission on the logs loses them in CloudWatch and nothing else: the file says so once.
    """

    def __init__(self, cloud: Cloud, session: boto3.Session, *, path: Path, group: str, stream: str) -> None:
        self._cloud, self._session, self._group, self._stream = cloud, session, group, stream
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._waiting: list[dict[str, Any]] = []
        self._closing = threading.Event()
        self._refused = False
        self._logs: Any = None
        self._thread = threading.Thread(target=self._ship, name=f"logs-{stream}", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Add one line. Safe from several threads."""
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            if line and not self._refused:  # CloudWatch refuses empty messages
                self._waiting.append({"timestamp": int(time.time() * 1000), "message": line[:_EVENT_BYTES]})

    def close(self) -> None:
        """Send what is left and close the file."""
        self._closing.set()
        self._thread.join()
        with self._lock:
            self._file.close()

    def _ship(self) -> None:
        while not self._closing.wait(_INTERVAL):
            self._send()
        self._send()
        if self._logs is not None:
            self._logs.close()

    def _send(self) -> None:
        while not self._refused:
            with self._lock:
                batch = self._take()
            if not batch:
                return
            try:
                self._connect().put_log_events(logGroupName=self._group, logStreamName=self._stream, logEvents=batch)
            except (ClientError, BotoCoreError) as error:
                self._refused = True
                self.write(f"[local cloud] CloudWatch Logs refused this job's log ({error}); it goes on in this file only.")

    def _take(self) -> list[dict[str, Any]]:
        size = count = 0
        for event in self._waiting[:_BATCH]:
            size += len(event["message"].encode()) + 26
            if count and size > _BATCH_BYTES:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _connect(self) -> Any:
        if self._logs is None:
            logs = self._logs = client(self._cloud, self._session, "logs")
            try:
                self._create_stream()
            except logs.exceptions.ResourceNotFoundException:
                with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException):
                    logs.create_log_group(logGroupName=self._group)
                self._create_stream()
        return self._logs

    def _create_stream(self) -> None:
        with contextlib.suppress(self._logs.exceptions.ResourceAlreadyExistsException):
            self._logs.create_log_stream(logGroupName=self._group, logStreamName=self._stream)
