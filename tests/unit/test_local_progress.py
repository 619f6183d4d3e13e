"""What the launcher shows of an execution: states from its history, trials from SageMaker, epochs from the jobs' logs."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from rich.console import Console

from local_cloud import progress
from local_cloud.progress import Follower, Trial, Visit

TUNING = "dogs-local-0123456789abcdef"
EPOCH = (
    "epoch=3/10 train_loss=0.1234 train_top1=0.9100 valid_loss=0.2000 valid_top1=0.9300 best_valid_top1=0.9300 "
    "learning_rate=0.0123 seconds=3.1"
)


class States:
    """Step Functions: one answer of the history and of the status for each time it is asked."""

    def __init__(self, histories: list[list[dict[str, Any]]]) -> None:
        self._histories, self._asked = histories, 0

    def describe_execution(self, executionArn: str) -> dict[str, Any]:  # noqa: N803 - AWS's name
        self._asked += 1
        status = "RUNNING" if self._asked < len(self._histories) else "SUCCEEDED"
        return {"executionArn": executionArn, "status": status}

    def get_paginator(self, name: str) -> States:
        assert name == "get_execution_history"
        return self

    def paginate(self, executionArn: str) -> list[dict[str, Any]]:  # noqa: N803
        events = self._histories[self._asked - 1]
        return [{"events": events[:2]}, {"events": events[2:]}]


class SageMaker:
    """The tuning job's trials; the job does not exist when there are none."""

    class exceptions:  # noqa: N801 - boto3's name
        ClientError = ClientError

    def __init__(self, trials: list[dict[str, Any]] | None = None) -> None:
        self.trials = trials

    def list_training_jobs_for_hyper_parameter_tuning_job(self, **request: Any) -> dict[str, Any]:
        assert request["HyperParameterTuningJobName"] == TUNING
        if self.trials is None:
            raise ClientError({"Error": {"Code": "ResourceNotFound", "Message": "none"}}, "List")
        return {"TrainingJobSummaries": self.trials}


def event(kind: str, at_s: float, **details: Any) -> dict[str, Any]:
    return {"type": kind, "timestamp": datetime.fromtimestamp(at_s, UTC), **details}


def entered(name: str, at_s: float, kind: str = "Task") -> dict[str, Any]:
    return event(f"{kind}StateEntered", at_s, stateEnteredEventDetails={"name": name})


def exited(name: str, at_s: float, kind: str = "Task") -> dict[str, Any]:
    return event(f"{kind}StateExited", at_s, stateExitedEventDetails={"name": name})


def scheduled(at_s: float, resource: str, **parameters: Any) -> dict[str, Any]:
    return event("TaskScheduled", at_s, taskScheduledEventDetails={"resource": resource, "parameters": json.dumps(parameters)})


def trial(number: int, status: str, objective: float | None = None, **tuned: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "TrainingJobName": f"{TUNING}-{number:03d}-1f2e3d4c",
        "TrainingJobStatus": status,
        "CreationTime": datetime.fromtimestamp(number, UTC),
        "TunedHyperParameters": tuned,
    }
    if objective is not None:
        found["FinalHyperParameterTuningJobObjectiveMetric"] = {"MetricName": "valid:best_top1", "Value": objective}
    return found


def follower(logs: Path, histories: Any = ((),), sagemaker: SageMaker | None = None, console: Console | None = None) -> Follower:
    return Follower(
        states=States([list(events) for events in histories]),
        sagemaker=sagemaker or SageMaker(),
        execution_arn="arn:aws:states:us-east-1:000000000000:execution:dogs-local:run-1",
        logs=logs,
        console=console or Console(file=io.StringIO(), force_terminal=False),
    )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0)


# ---- Lines of a job's log -------------------------------------------------------------------------------------------


def test_an_epoch_line_moves_the_bar_and_keeps_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = Trial(f"{TUNING}-002-1f2e3d4c")
    follower(tmp_path)._read_line(read, EPOCH)
    assert (read.epoch, read.epochs, read.share) == (3, 10, 0.3)
    assert read.figures == EPOCH.partition(" ")[2]
    assert capsys.readouterr().out == f"    002 epoch 3/10 {'█' * 6}{'░' * 14} {read.figures}\n"


def test_a_step_line_moves_the_bar_between_epochs_and_is_no_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Trial("dogs-local-train-0123456789abcdef")
    follower(tmp_path)._read_line(read, "progress epoch=3/10 step=12/48 loss=0.52 pictures_per_s=310")
    assert (read.epoch, read.epochs, read.share) == (3, 10, pytest.approx(0.225))
    assert read.figures == "loss=0.52 pictures_per_s=310"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", ["", "epoch=3", "the epoch=3/10 is near", "epoch=3/10 loss=1", "Traceback (most recent call):"])
def test_other_lines_change_nothing(tmp_path: Path, line: str) -> None:
    read = Trial("a-trial")
    follower(tmp_path)._read_line(read, line)
    assert read == Trial("a-trial")


