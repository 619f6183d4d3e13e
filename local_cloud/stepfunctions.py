"""Step Functions' executions: state machines live in ministack's CloudFormation, their runs here, in moto's interpreter."""

from __future__ import annotations

import functools
import json
import re
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from botocore.config import Config
from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser
from moto.stepfunctions.parser.backend.state_machine import StateMachineInstance

from local_cloud import interpreter
from local_cloud.interpreter import StoppableExecution
from local_cloud.service import Caller, Cloud, Permission, ServiceError

OPERATIONS = frozenset(
    {
        "StartExecution",
        "DescribeExecution",
        "StopExecution",
        "GetExecutionHistory",
        "ListExecutions",
        "DescribeStateMachineForExecution",
    }
)
"""Answered here. Everything else of the service (create, update, delete, describe state machines, tags) is ministack's."""

_HISTORY_PAGE = 100
_NAME = re.compile(r"[^\s<>{}\[\]?*\"#%\\^|~`$&,;:/\x00-\x1f\x7f-\x9f]{1,80}")


@functools.lru_cache(maxsize=32)
def _parse(definition: str) -> None:
    """Raises what moto's parser raises. Kept, since every start asks and it takes the better part of a second."""
    AmazonStateLanguageParser.parse(definition)


class StepFunctions:
    """Runs executions with the state machine's own role; see ``local_cloud.service.Service``."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._executions: dict[str, StoppableExecution] = {}
        self._lock = threading.Lock()
        interpreter.install(self._client)

    def permissions(self, operation: str, request: dict[str, Any]) -> list[Permission]:
        """``states:StartExecution`` and ``ListExecutions`` are checked on the state machine, the others on the execution."""
        arn = request.get("stateMachineArn") or request.get("executionArn") or "*"
        return [Permission(f"states:{operation}", arn)]

    def call(self, operation: str, request: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """Dispatch to the operation of the same name."""
        handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "StartExecution": self._start,
            "DescribeExecution": lambda r: dict(self._find(r).to_describe_output()),
            "StopExecution": self._stop,
            "GetExecutionHistory": self._history,
            "ListExecutions": self._list,
            "DescribeStateMachineForExecution": lambda r: dict(self._find(r).to_describe_state_machine_for_execution_output()),
        }
        return handlers[operation](request)

    def executions(self) -> list[StoppableExecution]:
        """All executions so far, those that have ended among them."""
        with self._lock:
            return list(self._executions.values())

    def stop(self) -> None:
        """Abort what runs, so that its jobs are stopped."""
        for execution in self.executions():
            if execution.exec_status == "RUNNING":
                execution.stop(stop_date=datetime.now(UTC), error="LocalCloud.Stopped", cause="The local cloud was stopped")

    def _client(self, service: str, role_arn: str) -> Any:
        session: Any = self._cloud.session(role_arn, "states.amazonaws.com", "states")
        config = Config(retries={"max_attempts": 0}, read_timeout=900, connect_timeout=10)
        return session.client(service, endpoint_url=self._cloud.url, region_name=self._cloud.region, config=config)

    def _find(self, request: dict[str, Any]) -> StoppableExecution:
        with self._lock:  # what is in the table has been started
            execution = self._executions.get(request["executionArn"])
        if execution is None:
            raise ServiceError("ExecutionDoesNotExist", f"Execution Does Not Exist: '{request['executionArn']}'")
        return execution

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = datetime.now(UTC)
        machine = self._machine(request["stateMachineArn"])
        name = request.get("name") or str(uuid.uuid4())
        if not _NAME.fullmatch(name):
            raise ServiceError(
                "InvalidName",
                f"Invalid Name: '{name}' must have 1 to 80 characters, none of them space, brackets, wildcards or control",
            )
        text = request.get("input") or "{}"
        try:
            json.loads(text)
        except ValueError as error:
            raise ServiceError("InvalidExecutionInput", f"Invalid State Machine Execution Input: {error}") from error
        arn = f"{machine.arn.replace(':stateMachine:', ':execution:')}:{name}"
        with self._lock:
            known = self._executions.get(arn)
            if known is not None:
                if known.exec_status == "RUNNING" and known.input_data == json.loads(text):
                    return dict(known.to_start_output())
                raise ServiceError("ExecutionAlreadyExists", f"Execution Already Exists: '{arn}'")
            execution = StoppableExecution(
                name=name, sm_type=machine.sm_type, role_arn=machine.role_arn, exec_arn=arn, account_id=self._cloud.account,
                region_name=self._cloud.region, state_machine=machine, start_date=asked,
                cloud_watch_logging_session=None, activity_store={}, input_data=text,
            )  # fmt: skip
            self._executions[arn] = execution
            execution.start()
        return dict(execution.to_start_output())

    def _machine(self, arn: str) -> StateMachineInstance:
        client = self._cloud.admin().client("stepfunctions", endpoint_url=self._cloud.url, region_name=self._cloud.region)
        try:
            found = client.describe_state_machine(stateMachineArn=arn)
        except client.exceptions.StateMachineDoesNotExist as error:
            raise ServiceError("StateMachineDoesNotExist", f"State Machine Does Not Exist: '{arn}'") from error
        try:
            _parse(found["definition"])
        except Exception as error:
            raise ServiceError("InvalidDefinition", f"Invalid State Machine Definition: {error}") from error
        return StateMachineInstance(
            name=found["name"], arn=arn, definition=found["definition"], role_arn=found["roleArn"],
            logging_config=found.get("loggingConfiguration", {}), create_date=found["creationDate"],
        )  # fmt: skip

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        execution, now = self._find(request), datetime.now(UTC)
        execution.stop(stop_date=now, error=request.get("error"), cause=request.get("cause"))
        return {"stopDate": now}

    def _history(self, request: dict[str, Any]) -> dict[str, Any]:
        events = list(self._find(request).to_history_output()["events"])
        if request.get("reverseOrder"):
            events.reverse()
        start = int(request.get("nextToken") or 0)
        size = request.get("maxResults") or _HISTORY_PAGE
        page: dict[str, Any] = {"events": events[start : start + size]}
        if start + size < len(events):
            page["nextToken"] = str(start + size)
        return page

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        items = [
            dict(e.to_execution_list_item())
            for e in self.executions()
            if e.state_machine_arn == request.get("stateMachineArn") and request.get("statusFilter") in (None, e.exec_status)
        ]
        return {"executions": sorted(items, key=lambda item: item["startDate"], reverse=True)}
