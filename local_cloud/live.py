"""The report of a run while it goes on: ``http://localhost:<port>/report/<execution>``, made when somebody looks.

The page is what ``report.py`` makes of the run's prefix in the local S3. It runs as a child of low priority, one at a time and at
most every ``INTERVAL_S``; between times the last page is shown. When the execution has ended, the final page is made and kept.
"""

from __future__ import annotations

import html
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from local_cloud.report import MODEL_CODE, Run, command
from local_cloud.sagemaker.process import Child, aws_environment
from local_cloud.service import Cloud

INTERVAL_S = 5
LIMIT_S = 300
PREFIX = "/report/"

_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_JOBS = {
    "createProcessingJob": "ProcessingJobName",
    "createHyperParameterTuningJob": "HyperParameterTuningJobName",
    "createTrainingJob": "TrainingJobName",
}
_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'",
}

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class _Page:
    """What there is to show of one execution."""

    folder: Path
    bucket: str = ""
    html: bytes = b""
    final: bool = False
    """Made after the execution had ended: it will not change any more."""
    problem: str = ""


class LiveReports:
    """Pages on the executions that ``executions`` lists (moto's objects); nothing runs when nobody asks."""

    def __init__(self, cloud: Cloud, executions: Callable[[], Iterable[Any]]) -> None:
        self._cloud, self._executions = cloud, executions
        self._pages: dict[str, _Page] = {}
        self._child: Child | None = None
        self._started_s = float("-inf")
        self._lock = threading.Lock()

    def answer(self, path: str, host: str) -> Answer:
        """Status, headers and body of ``GET path``. ``host`` is the request's header: other names for this machine are refused,
        so that no foreign page can have the report under its own name."""
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            return _answer(403, "Not here", f"<p>Ask for http://localhost, not {html.escape(host)}.")
        name = unquote(path.removeprefix("/report").strip("/"))
        if not name:
            return self._list()
        execution = next((item for item in self._executions() if item.name == name), None)
        if execution is None:
            return _answer(
                404, "No such execution", f"<p>There is no execution {html.escape(name)}. <a href={PREFIX}>All executions</a>"
            )
        return self._show(execution)

    def stop(self) -> None:
        """End what is being made, and wait for it."""
        with self._lock:
            child = self._child
        if child is not None:
            child.kill()
            child.wait()

    def _list(self) -> Answer:
        rows = "".join(
            f"<li><a href='{PREFIX}{html.escape(item.name)}'>{html.escape(item.name)}</a> {item.exec_status.value}"
            for item in sorted(self._executions(), key=lambda item: item.start_date, reverse=True)
        )
        return _answer(200, "Executions", f"<ul>{rows}</ul>" if rows else "<p>No execution was started yet.")

    def _show(self, execution: Any) -> Answer:
        ended = execution.exec_status.value != "RUNNING"
        with self._lock:
            page = self._pages.setdefault(execution.name, _Page(self._cloud.root / "live" / execution.name))
            page.bucket = page.bucket or self._bucket(execution.name)
            if page.bucket and not page.final and self._child is None and time.monotonic() - self._started_s >= INTERVAL_S:
                self._start(execution, page, ended)
            if page.html:
                return 200, _HEADERS, page.html
        title = f"Run {execution.name}"
        if ended and not page.bucket:
            return _answer(200, title, f"<p>The execution ended before it wrote anything. {html.escape(outcome(execution))}")
        note = f"<p>The last try failed: {html.escape(page.problem)}" if page.problem else ""
        return _answer(200, title, f"<p>The report is being made; this page looks again by itself.{note}", refresh=True)

    def _bucket(self, name: str) -> str:
        """The bucket in which the run lies; empty while it has written nothing."""
        session: Any = self._cloud.admin()
        s3 = session.client("s3", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        for bucket in s3.list_buckets()["Buckets"]:
            if s3.list_objects_v2(Bucket=bucket["Name"], Prefix=f"runs/{name}/", MaxKeys=1).get("KeyCount"):
                return str(bucket["Name"])
        return ""

    def _start(self, execution: Any, page: _Page, ended: bool) -> None:
        run = Run(f"s3://{page.bucket}/runs/{execution.name}", **job_names(execution))
        page.folder.mkdir(parents=True, exist_ok=True)
        words = command(run, page.folder, page.folder / "run", live=not ended, outcome=outcome(execution))
        environment = {
            **aws_environment(self._cloud, self._cloud.admin()),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
        }
        self._started_s = time.monotonic()
        self._child = Child(["nice", "-n", "10", *words], env=environment, cwd=MODEL_CODE)
        threading.Thread(target=self._finish, args=(self._child, page, ended), name="live-report", daemon=True).start()

    def _finish(self, child: Child, page: _Page, ended: bool) -> None:
        """Wait for the page, then show it."""
        limit = threading.Timer(LIMIT_S, child.kill)
        limit.start()
        said = deque((line for line in child.lines() if line.strip()), maxlen=1)
        code = child.wait()
        limit.cancel()
        made = page.folder / "report.html"
        with self._lock:
            self._child = None
            if code == 0 and made.is_file():
                page.html, page.final, page.problem = made.read_bytes(), ended, ""
            else:
                page.problem = said[0] if said else f"exit code {code}"


def job_names(execution: Any) -> dict[str, Any]:
    """The names of the jobs that an execution has asked for so far, as fields of ``Run``."""
    found: dict[str, list[str]] = {call: [] for call in _JOBS}
    for event in list(execution.to_history_output()["events"]):
        details = event.get("taskScheduledEventDetails") or {}
        call = str(details.get("resource", "")).partition(".")[0]
        if call in _JOBS:
            found[call].append(str(json.loads(details.get("parameters") or "{}").get(_JOBS[call], "")))
    return {
        "processing_jobs": tuple(found["createProcessingJob"]),
        "tuning_job": (found["createHyperParameterTuningJob"] or ["none"])[-1],
        "training_job": (found["createTrainingJob"] or ["none"])[-1],
    }


def outcome(execution: Any) -> str:
    """Why an execution that has ended failed or was stopped; empty for one that goes on or went well."""
    status, said = execution.exec_status.value, str(execution.cause or execution.error or "")
    if status in ("RUNNING", "SUCCEEDED"):
        return ""
    if status == "FAILED":
        return said or "The execution failed without a cause."
    return f"The execution was {status.lower().replace('_', ' ')}{': ' if said else '.'}{said}"


def _answer(status: int, title: str, body: str, *, refresh: bool = False) -> Answer:
    """A small page of our own; with ``refresh`` it looks again by itself."""
    again = "<meta http-equiv=refresh content=3>" if refresh else ""
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"{again}<link rel=icon href=data:,>"
        f"<title>{html.escape(title)}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60ch;margin:2em auto;"
        f"padding:0 1em}}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )
    return status, _HEADERS, page.encode()
