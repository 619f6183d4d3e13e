"""The States Language interpreter: its private names in moto, JSONata, and tasks that call AWS."""

from __future__ import annotations

import inspect
import io
import json
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.response import StreamingBody
from moto.stepfunctions.parser.asl.component.common.string.string_expression import StringJSONata
from moto.stepfunctions.parser.asl.component.state.exec.state_task import state_task_factory
from moto.stepfunctions.parser.asl.component.state.wait.wait_function.seconds import Seconds
from moto.stepfunctions.parser.asl.component.state.wait.wait_function.wait_function import WaitFunction
from moto.stepfunctions.parser.asl.eval.environment import Environment
from moto.stepfunctions.parser.backend.execution import Execution
from moto.stepfunctions.parser.backend.execution_worker import ExecutionWorker
from moto.stepfunctions.parser.backend.state_machine import StateMachineInstance

from infra.config import load
from infra.pipeline import definition
from local_cloud import interpreter
from local_cloud.validation import service_model


def test_the_private_names_of_moto_are_where_we_rebind_them():
    assert list(inspect.signature(StringJSONata._eval_body).parameters) == ["self", "env"]
    assert "state_task_service_for(" in inspect.getsource(state_task_factory.state_task_for)
    assert list(inspect.signature(interpreter.StateTaskService._eval_service_task).parameters) == list(
        inspect.signature(interpreter.AwsTask._eval_service_task).parameters
    )
    assert list(inspect.signature(WaitFunction._wait_interval).parameters) == ["self", "env", "wait_seconds"]
    assert "self._wait_interval(" in inspect.getsource(WaitFunction._eval_body)
    assert list(inspect.signature(Environment.set_error).parameters) == ["self", "error"]
    assert "self._get_start_execution_worker_comm()" in inspect.getsource(Execution._get_start_execution_worker)
    assert "self._execution_communication.terminated()" in inspect.getsource(ExecutionWorker._execution_logic)


def test_an_expression_knows_nothing_of_its_earlier_evaluation_nor_of_another_thread():
    expression = "$exists($b) ? $b : $join($map($a, function($x) { $string($x) & $c }))"
    assert interpreter.evaluate_jsonata(expression, {"a": [1, 2], "b": "old", "c": "x"}) == "old"
    assert interpreter.evaluate_jsonata(expression, {"a": [1, 2], "c": "-"}) == "1-2-"
    with pytest.raises(interpreter.QueryError):
        interpreter.evaluate_jsonata("$b", {"a": 1})
    numbers = range(200)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: interpreter.evaluate_jsonata(expression, {"a": [n, n], "c": "."}), numbers)
    assert list(found) == [f"{n}.{n}." for n in numbers]
    first = interpreter.evaluate_jsonata("$millis()", {})
    time.sleep(0.01)
    assert interpreter.evaluate_jsonata("$millis()", {}) > first, "the time is that of the evaluation"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("$states.input.text & '!'", 'say "hi"\n!'),
        ("$states.input.nothing", None),
        ("$states.input.one", ["x"]),
        ("$append([{'a': 1}], $states.input.flag ? [{'b': 2}] : [])", [{"a": 1}]),
        ("$parse('{\"a\": [1, 2]}').a[1]", 2),
        ("10 / 4", 2.5),
        ("$substring($hash('a', 'SHA-256'), 0, 8)", "ca978112"),
        ("$partition([1, 2, 3], 2)", [[1, 2], [3]]),
        ("$range(1, 5, 2)", [1, 3, 5]),
    ],
)
def test_jsonata_gives_json(expression: str, expected: Any):
    variables = {"states": {"input": {"text": 'say "hi"\n', "nothing": None, "one": ["x"], "flag": False}}}
    value = interpreter.evaluate_jsonata(expression, variables)
    assert value == expected


@pytest.mark.parametrize("expression", ["$states.input.missing", "$eval('1')", "1 +", "function($x){$x}", "$hash('a', 'CRC')"])
def test_jsonata_that_gives_no_json_is_an_error(expression: str):
    with pytest.raises(interpreter.QueryError):
        interpreter.evaluate_jsonata(expression, {"states": {"input": {}}})


