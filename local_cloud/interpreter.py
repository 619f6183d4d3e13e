"""moto's Amazon States Language interpreter, with the three organs it lacks: JSONata, calls to AWS services, and a brake.

moto 5.2 parses and walks the language faithfully, but evaluates JSONata through a Java bridge it does not ship, refuses the
optimised integrations for SageMaker and CodeBuild, and misses a stop that comes at a bad moment. ``install`` gives it an evaluator
(jsonata-python, with the functions that Step Functions adds), one task class for every service and a ``Wait`` that listens;
``StoppableExecution`` is its execution. The names of moto that this takes are private, nothing else in the project touches
them, and ``tests/unit/test_local_interpreter.py`` fails when a new version moves them.

Sources: the Step Functions developer guide, https://docs.aws.amazon.com/step-functions/latest/dg/: transforming-data.html (JSONata
and its added functions), integrate-optimized.html and supported-services-awssdk.html (names and errors).
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import botocore
from botocore.exceptions import ClientError, ParamValidationError
from botocore.model import ListShape, MapShape, ServiceModel, Shape, StructureShape
from botocore.response import StreamingBody
from jsonata import Jsonata
from jsonata.utils import Utils as JsonataUtils
from moto.stepfunctions.parser.api import (
    ExecutionStatus,
    HistoryEventExecutionDataDetails,
    HistoryEventType,
    TaskFailedEventDetails,
    TaskSubmittedEventDetails,
)
from moto.stepfunctions.parser.asl.component.common.error_name.custom_error_name import CustomErrorName
from moto.stepfunctions.parser.asl.component.common.error_name.failure_event import FailureEvent, FailureEventException
from moto.stepfunctions.parser.asl.component.common.error_name.states_error_name import StatesErrorName
from moto.stepfunctions.parser.asl.component.common.error_name.states_error_name_type import StatesErrorNameType
from moto.stepfunctions.parser.asl.component.common.string.string_expression import StringJSONata
from moto.stepfunctions.parser.asl.component.state.exec.state_task import state_task_factory
from moto.stepfunctions.parser.asl.component.state.exec.state_task.service.state_task_service import StateTaskService
from moto.stepfunctions.parser.asl.component.state.wait.wait_function.wait_function import WaitFunction
from moto.stepfunctions.parser.asl.eval.environment import Environment
from moto.stepfunctions.parser.asl.eval.event.event_detail import EventDetails
from moto.stepfunctions.parser.asl.eval.program_state import ProgramStopped
from moto.stepfunctions.parser.asl.utils.encoding import to_json_str
from moto.stepfunctions.parser.backend.execution import BaseExecutionWorkerCommunication, Execution

POLL_INTERVAL_S = 0.5
"""How often a ``.sync`` task asks its service for the job's state, and a ``Wait`` whether the execution goes on."""

BEGIN_S = 60.0
"""How long a stop waits for an execution that is just being started: its definition is parsed first."""


class Clients(Protocol):
    """Gives the interpreter a boto3 client that signs as the state machine's role."""

    def __call__(self, service: str, role_arn: str) -> Any: ...


@dataclass(frozen=True)
class SyncJob:
    """How ``.sync`` waits for one kind of job, and how an aborted execution stops it."""

    describe: Callable[[Any, dict[str, Any], dict[str, Any]], dict[str, Any]]
    result_of: str
    """Operation whose output the description has the form of."""
    status: Callable[[dict[str, Any]], str]
    succeeded: frozenset[str]
    failed: frozenset[str]
    stop: Callable[[Any, dict[str, Any], dict[str, Any]], Any]


def _sagemaker_job(kind: str, status_field: str) -> SyncJob:
    name = f"{kind}Name"
    snake = botocore.xform_name(kind)
    return SyncJob(
        describe=lambda client, request, _: getattr(client, f"describe_{snake}")(**{name: request[name]}),
        result_of=f"Describe{kind}",
        status=lambda job: str(job[status_field]),
        succeeded=frozenset({"Completed"}),
        failed=frozenset({"Failed", "Stopped"}),
        stop=lambda client, request, _: getattr(client, f"stop_{snake}")(**{name: request[name]}),
    )


