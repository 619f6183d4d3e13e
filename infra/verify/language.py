"""The definition as Amazon States Language: fields, types, transitions, time limits and ways out; and every expression in it.

Sources: https://states-language.net/spec.html (fields), https://docs.aws.amazon.com/step-functions/latest/dg/ (JSONata, ``.sync``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import botocore.exceptions
from botocore.model import OperationModel, Shape

from infra.verify import contracts
from infra.verify.expressions import CONTEXT, Checker, Form, expressions, merged, result_form, source, tree
from infra.verify.findings import Finding, shown
from local_cloud.interpreter import SYNC_JOBS, boto_name, error_prefix
from local_cloud.validation import service_model

Json = dict[str, Any]

_TEXT, _NUMBER, _OBJECT, _LIST, _ANY = (str,), (int,), (dict,), (list,), (object,)

_COMMON: dict[str, tuple[type, ...]] = {"Type": _TEXT, "Comment": _TEXT, "QueryLanguage": _TEXT, "Assign": _OBJECT, "Output": _ANY}
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "Pass": {**_COMMON, "Next": _TEXT, "End": (bool,)},
    "Wait": {**_COMMON, "Next": _TEXT, "End": (bool,), "Seconds": (int, str), "Timestamp": _TEXT},
    "Choice": {**_COMMON, "Choices": _LIST, "Default": _TEXT},
    "Succeed": {name: _COMMON[name] for name in ("Type", "Comment", "QueryLanguage", "Output")},
    "Fail": {"Type": _TEXT, "Comment": _TEXT, "QueryLanguage": _TEXT, "Error": _TEXT, "Cause": _TEXT},
    "Task": {
        **_COMMON, "Next": _TEXT, "End": (bool,), "Resource": _TEXT, "Arguments": (dict, str), "TimeoutSeconds": (int, str),
        "HeartbeatSeconds": (int, str), "Retry": _LIST, "Catch": _LIST, "Credentials": _OBJECT,
    },
}  # fmt: skip
_RETRY: dict[str, tuple[type, ...]] = {
    "ErrorEquals": _LIST, "IntervalSeconds": _NUMBER, "MaxAttempts": _NUMBER, "BackoffRate": (int, float),
    "MaxDelaySeconds": _NUMBER, "JitterStrategy": _TEXT, "Comment": _TEXT,
}  # fmt: skip
_CATCH: dict[str, tuple[type, ...]] = {"ErrorEquals": _LIST, "Next": _TEXT, "Assign": _OBJECT, "Output": _ANY, "Comment": _TEXT}
_CHOICE: dict[str, tuple[type, ...]] = {"Condition": _TEXT, "Next": _TEXT, "Assign": _OBJECT, "Output": _ANY, "Comment": _TEXT}
_REQUIRED = {
    "Pass": (),
    "Wait": (),
    "Choice": ("Choices", "Default"),
    "Succeed": (),
    "Fail": (),
    "Task": ("Resource", "TimeoutSeconds", "Catch"),
}

BUSY_PAUSE_S = 120
"""No pause between two tries is longer."""

_BUILT_IN_ERRORS = frozenset(
    [
        "States.ALL",
        "States.Timeout",
        "States.TaskFailed",
        "States.Permissions",
        "States.QueryEvaluationError",
        "States.HeartbeatTimeout",
        "States.DataLimitExceeded",
        "States.Runtime",
    ]
)


class Call(NamedTuple):
    """The API call of a Task: botocore's service, the operation, and whether the state waits for what it starts."""

    service: str
    operation: str
    sync: bool

    @property
    def model(self) -> OperationModel:
        """botocore's model of the operation."""
        return service_model(self.service).operation_model(self.operation)

    @property
    def result(self) -> Shape | None:
        """The shape of the state's result: of a job that is waited for, its description."""
        if self.sync and self.service != "codebuild":
            return service_model(self.service).operation_model(self.operation.replace("Create", "Describe", 1)).output_shape
        return self.model.output_shape