class Context(dict[str, Any]):
    """A stand-in for a construct node with cdk.json's context."""

    try_get_context = dict.get


class FakeClient:
    """A boto3 client without a network: answers from a table of (operation → answer, exception or function)."""

    def __init__(self, service: str, answers: dict[str, Any], calls: list[tuple[str, dict[str, Any]]]) -> None:
        self.meta = type("Meta", (), {"service_model": service_model(service)})
        self._answers, self._calls = answers, calls

    def __getattr__(self, name: str) -> Any:
        def call(**request: Any) -> Any:
            self._calls.append((name, request))
            answer = self._answers[name]
            answer = answer.pop(0) if isinstance(answer, list) and len(answer) > 1 else answer
            answer = answer[0] if isinstance(answer, list) else answer
            answer = answer() if callable(answer) else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def begin(states: dict[str, Any], answers: dict[str, Any], machine_input: dict[str, Any] | None = None):
    """An execution that has been started, and the list of its calls."""
    calls: list[tuple[str, dict[str, Any]]] = []
    interpreter.install(lambda service, role_arn: FakeClient(service, answers, calls))
    definition = json.dumps({"QueryLanguage": "JSONata", "StartAt": next(iter(states)), "States": states})
    arn = "arn:aws:states:us-east-1:000000000000:stateMachine:m"
    machine = StateMachineInstance(name="m", arn=arn, definition=definition, role_arn="role", logging_config={})
    execution = interpreter.StoppableExecution(
        name="e", sm_type=machine.sm_type, role_arn="role", exec_arn=f"{arn}:e", account_id="0", region_name="us-east-1",
        state_machine=machine, start_date=datetime.now(UTC), cloud_watch_logging_session=None, activity_store={},
        input_data=json.dumps(machine_input or {}),
    )  # fmt: skip
    execution.start()
    return execution, calls


def run(
    states: dict[str, Any], answers: dict[str, Any], machine_input: dict[str, Any] | None = None, stop_after_s: float | None = None
):
    """An execution that has ended, and its calls."""
    execution, calls = begin(states, answers, machine_input)
    started_s = time.monotonic()
    while execution.exec_status == "RUNNING" and time.monotonic() - started_s < 20:
        if stop_after_s is not None and time.monotonic() - started_s > stop_after_s:
            execution.stop(stop_date=datetime.now(UTC), error=None, cause=None)
        time.sleep(0.02)
    return execution, calls