SYNC_JOBS: dict[tuple[str, str], SyncJob] = {
    ("sagemaker", "createTrainingJob"): _sagemaker_job("TrainingJob", "TrainingJobStatus"),
    ("sagemaker", "createProcessingJob"): _sagemaker_job("ProcessingJob", "ProcessingJobStatus"),
    ("sagemaker", "createHyperParameterTuningJob"): _sagemaker_job("HyperParameterTuningJob", "HyperParameterTuningJobStatus"),
    ("codebuild", "startBuild"): SyncJob(
        describe=lambda client, _, started: {"build": client.batch_get_builds(ids=[started["build"]["id"]])["builds"][0]},
        result_of="StartBuild",
        status=lambda job: str(job["build"]["buildStatus"]),
        succeeded=frozenset({"SUCCEEDED"}),
        failed=frozenset({"FAILED", "FAULT", "STOPPED", "TIMED_OUT"}),
        stop=lambda client, _, started: client.stop_build(id=started["build"]["id"]),
    ),
}
"""The ``.sync`` integrations the local cloud runs. Others are refused when the state is reached."""


# ---- JSONata ---------------------------------------------------------------------------------------------------------


class QueryError(Exception):
    """A JSONata expression failed or returned nothing; Step Functions calls it ``States.QueryEvaluationError``."""


def _hash(value: Any, algorithm: str) -> str:
    names = {"MD5": "md5", "SHA-1": "sha1", "SHA-256": "sha256", "SHA-384": "sha384", "SHA-512": "sha512"}
    if algorithm not in names:
        raise QueryError(f"$hash: algorithm {algorithm!r} is not one of {', '.join(names)}")
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return hashlib.new(names[algorithm], text.encode(), usedforsecurity=False).hexdigest()


def _partition(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _range(first: int, last: int, step: int) -> list[int]:
    return list(range(first, last + (1 if step > 0 else -1), step))


def _random(seed: int | None = None) -> float:
    return random.Random(seed).random()  # noqa: S311 - Step Functions' own $random is not for secrets either


def _no_eval(*_: Any) -> Any:
    raise QueryError("$eval is not available in Step Functions; use $parse for JSON text")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "hash": _hash,
    "uuid": lambda: str(uuid.uuid4()),
    "parse": json.loads,
    "partition": _partition,
    "range": _range,
    "random": _random,
    "eval": _no_eval,
}


def _plain(value: Any) -> Any:
    """JSON as Python spells it: lists for JSONata's sequences, None for its null, integers where a number is whole."""
    if value is JsonataUtils.NULL_VALUE:
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise QueryError(f"returned a value of type {type(value).__name__}, which JSON cannot hold")


@functools.lru_cache(maxsize=2000)
def _program(expression: str, thread: int) -> Jsonata:
    """The parsed expression with Step Functions' functions, one for each thread: parsing is most of the work."""
    program = Jsonata(expression)
    program.set_output_convert_nulls(False)
    for name, function in _FUNCTIONS.items():
        program.register_lambda(name, function)
    return program


def evaluate_jsonata(expression: str, variables: dict[str, Any]) -> Any:
    """Value of ``expression`` with ``$name`` bound for each of ``variables``; raises ``QueryError`` when there is none."""
    try:
        program = _program(expression, threading.get_ident())
        functions = program.environment
        program.environment = program.create_frame(functions)
        Jsonata.CURRENT.jsonata = program  # as its constructor does: $now and the callbacks ask it
        try:
            for name, value in variables.items():
                program.assign(name, value)
            result = program.evaluate(None)
        finally:
            program.environment = functions
    except QueryError:
        raise
    except Exception as error:  # jsonata-python raises several unrelated types
        raise QueryError(f"The JSONata expression '{expression}' failed: {error}") from error
    if result is None:
        raise QueryError(f"The JSONata expression '{expression}' returned nothing (undefined).")
    return _plain(result)


def _eval_jsonata_string(self: StringJSONata, env: Any) -> None:
    """Replaces ``StringJSONata._eval_body``: moto pastes values into the expression's text, without escaping quotes."""
    data = json.loads(to_json_str(env.states._states_data))
    scope = {**env.variable_store._outer_scope, **env.variable_store._inner_scope}
    try:
        result = evaluate_jsonata(self.expression, {"states": data, **scope})
    except QueryError as error:
        raise _failure(env, None, "States.QueryEvaluationError", str(error)) from error
    env.stack.append(result)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def _error_name(name: str) -> CustomErrorName | StatesErrorName:
    """moto keeps the language's own names (``States.*``) apart from everyone else's."""
    own = {kind.to_name(): kind for kind in StatesErrorNameType}
    return StatesErrorName(typ=own[name]) if name in own else CustomErrorName(error_name=name)