def call_of(resource: str) -> Call:
    """The call that a Task's resource stands for. Raises ValueError with what was expected."""
    parts = resource.split(":")
    optimized = {"sagemaker", "codebuild", "lambda", "sns"}
    if parts[:5] != ["arn", "aws", "states", "", ""] or len(parts) not in (7, 8):
        raise ValueError("expected arn:aws:states:::<service>:<action>")
    if parts[5] == "aws-sdk" and len(parts) == 8:
        service, (action, _, condition) = boto_name(parts[6]), parts[7].partition(".")
    elif parts[5] in optimized and len(parts) == 7:
        service, (action, _, condition) = parts[5], parts[6].partition(".")
    else:
        raise ValueError(f"expected aws-sdk or one of {', '.join(sorted(optimized))}")
    if condition not in ("", "sync") or (condition and (parts[5], action) not in SYNC_JOBS):
        raise ValueError("expected .sync, for a job that Step Functions can wait for")
    operation = action[:1].upper() + action[1:]
    try:
        model = service_model(service)
    except botocore.exceptions.UnknownServiceError:
        raise ValueError("expected a service that botocore knows") from None
    if not action[:1].islower() or operation not in model.operation_names:
        raise ValueError(f"expected an operation of {service}, its first letter small")
    return Call(service, operation, bool(condition))


def check(machine: Json) -> list[Finding]:
    """Everything wrong with a definition that can be seen without running it."""
    return list(_check(machine))


def _check(machine: Json) -> Iterator[Finding]:
    states = machine.get("States")
    if not isinstance(states, dict) or not states:
        yield Finding("language", "States", shown(states), "expected an object with the states")
        return
    allowed: dict[str, tuple[type, ...]] = {
        "Comment": _TEXT,
        "QueryLanguage": _TEXT,
        "StartAt": _TEXT,
        "States": _OBJECT,
        "TimeoutSeconds": _NUMBER,
        "Version": _TEXT,
    }
    yield from _fields("definition", machine, allowed, ("StartAt", "States", "QueryLanguage"))
    if machine.get("QueryLanguage") != "JSONata":
        yield Finding("language", "QueryLanguage", shown(machine.get("QueryLanguage")), "expected JSONata")
    if machine.get("StartAt") not in states:
        yield Finding("language", "StartAt", shown(machine.get("StartAt")), "expected the name of a state")
        return
    sound = True
    for name, state in states.items():
        for finding in _state(name, state, states):
            sound = False
            yield finding
    if sound:
        yield from _unreachable(machine)
        yield from _expressions(machine)
        yield from _polling(states)


def _fields(where: str, given: Json, allowed: dict[str, tuple[type, ...]], required: tuple[str, ...] = ()) -> Iterator[Finding]:
    for name, value in given.items():
        if name not in allowed:
            yield Finding("language", where, f"field {name}", f"expected one of {', '.join(sorted(allowed))}")
        elif not isinstance(value, allowed[name]) or (
            isinstance(value, bool) and bool not in allowed[name] and allowed[name] != _ANY
        ):
            kinds = " or ".join(kind.__name__ for kind in allowed[name])
            yield Finding("language", where, f"{name} is {shown(json.dumps(value))}", f"expected {kinds}")
    for name in required:
        if name not in given:
            yield Finding("language", where, f"{name} is missing", "add it")


