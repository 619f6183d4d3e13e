"""Follow one execution: its states as they come and go, the tuning job's trials, the epochs of what trains now.

On a terminal the picture redraws itself; elsewhere (a log, CI) each change is one line.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

POLL_INTERVAL_S = 0.5
_EPOCH = re.compile(r"(?:^|\s)epoch=(\d+)/(\d+) (train_loss=.*)$")
_STEP = re.compile(r"progress epoch=(\d+)/(\d+) step=(\d+)/(\d+)\s*(.*)$")
_QUIET = frozenset({"Pass", "Choice", "Wait"})
"""Kinds of state that take no time worth a line of their own on a log."""


@dataclass
class Visit:
    """One state of the execution."""

    name: str
    kind: str
    started_s: float
    ended_s: float | None = None
    failed: str = ""


@dataclass
class Trial:
    """One training job: a tuning trial or the final training."""

    name: str
    status: str = "InProgress"
    hyperparameters: dict[str, str] = field(default_factory=dict)
    objective: float | None = None
    epoch: int = 0
    epochs: int = 0
    share: float = 0.0
    figures: str = ""
    read_bytes: int = 0
    said: str = ""


class Follower:
    """Reads Step Functions' history, SageMaker's trials and the jobs' logs, and shows them."""

    def __init__(self, *, states: Any, sagemaker: Any, execution_arn: str, logs: Path, console: Console) -> None:
        self._states, self._sagemaker, self._arn, self._logs, self._console = states, sagemaker, execution_arn, logs, console
        self.visits: list[Visit] = []
        self._trials: dict[str, Trial] = {}
        self._tuning_job = ""
        self._tuning_read = False
        self._seen_events = 0

    def follow(self) -> dict[str, Any]:
        """Show progress until the execution ends; returns DescribeExecution's answer."""
        if not self._console.is_terminal:
            return self._until_ended(lambda: None)
        with Live(self._draw(), console=self._console, refresh_per_second=4, transient=False) as live:
            return self._until_ended(lambda: live.update(self._draw()))

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each state that takes time, summed over its visits, in order of first visit."""
        spent: dict[str, float] = {}
        for visit in self.visits:
            if visit.kind in _QUIET and visit.kind != "Wait":
                continue
            spent[visit.name] = round(spent.get(visit.name, 0.0) + (visit.ended_s or visit.started_s) - visit.started_s, 1)
        return spent

    def _until_ended(self, redraw: Any) -> dict[str, Any]:
        while True:
            described = self._states.describe_execution(executionArn=self._arn)
            self._read_history()
            self._read_trials()
            redraw()
            if described["status"] != "RUNNING":
                return dict(described)
            time.sleep(POLL_INTERVAL_S)

    # -- Reading --

    def _read_history(self) -> None:
        events: list[dict[str, Any]] = []
        for page in self._states.get_paginator("get_execution_history").paginate(executionArn=self._arn):
            events += page["events"]
        for event in events[self._seen_events :]:
            self._read_event(event)
        self._seen_events = len(events)

    def _read_event(self, event: dict[str, Any]) -> None:
        kind, at_s = event["type"], event["timestamp"].timestamp()
        if kind.endswith("StateEntered"):
            visit = Visit(event["stateEnteredEventDetails"]["name"], kind.removesuffix("StateEntered"), at_s)
            self.visits.append(visit)
            self._say(visit, f"▸ {visit.name}")
        elif kind.endswith("StateExited") and self.visits:
            visit = next(v for v in reversed(self.visits) if v.name == event["stateExitedEventDetails"]["name"])
            visit.ended_s = at_s
            if visit.kind not in _QUIET:
                self._read_trials()  # so that what a state did is said before its end
            how = f"caught {visit.failed}" if visit.failed else "done"
            self._say(visit, f"  {visit.name} {how} in {at_s - visit.started_s:.1f} s")
        elif kind in ("TaskFailed", "TaskTimedOut") and self.visits:
            details = event.get("taskFailedEventDetails") or event.get("taskTimedOutEventDetails") or {}
            self.visits[-1].failed = str(details.get("error", kind))
        elif kind == "TaskScheduled":
            self._read_request(event["taskScheduledEventDetails"])

    def _read_request(self, details: dict[str, Any]) -> None:
        parameters = json.loads(details.get("parameters") or "{}")
        if details["resource"].startswith("createHyperParameterTuningJob"):
            self._tuning_job = parameters["HyperParameterTuningJobName"]
        elif details["resource"].startswith("createTrainingJob"):
            name = parameters["TrainingJobName"]
            self._trials[name] = Trial(name, hyperparameters=parameters["HyperParameters"])

    def _read_trials(self) -> None:
        if self._tuning_job and not self._tuning_read:
            # Asked before the trials are read, so that the last reading sees the job's end.
            self._tuning_read = any(v.name == "Tune" and v.ended_s for v in self.visits)
            self._read_tuning_job()
        for trial in self._trials.values():
            self._read_log(trial)

    def _tuning_trials(self) -> list[Trial]:
        return [t for t in self._trials.values() if t.name.startswith(self._tuning_job)]

    def _read_tuning_job(self) -> None:
        try:
            jobs = self._sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
                HyperParameterTuningJobName=self._tuning_job, MaxResults=100
            )["TrainingJobSummaries"]
        except self._sagemaker.exceptions.ClientError:
            return  # not created yet
        for job in sorted(jobs, key=lambda j: j["CreationTime"]):
            trial = self._trials.setdefault(job["TrainingJobName"], Trial(job["TrainingJobName"]))
            trial.status, trial.hyperparameters = job["TrainingJobStatus"], job["TunedHyperParameters"]
            metric = job.get("FinalHyperParameterTuningJobObjectiveMetric")
            trial.objective = metric["Value"] if metric else None
            if trial.status != "InProgress" and trial.said != trial.status:
                trial.said = trial.status
                objective = "no objective" if trial.objective is None else f"objective {trial.objective:.4f}"
                ended = ": ".join([trial.status, *([job["FailureReason"]] if "FailureReason" in job else [])])
                self._print(f"  trial {_short(trial.name)}: {_settings(trial.hyperparameters)} → {objective} ({ended})")

    def _read_log(self, trial: Trial) -> None:
        """New complete lines of the job's log. The log of a job that has not started is not there yet."""
        path = next(self._logs.glob(f"*/{trial.name}.log"), None)
        if path is None:
            return
        with path.open("rb") as log:
            log.seek(trial.read_bytes)
            data = log.read()
        complete = data[: data.rfind(b"\n") + 1]
        trial.read_bytes += len(complete)
        for line in complete.decode("utf-8", "replace").splitlines():
            self._read_line(trial, line)

    def _read_line(self, trial: Trial, line: str) -> None:
        if step := _STEP.search(line):
            trial.epoch, trial.epochs = int(step[1]), int(step[2])
            trial.share, trial.figures = (int(step[1]) - 1 + int(step[3]) / max(1, int(step[4]))) / trial.epochs, step[5]
        elif epoch := _EPOCH.search(line):
            trial.epoch, trial.epochs, trial.figures = int(epoch[1]), int(epoch[2]), epoch[3]
            trial.share = trial.epoch / trial.epochs
            self._print(f"    {_short(trial.name)} epoch {trial.epoch}/{trial.epochs} {_bar(trial.share)} {epoch[3]}")

    # -- Showing --

    def _say(self, visit: Visit, text: str) -> None:
        if visit.kind not in _QUIET:
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._console.is_terminal:
            print(text, file=sys.stdout, flush=True)

    def _draw(self) -> Group:
        return Group(self._states_table(), *([self._trials_table()] if self._tuning_trials() else []), self._bars())

    def _states_table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        now_s = time.time()
        for visit in self.visits:
            if visit.kind in _QUIET and visit.ended_s is not None:
                continue
            note = f"caught {visit.failed}" if visit.failed and visit.ended_s else visit.failed
            table.add_row(_mark(visit), visit.name, f"{(visit.ended_s or now_s) - visit.started_s:6.1f} s", note)
        return table

    def _trials_table(self) -> Table:
        table = Table("trial", "hyperparameters", "objective", "state", box=None, pad_edge=False, header_style="bold")
        for trial in self._tuning_trials():
            objective = "" if trial.objective is None else f"{trial.objective:.4f}"
            table.add_row(_short(trial.name), _settings(trial.hyperparameters), objective, trial.status)
        return table

    def _bars(self) -> Progress:
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[figures]}")
        )
        tuning = {t.name for t in self._tuning_trials()}
        for trial in self._trials.values():
            if trial.epochs and ((trial.status == "InProgress" and trial.share < 1) or trial.name not in tuning):
                name = f"{_short(trial.name)} epoch {trial.epoch}/{trial.epochs}"
                progress.add_task(name, total=100, completed=round(100 * trial.share), figures=trial.figures)
        return progress


def _mark(visit: Visit) -> Text:
    """A state that failed and went on was caught by the machine: that is its plan (no endpoint yet) or the way to CleanUp."""
    if visit.failed:
        return Text("!", "yellow") if visit.ended_s else Text("✗", "red")
    return Text("✓", "green") if visit.ended_s else Text("▸", "cyan")


def _short(name: str) -> str:
    """A trial's own part of its name: ``dogs-local-…-003-1f2e3d4c`` → ``003``; other jobs keep theirs."""
    match = re.search(r"-(\d{3})-[0-9a-f]{8}$", name)
    return match.group(1) if match else re.sub(r"-[0-9a-f]{16}$", "", name)


def _settings(hyperparameters: dict[str, str]) -> str:
    shown = {k: v for k, v in hyperparameters.items() if not k.startswith(("sagemaker_", "_"))}
    return " ".join(f"{k}={_number(v)}" for k, v in sorted(shown.items()))


def _number(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _bar(share: float, width: int = 20) -> str:
    done = round(share * width)
    return "█" * done + "░" * (width - done)