def task(resource: str, arguments: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    return {"Type": "Task", "Resource": f"arn:aws:states:::{resource}", "Arguments": arguments, "End": True, **more}


def client_error(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "why"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "x")


PROCESSING = {"ProcessingJobName": "p"}


def test_a_sync_task_waits_for_its_job_and_gives_the_description():
    jobs = [{"ProcessingJobStatus": "InProgress"}, {"ProcessingJobStatus": "Completed", "ExitMessage": 'a "quoted" word'}]
    execution, calls = run(
        {"A": task("sagemaker:createProcessingJob.sync", PROCESSING, Output="{% $states.result.ExitMessage %}")},
        {"create_processing_job": {}, "describe_processing_job": jobs},
    )
    assert (execution.exec_status, execution.output) == ("SUCCEEDED", 'a "quoted" word')
    assert [name for name, _ in calls] == ["create_processing_job", "describe_processing_job", "describe_processing_job"]
    kinds = [event["type"] for event in execution.to_history_output()["events"]]
    assert kinds[2:6] == ["TaskScheduled", "TaskStarted", "TaskSubmitted", "TaskSucceeded"]


def test_the_keys_of_a_map_stay_as_they_are():
    described = {"TrainingJobStatus": "Completed", "HyperParameters": {"batch_size": "64"}}
    execution, _ = run(
        {"A": task("sagemaker:createTrainingJob.sync", {"TrainingJobName": "t"}, Output="{% $states.result.HyperParameters %}")},
        {"create_training_job": {}, "describe_training_job": described},
    )
    assert execution.output == {"batch_size": "64"}


def test_a_failed_job_fails_the_task_with_its_description_as_the_cause():
    execution, _ = run(
        {"A": task("sagemaker:createProcessingJob.sync", PROCESSING)},
        {"create_processing_job": {}, "describe_processing_job": {"ProcessingJobStatus": "Failed", "FailureReason": "one class"}},
    )
    assert (execution.exec_status, execution.error) == ("FAILED", "States.TaskFailed")
    assert json.loads(execution.cause)["FailureReason"] == "one class"


def test_an_aborted_execution_stops_its_job():
    execution, calls = run(
        {"A": task("sagemaker:createProcessingJob.sync", PROCESSING)},
        {"create_processing_job": {}, "describe_processing_job": {"ProcessingJobStatus": "InProgress"}, "stop_processing_job": {}},
        stop_after_s=0.3,
    )
    assert execution.exec_status == "ABORTED"
    deadline_s = time.monotonic() + 5
    while ("stop_processing_job", PROCESSING) not in calls and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert ("stop_processing_job", PROCESSING) in calls


def stop(execution: interpreter.StoppableExecution) -> datetime:
    """Stop it as StopExecution does, and see that it is over at once, with all that was said."""
    now = datetime.now(UTC)
    execution.stop(stop_date=now, error="Enough", cause="a test")
    assert stopped(execution, now)
    return now


def stopped(execution: interpreter.StoppableExecution, when: datetime) -> bool:
    described = execution.to_describe_output()
    return [described.get(name) for name in ("status", "stopDate", "error", "cause")] == ["ABORTED", when, "Enough", "a test"]


def ending(execution: interpreter.StoppableExecution) -> dict[str, Any]:
    """Type and details of the event that ends the history; empty when there is none within 10 s."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        for event in execution.to_history_output()["events"][1:]:
            if event["type"].startswith("Execution"):
                return {name: value for name, value in event.items() if name == "type" or name.endswith("Details")}
        time.sleep(0.02)
    return {}


ABORTED = {"executionAbortedEventDetails": {"error": "Enough", "cause": "a test"}, "type": "ExecutionAborted"}
LONG = {"Type": "Wait", "Seconds": 600}


def test_a_stop_right_after_the_start_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    parse = ExecutionWorker._get_evaluation_entrypoint
    monkeypatch.setattr(ExecutionWorker, "_get_evaluation_entrypoint", lambda self: (time.sleep(0.2), parse(self))[1])
    execution, calls = begin({"A": {**LONG, "Next": "B"}, "B": task("sagemaker:createProcessingJob", PROCESSING)}, {})
    assert execution.exec_worker.env is None, "it has not begun"
    when = stop(execution)
    assert ending(execution) == ABORTED
    assert stopped(execution, when)
    assert calls == []


def test_a_stop_that_is_not_heard_says_so(monkeypatch: pytest.MonkeyPatch):
    parse = ExecutionWorker._get_evaluation_entrypoint
    monkeypatch.setattr(ExecutionWorker, "_get_evaluation_entrypoint", lambda self: (time.sleep(0.5), parse(self))[1])
    monkeypatch.setattr(interpreter, "BEGIN_S", 0.05)
    execution, _ = begin({"A": {"Type": "Succeed"}}, {})
    with pytest.raises(TimeoutError, match="stop it again"):
        stop(execution)
    assert ending(execution)["type"] == "ExecutionSucceeded"


def test_a_wait_that_is_just_being_entered_hears_the_stop(monkeypatch: pytest.MonkeyPatch):
    known, asked = queue.SimpleQueue[interpreter.StoppableExecution](), list[datetime]()

    def seconds(self: Seconds, env: Any) -> int:
        asked.append(stop(known.get(timeout=10)))
        return 600

    monkeypatch.setattr(Seconds, "_get_wait_seconds", seconds)
    execution, _ = begin({"A": {**LONG, "End": True}}, {})
    known.put(execution)
    assert ending(execution) == ABORTED
    assert stopped(execution, *asked)


def test_a_stop_as_the_job_ends_is_no_failure_and_nothing_follows():
    """SageMaker refuses to stop a job that has ended; the state would catch that."""
    known, asked = queue.SimpleQueue[interpreter.StoppableExecution](), list[datetime]()

    def describe() -> dict[str, Any]:
        asked.append(stop(known.get(timeout=10)))
        return {"ProcessingJobStatus": "InProgress"}

    catch = [{"ErrorEquals": ["States.ALL"], "Next": "B"}]
    states = {
        "A": task("sagemaker:createProcessingJob.sync", PROCESSING, Catch=catch),
        "B": task("sagemaker:createProcessingJob", PROCESSING),
    }
    refused = client_error("ValidationException")
    execution, calls = begin(
        states, {"create_processing_job": {}, "describe_processing_job": describe, "stop_processing_job": refused}
    )
    known.put(execution)
    assert ending(execution) == ABORTED
    assert stopped(execution, *asked)
    assert [name for name, _ in calls] == ["create_processing_job", "describe_processing_job", "stop_processing_job"]


def test_an_execution_that_has_ended_cannot_be_stopped():
    execution, _ = run({"A": {"Type": "Succeed"}}, {})
    ended = execution.to_describe_output()
    execution.stop(stop_date=datetime.now(UTC), error="Enough", cause="a test")
    assert execution.to_describe_output() == ended
    assert ended["status"] == "SUCCEEDED"


def test_a_state_that_times_out_stops_its_job():
    execution, calls = run(
        {"A": task("sagemaker:createProcessingJob.sync", PROCESSING, TimeoutSeconds=1)},
        {"create_processing_job": {}, "describe_processing_job": {"ProcessingJobStatus": "InProgress"}, "stop_processing_job": {}},
    )
    assert execution.error == "States.Timeout"
    deadline_s = time.monotonic() + 5
    while ("stop_processing_job", PROCESSING) not in calls and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert ("stop_processing_job", PROCESSING) in calls


def test_arguments_may_be_one_expression():
    arguments = "{% $merge([{'ProcessingJobName': 'p'}, $states.input.tagged ? {'Tags': []} : {}]) %}"
    for tagged, request in ((True, {"ProcessingJobName": "p", "Tags": []}), (False, {"ProcessingJobName": "p"})):
        states = {"A": task("sagemaker:createProcessingJob", arguments)}
        execution, calls = run(states, {"create_processing_job": {}}, {"tagged": tagged})
        assert calls == [("create_processing_job", request)]
        (scheduled,) = [event for event in execution.to_history_output()["events"] if event["type"] == "TaskScheduled"]
        assert json.loads(scheduled["taskScheduledEventDetails"]["parameters"]) == request


@pytest.mark.parametrize("reasons", [["AlgorithmError: learning_rate=-1 is too small, exit code: 1"], []])
def test_a_failed_search_is_explained_by_its_first_failed_trial(reasons: list[str]):
    """The pipeline's own states, under the interpreter that runs them here."""
    context = json.loads((Path(__file__).resolve().parents[2] / "cdk.json").read_text())["context"]
    states = definition(load(Context(context)))["States"]
    name = {"HyperParameterTuningJobName": "t"}
    machine = {
        "Tune": {**states["Tune"], "Arguments": name},
        **{state: states[state] for state in ("TrialsFailed", "ReadTrialFailure")},
        "CapacityMissing": {"Type": "Fail", "Error": "{% $failure.state & 'Failed' %}", "Cause": "{% $failure.cause %}"},
        "Train": {"Type": "Succeed"},
    }
    described = {**name, "HyperParameterTuningJobStatus": "Failed", "FailureReason": "No training job succeeded"}
    answers = {
        "create_hyper_parameter_tuning_job": {},
        "describe_hyper_parameter_tuning_job": described,
        "list_training_jobs_for_hyper_parameter_tuning_job": {
            "TrainingJobSummaries": [{"TrainingJobName": "t-001", "FailureReason": why} for why in reasons]
        },
    }
    execution, calls = run(machine, answers)
    asked = {**name, "StatusEquals": "Failed", "SortBy": "CreationTime", "SortOrder": "Ascending", "MaxResults": 1}
    assert calls[-1] == ("list_training_jobs_for_hyper_parameter_tuning_job", asked)
    assert execution.error == "TuneFailed"
    if reasons:
        assert execution.cause == f"Trial t-001: {reasons[0]}"
    else:
        assert json.loads(execution.cause)["FailureReason"] == "No training job succeeded"


@pytest.mark.parametrize(
    ("resource", "arguments", "operation", "code", "name"),
    [
        ("sagemaker:createModel", {"ModelName": "m", "ExecutionRoleArn": "r"}, "create_model", "ValidationException",
         "SageMaker.AmazonSageMakerException"),
        ("sagemaker:createModel", {"ModelName": "m"}, "create_model", "ResourceLimitExceeded",
         "SageMaker.ResourceLimitExceededException"),
        ("aws-sdk:sagemaker:describeEndpoint", {"EndpointName": "e"}, "describe_endpoint", "ValidationException",
         "SageMaker.SageMakerException"),
        ("aws-sdk:ecr:describeImages", {"RepositoryName": "r"}, "describe_images", "ImageNotFoundException",
         "Ecr.ImageNotFoundException"),
        ("aws-sdk:s3:getObject", {"Bucket": "b", "Key": "k"}, "get_object", "NoSuchKey", "S3.NoSuchKeyException"),
    ],
)  # fmt: skip
def test_errors_have_the_names_that_step_functions_gives_them(resource, arguments, operation, code, name):
    execution, _ = run({"A": task(resource, arguments)}, {operation: client_error(code)})
    assert execution.error == name


def test_fields_are_pascal_case_and_unknown_ones_are_refused():
    found = {"imageDetails": [{"imageTags": ["t"]}]}
    execution, calls = run(
        {"A": task("aws-sdk:ecr:describeImages", {"RepositoryName": "r", "ImageIds": [{"ImageTag": "t"}]})},
        {"describe_images": found},
    )
    assert calls == [("describe_images", {"repositoryName": "r", "imageIds": [{"imageTag": "t"}]})]
    assert execution.output == {"ImageDetails": [{"ImageTags": ["t"]}]}
    execution, _ = run({"A": task("aws-sdk:ecr:describeImages", {"RepositoryName": "r", "Tag": "t"})}, {"describe_images": found})
    assert execution.error == "States.Runtime"
    assert "DescribeImages.Tag" in execution.cause


def test_a_lambda_answers_with_its_payload_and_its_errors_keep_their_type():
    def answer(payload: Any, **more: Any) -> dict[str, Any]:
        text = json.dumps(payload).encode()
        return {"StatusCode": 200, "Payload": StreamingBody(io.BytesIO(text), len(text)), **more}

    states = {
        "A": task("lambda:invoke", {"FunctionName": "f", "Payload": {"n": "{% 1 + 1 %}"}}, Output="{% $states.result.Payload %}")
    }
    execution, calls = run(states, {"invoke": answer({"ok": True})})
    assert execution.output == {"ok": True}
    assert json.loads(calls[0][1]["Payload"]) == {"n": 2}
    execution, _ = run(
        states, {"invoke": answer({"errorType": "SmokeTestFailed", "errorMessage": "1 of 4"}, FunctionError="Unhandled")}
    )
    assert execution.error == "SmokeTestFailed"


def test_a_service_that_is_not_emulated_is_refused_by_name():
    with pytest.raises(ValueError, match="glue"):
        interpreter._task_for("glue")


@pytest.mark.parametrize("code", ["ThrottlingException", "InternalFailure"])
def test_a_job_whose_service_is_busy_is_asked_for_again(code: str):
    busy = ClientError({"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": 500}}, "x")
    execution, calls = run(
        {"A": task("sagemaker:createProcessingJob.sync", PROCESSING)},
        {"create_processing_job": {}, "describe_processing_job": [busy, busy, {"ProcessingJobStatus": "Completed"}]},
    )
    assert execution.exec_status == "SUCCEEDED"
    assert [name for name, _ in calls].count("describe_processing_job") == 3