def _failure(env: Any, task: AwsTask | None, error: str, cause: str) -> FailureEventException:
    details = TaskFailedEventDetails(
        resourceType=task._get_sfn_resource_type() if task else "states",
        resource=task._get_sfn_resource() if task else "jsonata",
        error=error,
        cause=cause,
    )
    return FailureEventException(
        failure_event=FailureEvent(
            env=env,
            error_name=_error_name(error),
            event_type=HistoryEventType.TaskFailed,
            event_details=EventDetails(taskFailedEventDetails=details),
        )
    )


def to_request(value: Any, shape: Shape, path: str) -> Any:
    """``value`` with Step Functions' PascalCase names turned into the API's own; raises ``ValueError`` on an unknown field.

    A JSON object given for a string or blob is serialised, as Step Functions does for ``Payload``, ``Message`` and ``Body``.
    """
    if isinstance(shape, StructureShape) and isinstance(value, dict):
        return {
            (member := _member(name, shape, path)): to_request(item, shape.members[member], f"{path}.{name}")
            for name, item in value.items()
        }
    if isinstance(shape, ListShape) and isinstance(value, list):
        return [to_request(item, shape.member, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(shape, MapShape) and isinstance(value, dict):
        return {key: to_request(item, shape.value, f"{path}.{key}") for key, item in value.items()}
    if shape.type_name == "blob":
        return (value if isinstance(value, str) else json.dumps(value)).encode()
    if shape.type_name == "string" and isinstance(value, dict | list):
        return json.dumps(value)
    return value


def _member(name: str, shape: StructureShape, path: str) -> str:
    for candidate in (name, name[:1].lower() + name[1:]):
        if name[:1].isupper() and candidate in shape.members:
            return candidate
    known = ", ".join(sorted(m[:1].upper() + m[1:] for m in shape.members))
    raise ValueError(f"The field '{path}.{name}' is not supported by Step Functions; expected one of: {known}")


def to_result(value: Any, shape: Shape | None) -> Any:
    """A boto3 response as Step Functions shows it: PascalCase member names, streams read as text, dates as text.

    The keys of maps (hyperparameters, tags) are data, not names, and stay as they are.
    """
    if isinstance(value, dict) and isinstance(shape, StructureShape):
        members = {name: item for name, item in value.items() if name in shape.members}
        return {name[:1].upper() + name[1:]: to_result(item, shape.members[name]) for name, item in members.items()}
    if isinstance(value, dict):
        return {name: to_result(item, getattr(shape, "value", None)) for name, item in value.items()}
    if isinstance(value, list):
        return [to_result(item, getattr(shape, "member", None)) for item in value]
    if isinstance(value, StreamingBody):
        return value.read().decode()
    return json.loads(to_json_str(value)) if not isinstance(value, str) else value


class AwsTask(StateTaskService):  # type: ignore[misc]
    """A Task state that calls AWS: ``sagemaker:*``, ``codebuild:*``, ``lambda:invoke``, ``sns:publish`` and ``aws-sdk:*``."""

    clients: Clients
    """Set by ``install``."""

    def _get_supported_parameters(self) -> set[str] | None:
        return set()  # arguments are checked against botocore's model when the state runs

    def _get_sfn_resource(self) -> str:
        condition = self.resource.condition
        return f"{self.resource.api_action}.{condition}" if condition else str(self.resource.api_action)

    def _get_sfn_resource_type(self) -> str:
        service = self.resource.service_name
        return f"{service}:{self.resource.api_name}" if service == "aws-sdk" else str(service)

    def _eval_service_task(self, env: Any, resource_runtime_part: Any, normalised_parameters: Any, state_credentials: Any) -> None:
        if self.credentials:
            raise _failure(env, self, "States.Runtime", "Credentials of a task are not emulated; remove the field")
        service, action = boto_name(self.resource.api_name), self.resource.api_action
        client = self.clients(service, env.aws_execution_details.role_arn)
        operation = action[:1].upper() + action[1:]
        request, response = self._call(env, client, operation, normalised_parameters)
        shape = client.meta.service_model.operation_model(operation).output_shape
        if self.resource.condition is not None:
            self._submitted(env, to_result(response, shape))
            response, shape = self._wait(env, client, request, response)
        env.stack.append(self._result(env, response, shape))

    def _call(self, env: Any, client: Any, operation: str, parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model = client.meta.service_model
        if operation not in model.operation_names:
            raise _failure(env, self, "States.Runtime", f"{model.service_name} has no operation {operation}")
        shape = model.operation_model(operation).input_shape
        try:
            request = to_request(parameters or {}, shape, operation) if shape else {}
            if operation == "Invoke" and self.resource.service_name == "lambda":
                request.setdefault("InvocationType", "RequestResponse")
            return request, getattr(client, _python_name(operation))(**request)
        except (ValueError, ParamValidationError) as error:
            raise _failure(env, self, "States.Runtime", str(error)) from error
        except ClientError as error:
            raise self._client_failure(env, model, error) from error

    def _client_failure(self, env: Any, model: ServiceModel, error: ClientError) -> FailureEventException:
        """Error names as AWS documents them, e.g. ``Ecr.ImageNotFoundException``, ``SageMaker.AmazonSageMakerException``."""
        code, meta = error.response["Error"]["Code"], error.response["ResponseMetadata"]
        title = error_prefix(self.resource.api_name)
        if code in model.shape_names:  # the API documents this error; the SDK has a class for it
            name = f"{title}.{code.removesuffix('Exception')}Exception"
        else:
            maker = {"sagemaker": "Amazon", "lambda": "AWS"}.get(self.resource.service_name, "")
            name = f"{title}.{maker}{title}Exception"
        status = meta.get("HTTPStatusCode")
        cause = f"{error.response['Error'].get('Message', '')} (Service: {title}, Status Code: {status}, Error Code: {code})"
        return _failure(env, self, name, cause)

    def _submitted(self, env: Any, output: Any) -> None:
        details = TaskSubmittedEventDetails(
            resource=self._get_sfn_resource(),
            resourceType=self._get_sfn_resource_type(),
            output=to_json_str(output),
            outputDetails=HistoryEventExecutionDataDetails(truncated=False),
        )
        env.event_manager.add_event(
            context=env.event_history_context,
            event_type=HistoryEventType.TaskSubmitted,
            event_details=EventDetails(taskSubmittedEventDetails=details),
        )

    def _wait(self, env: Any, client: Any, request: dict[str, Any], started: dict[str, Any]) -> tuple[dict[str, Any], Shape | None]:
        """Poll the job until it ends; stop it when the state times out or the execution is aborted."""
        job = SYNC_JOBS.get((self.resource.service_name, self.resource.api_action))
        if job is None or self.resource.condition != "sync":
            raise _failure(env, self, "States.Runtime", f"{self.resource.resource_arn} is not emulated; see local_cloud/README.md")
        shape = client.meta.service_model.operation_model(job.result_of).output_shape
        while env.is_running():
            described = _described(job, client, request, started)
            if described is None:
                time.sleep(POLL_INTERVAL_S)
                continue
            status = job.status(described)
            if status in job.succeeded:
                return described, shape
            if status in job.failed:
                raise _failure(env, self, "States.TaskFailed", to_json_str(to_result(described, shape)))
            time.sleep(POLL_INTERVAL_S)
        job.stop(client, request, started)
        return started, None

    def _result(self, env: Any, response: dict[str, Any], shape: Shape | None) -> Any:
        if self.resource.service_name != "lambda":
            return to_result(response, shape)
        payload = json.loads(response["Payload"].read() or b"null")
        if response.get("FunctionError"):
            raise _failure(env, self, str((payload or {}).get("errorType", "Lambda.Unknown")), json.dumps(payload))
        return {**to_result({k: v for k, v in response.items() if k != "Payload"}, shape), "Payload": payload}


def _described(job: SyncJob, client: Any, request: dict[str, Any], started: dict[str, Any]) -> dict[str, Any] | None:
    """The job, or None when its service is busy: Step Functions asks again, a job is not lost for it."""
    try:
        return job.describe(client, request, started)
    except ClientError as error:
        busy = error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500 or "Throttl" in error.response["Error"]["Code"]
        if not busy:
            raise
        return None


_BOTO_NAMES = {
    "sfn": "stepfunctions",
    "states": "stepfunctions",
    "cloudwatchlogs": "logs",
    "applicationautoscaling": "application-autoscaling",
}
_ERROR_PREFIX = {
    "sagemaker": "SageMaker",
    "s3": "S3",
    "sns": "SNS",
    "codebuild": "CodeBuild",
    "ecr": "Ecr",
    "secretsmanager": "SecretsManager",
    "applicationautoscaling": "ApplicationAutoScaling",
}
SERVICES = frozenset({"sagemaker", "codebuild", "lambda", "sns", "aws-sdk"})
"""Services that a Task state may call; ``aws-sdk`` is every API that the local cloud answers."""


def boto_name(api_name: str) -> str:
    """botocore's name of a service that Step Functions spells in one word."""
    return _BOTO_NAMES.get(api_name, api_name)


def error_prefix(api_name: str) -> str:
    """What a service's errors begin with, as Step Functions names them; either spelling of the service's name."""
    plain = api_name.replace("-", "")
    return _ERROR_PREFIX.get(plain, plain.capitalize())


def _python_name(operation: str) -> str:
    return str(botocore.xform_name(operation))


def _task_for(service_name: str) -> AwsTask:
    if service_name not in SERVICES:
        raise ValueError(f"States call the service '{service_name}', which the local cloud does not run; see local_cloud/README.md")
    return AwsTask()


# ---- Stopping --------------------------------------------------------------------------------------------------------


class StoppableExecution(Execution):  # type: ignore[misc]
    """An execution that is ABORTED from the moment it is stopped, as on AWS; what it was doing ends soon after.

    moto's own forgets a stop that comes before the first state has begun, and says FAILED where a state was just being left.
    Source: https://docs.aws.amazon.com/step-functions/latest/apireference/API_StopExecution.html
    """

    def stop(self, stop_date: datetime, error: str | None, cause: str | None) -> None:
        """Nothing happens to an execution that has ended. Raises ``TimeoutError`` when it does not begin within ``BEGIN_S``."""
        deadline_s = time.monotonic() + BEGIN_S
        while len(self.to_history_output()["events"]) < 2:  # it has started, and entered its first state
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"Execution {self.name} did not begin within {BEGIN_S:.0f} s; stop it again in a moment")
            time.sleep(0.01)
        env = self.exec_worker.env
        with env._state_mutex:
            if env.is_running():
                # The status first: the thread that ends must find it, or it writes its own.
                self.exec_status, self.stop_date = ExecutionStatus.ABORTED, stop_date
                self.error, self.cause = error, cause
                env.set_stop(stop_date=stop_date, error=error, cause=cause)

    def _get_start_execution_worker_comm(self) -> BaseExecutionWorkerCommunication:
        return _Ending(self)


class _Ending(BaseExecutionWorkerCommunication):  # type: ignore[misc]
    """Tells the execution how its thread ended, unless it was stopped before that."""

    def terminated(self) -> None:
        if self.execution.exec_status == ExecutionStatus.RUNNING:
            super().terminated()


def _wait_interval(self: WaitFunction, env: Environment, wait_seconds: float) -> None:
    """Replaces ``WaitFunction._wait_interval``, which waits to the end when the stop came while the state was being entered."""
    deadline_s = time.monotonic() + wait_seconds
    while env.is_running() and (left_s := deadline_s - time.monotonic()) > 0:
        env.program_state_event.wait(min(left_s, POLL_INTERVAL_S))


_moto_set_error = Environment.set_error


def _set_error(self: Environment, error: Any) -> None:
    """Replaces ``Environment.set_error``: what fails because the execution was stopped is no failure of the execution."""
    with self._state_mutex:
        if not isinstance(self._program_state, ProgramStopped):
            _moto_set_error(self, error=error)


_install_lock = threading.Lock()


def install(clients: Clients) -> None:
    """Rebind moto's private names for this process. Safe to call again with other clients."""
    with _install_lock:
        AwsTask.clients = staticmethod(clients)
        StringJSONata._eval_body = _eval_jsonata_string
        state_task_factory.state_task_service_for = _task_for
        WaitFunction._wait_interval = _wait_interval
        Environment.set_error = _set_error