def test_a_log_is_read_on_from_where_it_was_left_and_only_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read, shown = Trial("job"), follower(tmp_path)
    shown._read_log(read)  # the job has not started: no log yet
    log = tmp_path / "training" / "job.log"
    log.parent.mkdir()
    log.write_text(f"starting\n{EPOCH}\n{EPOCH[:20]}")
    shown._read_log(read)
    shown._read_log(read)
    assert capsys.readouterr().out.count("epoch 3/10") == 1
    log.write_text(f"starting\n{EPOCH}\n{EPOCH.replace('3/10', '4/10')}\n")
    shown._read_log(read)
    assert (read.epoch, read.share) == (4, 0.4)
    assert read.read_bytes == log.stat().st_size


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path: Path) -> None:
    log = tmp_path / "training" / "job.log"
    log.parent.mkdir()
    log.write_bytes(b"\xff\xfe\n" + EPOCH.encode() + b"\n")
    read = Trial("job")
    follower(tmp_path)._read_log(read)
    assert read.epoch == 3


# ---- Seconds by state -----------------------------------------------------------------------------------------------


def test_seconds_are_summed_over_visits_in_order_of_the_first(tmp_path: Path) -> None:
    shown = follower(tmp_path)
    shown.visits = [
        Visit("ReadInput", "Pass", 0.0, 0.5),
        Visit("Tune", "Task", 1.0, 11.04),
        Visit("DeployWait", "Wait", 12.0, 17.0),
        Visit("IsReady", "Choice", 17.0, 17.1),
        Visit("Tune", "Task", 20.0, 22.5),
        Visit("Train", "Task", 30.0),
    ]
    assert shown.seconds() == {"Tune": 12.5, "DeployWait": 5.0, "Train": 0.0}
    assert list(shown.seconds()) == ["Tune", "DeployWait", "Train"]


# ---- A whole execution ----------------------------------------------------------------------------------------------

HISTORY = [
    event("ExecutionStarted", 0.0),
    entered("ReadInput", 0.0, "Pass"),
    exited("ReadInput", 0.1, "Pass"),
    entered("Tune", 1.0),
    scheduled(1.0, "createHyperParameterTuningJob.sync", HyperParameterTuningJobName=TUNING),
    exited("Tune", 9.0),
    entered("Train", 9.0),
    scheduled(9.0, "createTrainingJob.sync", TrainingJobName="dogs-local-train-0123456789abcdef", HyperParameters={"epochs": "10"}),
    exited("Train", 14.5),
    event("ExecutionSucceeded", 14.5),
]


@pytest.mark.parametrize("histories", [(HISTORY[:5], HISTORY[:7], HISTORY), (HISTORY,)], ids=["as it goes", "seen late"])
def test_an_execution_is_followed_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], histories: Any) -> None:
    log = tmp_path / "training" / "dogs-local-train-0123456789abcdef.log"
    log.parent.mkdir()
    log.write_text(f"{EPOCH}\n")
    trials = [
        trial(2, "Failed", batch_size="128", learning_rate="0.05") | {"FailureReason": "AlgorithmError: too large, exit code: 1"},
        trial(1, "Completed", 0.9312, batch_size="64", learning_rate="0.0123456", sagemaker_program="hpo.py"),
    ]
    shown = follower(tmp_path, histories, SageMaker(trials))
    ended = shown.follow()
    assert ended["status"] == "SUCCEEDED"
    assert capsys.readouterr().out.splitlines() == [
        "▸ Tune",
        "  trial 001: batch_size=64 learning_rate=0.01235 → objective 0.9312 (Completed)",
        "  trial 002: batch_size=128 learning_rate=0.05 → no objective (Failed: AlgorithmError: too large, exit code: 1)",
        "  Tune done in 8.0 s",
        "▸ Train",
        f"    dogs-local-train epoch 3/10 {'█' * 6}{'░' * 14} {EPOCH.partition(' ')[2]}",
        "  Train done in 5.5 s",
    ]
    assert shown.seconds() == {"Tune": 8.0, "Train": 5.5}


def test_a_tuning_job_that_does_not_exist_yet_is_no_error(tmp_path: Path) -> None:
    assert follower(tmp_path, (HISTORY[:5], HISTORY)).follow()["status"] == "SUCCEEDED"


def test_a_caught_failure_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = event("TaskFailed", 4.0, taskFailedEventDetails={"error": "States.TaskFailed", "cause": "{}"})
    shown = follower(tmp_path, ([entered("Train", 1.0), failure, exited("Train", 4.0)],))
    shown.follow()
    assert capsys.readouterr().out.splitlines() == ["▸ Train", "  Train caught States.TaskFailed in 3.0 s"]
    assert shown.visits[0].failed == "States.TaskFailed"


def test_a_terminal_shows_states_trials_and_bars(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "dogs-local-train-0123456789abcdef.log").write_text(f"{EPOCH}\n")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, color_system=None)
    shown = follower(tmp_path, (HISTORY,), SageMaker([trial(1, "Completed", 0.9312, batch_size="64")]), console)
    shown.follow()
    text = " ".join(screen.getvalue().split())
    for part in ("✓ Tune 8.0 s", "✓ Train 5.5 s", "001 batch_size=64 0.9312 Completed", "dogs-local-train epoch 3/10", "30%"):
        assert part in text