def _state(name: str, state: Json, states: Json) -> Iterator[Finding]:
    kind = state.get("Type")
    if kind not in FIELDS:
        yield Finding("language", name, f"Type is {shown(kind)}", f"expected one of {', '.join(FIELDS)}")
        return
    if len(name) > 80:
        yield Finding("language", name, "name", "expected at most 80 characters")
    yield from _fields(name, state, FIELDS[kind], _REQUIRED[kind])
    if kind in ("Pass", "Wait", "Task") and ("Next" in state) == bool(state.get("End")):
        yield Finding("language", name, "no Next", "expected Next, or End: true")
    if kind == "Wait" and not isinstance(state.get("Seconds"), int) and "Timestamp" not in state:
        yield Finding("language", name, f"Seconds is {shown(state.get('Seconds'))}", "expected a number of seconds")
    for where, target in transitions(name, state):
        if target not in states:
            yield Finding("language", where, f"goes to {shown(target)}", "expected the name of a state")
    if kind == "Choice":
        for index, choice in enumerate(state.get("Choices") or [{}]):
            where = f"{name}.Choices[{index}]"
            yield from _fields(where, choice, _CHOICE, ("Condition", "Next"))
            if source(choice.get("Condition")) is None:
                yield Finding("language", where, shown(choice.get("Condition")), "expected {% a condition %}")
    for field in ("TimeoutSeconds", "HeartbeatSeconds"):
        if isinstance(state.get(field), str) and source(state[field]) is None:
            yield Finding("language", name, f"{field} is {shown(state[field])}", "expected a number of seconds")
    if kind == "Task" and isinstance(state.get("Resource"), str):
        yield from _task(name, state)


def _task(name: str, state: Json) -> Iterator[Finding]:
    try:
        call = call_of(str(state["Resource"]))
    except ValueError as error:
        yield Finding("language", name, f"Resource is {shown(state['Resource'])}", str(error))
        return
    known = _errors(call)
    for index, entry in enumerate(state.get("Retry", [])):
        where = f"{name}.Retry[{index}]"
        yield from _fields(where, entry, _RETRY, ("ErrorEquals", "JitterStrategy"))
        yield from _error_names(where, entry, known)
        if entry.get("JitterStrategy") not in ("FULL", "NONE"):
            yield Finding("language", where, f"JitterStrategy is {shown(entry.get('JitterStrategy'))}", "expected FULL or NONE")
        bounds = {
            "IntervalSeconds": (1, 99_999_999),
            "MaxAttempts": (0, 99_999_999),
            "BackoffRate": (1, 100),
            "MaxDelaySeconds": (1, BUSY_PAUSE_S),
        }
        for field, (low, high) in bounds.items():
            value = entry.get(field, low)
            if not isinstance(value, int | float) or not low <= value <= high:
                yield Finding("language", where, f"{field} is {shown(value)}", f"expected {low} to {high}")
    for index, entry in enumerate(state.get("Catch", [])):
        where = f"{name}.Catch[{index}]"
        yield from _fields(where, entry, _CATCH, ("ErrorEquals", "Next"))
        yield from _error_names(where, entry, known)
    if not any("States.ALL" in entry.get("ErrorEquals", []) for entry in state.get("Catch", [])):
        yield Finding("language", name, "an error that nobody expects ends the execution", "catch States.ALL, and clean up")
    if not state.get("Retry"):
        yield Finding("language", name, "no Retry", "expected another try when the service is busy")


def _errors(call: Call) -> frozenset[str] | None:
    """Names of the errors that a task can see; None for a Lambda, whose own exceptions have any name."""
    if call.service == "lambda":
        return None
    title = error_prefix(call.service)
    shapes = service_model(call.service).error_shapes
    # The SDK's classes end with Exception; a service's general one carries its name.
    modelled = {f"{title}.{shape.name.removesuffix('Exception').removesuffix('Fault')}Exception" for shape in shapes}
    general = {
        f"{title}.{title}Exception",
        f"{title}.Amazon{title}Exception",
        f"{title}.AWS{title}Exception",
        f"{title}.SdkClientException",
    }
    # Not in botocore's models: what any service says when it is asked too often, and scarcity of SageMaker's quota.
    common = {
        f"{title}.ThrottlingException",
        f"{title}.ThrottledException",
        f"{title}.InternalErrorException",
        f"{title}.ResourceLimitExceededException",
    }
    return frozenset(modelled | general | common)


