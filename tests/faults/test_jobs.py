"""Row 12: capacity, spot, limits, and people who stop things. What is stopped is stopped, and the state says what happened."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from deployment import STOPPED
from fault_table import Landed

from infra.pipeline import CAPACITY_PAUSE_S, JOB_STATES, MAX_CAPACITY_RETRIES, definition
from infra.verify import walk
from infra.verify.configurations import config_of
from infra.verify.walk import TaskError

pytestmark = pytest.mark.fault(12)

GIVEN: dict[str, Any] = {"ClassifyBatch": {"action": "batch", "input": "incoming/new/"},
                         "CacheFeatures": {"recipe": "head", "pretrained": "pretrained/w.pth"}}  # fmt: skip
KINDS = {"Tune": "HyperParameterTuningJob", "Train": "TrainingJob"}


def described(state: str, status: str, reason: str) -> TaskError:
    """How ``.sync`` tells of a job that did not complete."""
    kind = KINDS.get(state, "ProcessingJob")
    facts = {f"{kind}Name": "dogs-dev-0", f"{kind}Status": status, "FailureReason": reason}
    return TaskError("States.TaskFailed", json.dumps(facts))


def run(state: str, *faults: Any) -> tuple[walk.Walk, str, Any]:
    account = walk.Account(**{state: list(faults)})
    if state == "Tune":
        account.faults["ReadTrialFailure"] = [{"TrainingJobSummaries": []}] * 9
    machine = walk.Walk(definition(config_of({"stage": "dev"})), account)
    last, output = machine.run(GIVEN.get(state, {}))
    return machine, last, output


@pytest.mark.parametrize("state", JOB_STATES)
@pytest.mark.parametrize("times", [1, MAX_CAPACITY_RETRIES])
def test_a_lack_of_capacity_is_waited_out_under_fresh_names(landed: Landed, state: str, times: int):
    scarce = described(state, "Failed", "CapacityError: Unable to provision requested ML compute capacity")
    machine, last, _ = run(state, *[scarce] * times)
    assert machine.machine["States"][last]["Type"] == "Succeed"
    assert machine.visited.count("WaitForCapacity") == times
    assert machine.machine["States"]["WaitForCapacity"]["Seconds"] == CAPACITY_PAUSE_S
    names = [json.dumps(request) for name, request in machine.asked if name == state]
    assert len(set(names)) == times + 1
    landed(times)


@pytest.mark.parametrize("state", JOB_STATES)
def test_a_lack_of_capacity_that_stays_is_named(landed: Landed, state: str):
    scarce = described(state, "Failed", "CapacityError: Unable to provision requested ML compute capacity")
    machine, last, output = run(state, *[scarce] * 9)
    assert last == "Failed"
    assert "Unable to provision" in output["Cause"]
    assert output["Error"] == f"{state}Failed"
    assert "CleanUp" in machine.visited
    landed()


REASONS = {
    "stopped by hand": ("Stopped", "The job was stopped by a user"),
    "the job's own time limit": ("Stopped", "MaxRuntimeExceeded: the job ran longer than 3600 s"),
    "out of memory": ("Failed", "AlgorithmError: Please use an instance type with more memory, exit code: 137"),
    "spot waited too long": ("Stopped", "MaxWaitTimeExceeded"),
}


@pytest.mark.parametrize("state", JOB_STATES)
@pytest.mark.parametrize("kind", REASONS)
def test_a_job_that_is_ended_from_outside_ends_the_run_with_its_reason(landed: Landed, state: str, kind: str):
    status, reason = REASONS[kind]
    machine, last, output = run(state, described(state, status, reason))
    assert last == "Failed"
    assert reason in output["Cause"]
    assert f"failed in {state} " in output["Cause"]
    assert machine.visited.count(state) == 1
    assert not {"CreateModel", "UpdateEndpoint", "CreateEndpoint"} & set(machine.visited)
    landed()


@pytest.mark.parametrize("state", JOB_STATES)
def test_a_states_time_limit_is_named(landed: Landed, state: str):
    """Step Functions stops the job of a ``.sync`` state that times out."""
    machine, last, output = run(state, TaskError("States.Timeout", ""))
    assert last == "Failed"
    assert "States.Timeout" in output["Cause"]
    assert state in output["Cause"]
    assert machine.machine["States"][state]["TimeoutSeconds"] > 0
    landed()


# --- real jobs -----------------------------------------------------------------------------------------------------------------


def running(cloud: Any) -> list[str]:
    """Names of all jobs that run."""
    sagemaker = cloud.client("sagemaker")
    lists = (
        sagemaker.list_training_jobs()["TrainingJobSummaries"],
        sagemaker.list_processing_jobs()["ProcessingJobSummaries"],
        sagemaker.list_hyper_parameter_tuning_jobs()["HyperParameterTuningJobSummaries"],
    )
    fields = (("TrainingJobName", "TrainingJobStatus"), ("ProcessingJobName", "ProcessingJobStatus"),
              ("HyperParameterTuningJobName", "HyperParameterTuningJobStatus"))  # fmt: skip
    return [
        one[name] for rows, (name, status) in zip(lists, fields, strict=True) for one in rows
        if one[status] in ("InProgress", "Stopping")
    ]  # fmt: skip


def until(states: Any, arn: str, wanted: str) -> None:
    """Wait until the execution's job in a state has been submitted."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        events = states.get_execution_history(executionArn=arn, maxResults=1000)["events"]
        entered = [e["stateEnteredEventDetails"]["name"] for e in events if "stateEnteredEventDetails" in e]
        if entered and entered[-1] == wanted and events[-1]["type"] == "TaskSubmitted":
            return
        assert states.describe_execution(executionArn=arn)["status"] == "RUNNING", entered
        time.sleep(0.1)
    raise AssertionError(f"{wanted} was not reached")


