"""A sleeping endpoint is woken by the one way in which models are deployed: an execution of the state machine, and only one.

The execution's name is made from what sleeps: all who ask at the same time ask for the same name, and Step Functions starts it
once. Each deployment writes a new configuration's name into champion.json, so the next sleep has another name.
"""

from __future__ import annotations

import json
from typing import Any

from answers import HttpError
from botocore.exceptions import ClientError

ATTEMPTS = 4
RETRY_AFTER_S = 30


class Waker:
    """Starts the deployment of the champion."""

    def __init__(self, client: Any, machine_arn: str) -> None:
        """``client``: Step Functions."""
        self._client = client
        self._machine = machine_arn

    def wake(self, champion: dict[str, Any]) -> HttpError:
        """Start the deployment unless one is running; the answer for the client either way."""
        text = json.dumps({"action": "deploy", "model_package": champion["model_package"]}, separators=(",", ":"), sort_keys=True)
        name = ""
        for attempt in range(ATTEMPTS):
            name = f"wake-{str(champion['endpoint_config'])[-16:]}-{attempt}"
            if self._runs(name, text):
                message = "The model sleeps when nobody asks, and is waking up; send the picture again in some minutes."
                return HttpError(503, "waking_up", message, RETRY_AFTER_S)
        message = f"The model could not be woken: look at the execution {name} of the state machine, then start it with {{}}."
        return HttpError(503, "wake_failed", message, 300)

    def _runs(self, name: str, text: str) -> bool:
        """Whether the execution was started, or runs already; False when it has ended."""
        try:
            # With the name and input of one that runs this starts nothing and succeeds.
            self._client.start_execution(stateMachineArn=self._machine, name=name, input=text)
            return True
        except ClientError as error:
            if error.response["Error"]["Code"] != "ExecutionAlreadyExists":
                raise
        arn = f"{self._machine.replace(':stateMachine:', ':execution:')}:{name}"
        # One that succeeded moments ago: its endpoint was not there yet when this request looked.
        return bool(self._client.describe_execution(executionArn=arn)["status"] in ("RUNNING", "SUCCEEDED"))