def _error_names(where: str, entry: Json, known: frozenset[str] | None) -> Iterator[Finding]:
    names = entry.get("ErrorEquals")
    if not isinstance(names, list) or not names:
        yield Finding("language", where, f"ErrorEquals is {shown(names)}", "expected a list of error names")
        return
    for name in names:
        if not isinstance(name, str) or (name.startswith("States.") and name not in _BUILT_IN_ERRORS):
            yield Finding(
                "language",
                where,
                f"error {shown(name)}",
                f"expected a name, of the language's own one of {', '.join(sorted(_BUILT_IN_ERRORS))}",
            )
        elif known is not None and not name.startswith("States.") and name not in known:
            yield Finding(
                "language", where, f"error {name}", f"this task cannot see it; expected one of {shown(', '.join(sorted(known)))}"
            )
        elif known is None and not name.startswith(("States.", "Lambda.")):
            yield Finding("language", where, f"error {name}", "expected Lambda.… or States.…")
        elif known is None and name.startswith("Lambda.") and name not in _LAMBDA_ERRORS:
            yield Finding("language", where, f"error {name}", f"expected one of {', '.join(sorted(_LAMBDA_ERRORS))}")


_LAMBDA_ERRORS = frozenset(
    {"Lambda.ServiceException", "Lambda.AWSLambdaException", "Lambda.SdkClientException", "Lambda.TooManyRequestsException"}
)
"""https://docs.aws.amazon.com/step-functions/latest/dg/sfn-best-practices.html (Handle transient Lambda service exceptions)"""


def transitions(name: str, state: Json) -> Iterator[tuple[str, Any]]:
    """``(where, next state)`` for every way out of a state."""
    for field in ("Next", "Default"):
        if field in state:
            yield f"{name}.{field}", state[field]
    for group in ("Choices", "Catch"):
        for index, entry in enumerate(state.get(group) or []):
            if isinstance(entry, dict) and "Next" in entry:
                yield f"{name}.{group}[{index}]", entry["Next"]


def _unreachable(machine: Json) -> Iterator[Finding]:
    states, todo, seen = machine["States"], [machine["StartAt"]], {machine["StartAt"]}
    while todo:
        name = todo.pop()
        for _, target in transitions(name, states[name]):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    for name in states:
        if name not in seen:
            yield Finding("language", name, "no state leads here", "remove it, or lead to it")


def _polling(states: Json) -> Iterator[Finding]:
    """AWS has no ``.sync`` for endpoints: who changes one waits, looks, and decides, with a counter."""
    for name, state in states.items():
        if state["Type"] != "Task":
            continue
        call = call_of(state["Resource"])
        if call.sync and state["TimeoutSeconds"] <= 0:
            yield Finding(
                "language", name, f"TimeoutSeconds is {state['TimeoutSeconds']}", "expected the job's own limit and some more"
            )
        if call.operation not in ("CreateEndpoint", "UpdateEndpoint"):
            continue
        wait = states[state["Next"]]
        look = states[wait["Next"]] if wait["Type"] == "Wait" else {}
        choice = states[look["Next"]] if look.get("Type") == "Task" else {}
        described = look.get("Type") == "Task" and call_of(look["Resource"]).operation == "DescribeEndpoint"
        again = [one for one in choice.get("Choices", []) if one["Next"] == state["Next"]]
        if not described or not again or not re.search(r"\$polls < \d+", str(again[0]["Condition"])):
            yield Finding(
                "language",
                name,
                "the endpoint is changed and not waited for",
                "expected Wait, DescribeEndpoint and a Choice that counts $polls",
            )


# --- expressions -----------------------------------------------------------------------------------------------------------


def forms(machine: Json) -> dict[str, Form]:
    """Variable -> its form, over all Assigns; documents that our own code writes have the fields that it writes."""
    known: dict[str, Form] = {}
    places = list(_assigns(machine))
    # Twice: a variable may be assigned from one that a later state assigns.
    for _ in range(2):
        for _, assigned, states in places:
            for name, value in assigned.items():
                known[name] = merged(known.get(name), _form(value, known, states))
    return {**known, **{name: form for name, form in contracts.documents().items() if name in known}}