@pytest.mark.pipeline
@pytest.mark.slow
@pytest.mark.parametrize("state", ["PrepareData", "Tune", "Train", "Evaluate", "Report"])
def test_an_aborted_execution_stops_its_job(finished, deployed, landed: Landed, state: str):
    states = deployed.cloud.client("stepfunctions")
    started = states.start_execution(
        stateMachineArn=deployed.outputs["StateMachineArn"], name=f"abort-{state}-{time.time_ns()}", input=json.dumps(STOPPED)
    )
    arn = started["executionArn"]
    until(states, arn, state)
    assert running(deployed.cloud)
    states.stop_execution(executionArn=arn, cause="a test")
    landed()
    deadline = time.monotonic() + 60
    while running(deployed.cloud) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(deployed.cloud) == []
    assert states.describe_execution(executionArn=arn)["status"] == "ABORTED"
    assert deployed.cloud.client("sagemaker").describe_endpoint(EndpointName="dogs-local")["EndpointStatus"] == "InService"


@pytest.mark.pipeline
@pytest.mark.slow
def test_a_training_that_is_stopped_by_hand_ends_the_run_with_its_name(finished, deployed, landed: Landed):
    states, sagemaker = deployed.cloud.client("stepfunctions"), deployed.cloud.client("sagemaker")
    started = states.start_execution(
        stateMachineArn=deployed.outputs["StateMachineArn"], name=f"by-hand-{time.time_ns()}", input=json.dumps(STOPPED)
    )
    arn = started["executionArn"]
    until(states, arn, "Train")
    (job,) = [one["TrainingJobName"] for one in sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]]
    sagemaker.stop_training_job(TrainingJobName=job)
    landed()
    deadline = time.monotonic() + 240
    while (ended := states.describe_execution(executionArn=arn))["status"] == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.3)
    assert ended["status"] == "FAILED"
    assert "failed in Train " in ended["cause"]
    assert running(deployed.cloud) == []
    assert sagemaker.describe_endpoint(EndpointName="dogs-local")["EndpointStatus"] == "InService"