def _parsed_documents() -> Form:
    """The form of what ``$parse`` gives: a file of ours, the description of a job or build that failed, or a Lambda's error."""
    form: Form = {"errorMessage": None, "errorType": None, "stackTrace": None}
    for name in ("dataset", "summary", "champion"):
        form = merged(form, contracts.documents()[name])
    for kind in ("ProcessingJob", "TrainingJob", "HyperParameterTuningJob"):
        form = merged(form, result_form(service_model("sagemaker").operation_model(f"Describe{kind}").output_shape))
    builds = result_form(service_model("codebuild").operation_model("BatchGetBuilds").output_shape)
    return merged(form, {"Build": builds["Builds"][0]})


def _before_tasks(machine: Json) -> set[str]:
    """States that see the execution's own input: no task has put its result in its place."""
    states, todo, seen = machine["States"], [machine["StartAt"]], {machine["StartAt"]}
    while todo:
        state = states[todo.pop()]
        if state["Type"] == "Task":
            continue
        for _, target in transitions("", state):
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def _assigns(machine: Json) -> Iterator[tuple[str, Json, Form]]:
    early = _before_tasks(machine)
    for name, state in machine["States"].items():
        for where, part, states in _parts(name, state, name in early):
            if isinstance(part, dict) and "Assign" in part:
                yield where, part["Assign"], states


def _parts(name: str, state: Json, early: bool) -> Iterator[tuple[str, Any, Form]]:
    """``(where, what holds expressions, form of $states there)``: a result exists after a task, an error in a Catch."""
    base = {"input": contracts.documents()["request"] if early else None, "context": CONTEXT}
    own = {key: item for key, item in state.items() if key not in ("Catch", "Choices", "Arguments", "Assign", "Output", "Retry")}
    yield name, own, base
    yield f"{name}.Arguments", {"Arguments": state.get("Arguments")}, base
    after = {**base, "result": result_form(call_of(state["Resource"]).result)} if state["Type"] == "Task" else base
    if state["Type"] == "Task" and call_of(state["Resource"]).service == "lambda":
        after["result"] = {**(after["result"] or {}), "Payload": None}
    yield name, {key: state[key] for key in ("Assign", "Output") if key in state}, after
    for index, entry in enumerate(state.get("Choices", [])):
        yield f"{name}.Choices[{index}]", entry, base
    for index, entry in enumerate(state.get("Catch", [])):
        yield f"{name}.Catch[{index}]", entry, {**base, "errorOutput": {"Error": None, "Cause": None}}


def _form(value: Any, known: dict[str, Form], states: Form) -> Form:
    if isinstance(value, dict):
        return {key: _form(item, known, states) for key, item in value.items()}
    text = source(value)
    if text is None:
        return None
    checker = Checker("", known, states)
    try:
        root = tree(text)
    except Exception:
        return None
    return checker.form(root, {})


def _expressions(machine: Json) -> Iterator[Finding]:
    known, early, documents = forms(machine), _before_tasks(machine), _parsed_documents()
    names, read = frozenset(machine["States"]), set()
    for name, state in machine["States"].items():
        for where, part, states in _parts(name, state, name in early):
            for path, text in expressions(part):
                place = f"{where}.{path}" if where == name else where
                checker = Checker(place, known, states, names=names, documents=documents)
                yield from checker.check(text)
                read |= checker.read
    for name in sorted(set(known) - read):
        yield Finding("language", f"variable {name}", "nothing reads it", "correct its name, or remove it")
    yield from _literals(machine)


def _literals(machine: Json) -> Iterator[Finding]:
    """A variable that several states assign as an object has the same fields everywhere: what reads it relies on them."""
    seen: dict[str, tuple[str, set[str]]] = {}
    for where, assigned, _ in _assigns(machine):
        for name, value in assigned.items():
            if isinstance(value, dict) and value and name not in _GROWING:
                first, fields = seen.setdefault(name, (where, set(value)))
                if set(value) != fields:
                    odd = ", ".join(sorted(set(value) ^ fields))
                    yield Finding("language", where, f"{name} with {odd}", f"expected the fields that {first} gives it")


_GROWING = frozenset({"dataset", "processing_jobs"})
"""Variables that begin with what is read before they are filled."""
