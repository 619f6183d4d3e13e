"""The state machine walked through without AWS: real expressions, made-up answers, every way out taken once.

``Walk`` interprets the subset of the language that the definition uses. ``Account`` answers its tasks as AWS does when all is
well; ``scenarios`` are the inputs and the faults that lead through every branch, and ``walks`` takes them all. What no scenario
reaches is a finding itself: a branch that cannot be proven would otherwise pass unseen.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from infra.config import StageConfig
from infra.pipeline import JOB_STATES
from infra.verify import contracts
from infra.verify.deployment import ACCOUNT, REGION
from infra.verify.expressions import source, tree
from infra.verify.expressions import walk as nodes
from infra.verify.findings import Finding, shown
from infra.verify.language import call_of, transitions
from local_cloud.interpreter import QueryError, evaluate_jsonata

Json = dict[str, Any]
Answers = Callable[[str, Json], Any]

MAX_STATES = 10_000
"""An endpoint is polled up to 1,800 times before its deadline."""


class TaskError(Exception):
    """A service's error, as Step Functions names it."""

    def __init__(self, error: str, cause: str) -> None:
        super().__init__(error, cause)
        self.error, self.cause = error, cause


class WalkError(Exception):
    """The definition is at fault where the walk stands; ``state`` says where."""

    def __init__(self, state: str, message: str) -> None:
        super().__init__(message)
        self.state = state


class Walk:
    """One execution; tasks are answered by ``answers``."""

    def __init__(self, machine: Json, answers: Answers, name: str = "run-1") -> None:
        self.machine = machine
        self.answers = answers
        self.name = name
        self.variables: Json = {}
        self.visited: list[str] = []
        self.taken: set[tuple[str, str]] = set()
        self.requests: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        self.kinds: dict[str, set[str]] = {}
        self.caught: list[str] = []

    def run(self, given: Any) -> tuple[str, Any]:
        """Runs to the end; returns the last state's name and its output, or (name, {"Error", "Cause"}) of a Fail."""
        name, data = self.machine["StartAt"], given
        for _ in range(MAX_STATES):
            self.visited.append(name)
            state = self.machine["States"][name]
            self.states = {"input": data, "context": self._context(name)}
            if state["Type"] == "Succeed":
                return name, self._value(state["Output"])
            if state["Type"] == "Fail":
                return name, {key: self._value(state[key]) for key in ("Error", "Cause")}
            name = getattr(self, f"_{state['Type'].lower()}")(name, state)
        raise WalkError(name, f"no end after {MAX_STATES} states: {self.visited[-10:]}")

    def _context(self, name: str) -> Json:
        return {
            "Execution": {
                "Id": f"arn:aws:states:{REGION}:{ACCOUNT}:execution:machine:{self.name}",
                "Name": self.name,
                "StartTime": "2026-01-01T00:00:00Z",
                "RedriveCount": 0,
            },
            "State": {"Name": name, "RetryCount": 0},
        }

    def _value(self, template: Any) -> Any:
        if isinstance(template, dict):
            return {key: self._value(item) for key, item in template.items()}
        if isinstance(template, list):
            return [self._value(item) for item in template]
        text = source(template)
        return template if text is None else evaluate(text, {"states": self.states, **self.variables})

    def _assign(self, holder: Json) -> None:
        assigned = self._value(holder.get("Assign", {}))
        self.variables |= assigned
        for name, value in assigned.items():
            self.kinds.setdefault(name, set()).update(_kinds(value))
            if isinstance(value, dict) and name not in _FREE:
                for field, item in value.items():
                    self.kinds.setdefault(f"{name}.{field}", set()).update(_kinds(item))

    def _go(self, name: str, where: str, target: Any) -> str:
        self.taken.add((where, str(target)))
        return str(target)

    def _pass(self, name: str, state: Json) -> str:
        self._assign(state)
        return self._go(name, f"{name}.Next", state["Next"])

    def _wait(self, name: str, state: Json) -> str:
        return self._go(name, f"{name}.Next", state["Next"])

    def _choice(self, name: str, state: Json) -> str:
        for index, choice in enumerate(state["Choices"]):
            answer = self._value(choice["Condition"])
            if not isinstance(answer, bool):
                raise WalkError(name, f"the condition {shown(choice['Condition'])} is {answer!r}, neither true nor false")
            if answer:
                self._assign(choice)
                return self._go(name, f"{name}.Choices[{index}]", choice["Next"])
        return self._go(name, f"{name}.Default", state["Default"])

    def _task(self, name: str, state: Json) -> str:
        try:
            self.requests[name] = self._value(state["Arguments"])
            self.asked.append((name, self.requests[name]))
            self.states["result"] = self.answers(name, self.requests[name])
            self._assign(state)
        except (TaskError, QueryError) as raised:
            error = raised if isinstance(raised, TaskError) else TaskError("States.QueryEvaluationError", str(raised))
            self.states.pop("result", None)
            self.states["errorOutput"] = {"Error": error.error, "Cause": error.cause}
            self.caught.append(error.error)
            for index, catch in enumerate(state.get("Catch", [])):
                if error.error in catch["ErrorEquals"] or "States.ALL" in catch["ErrorEquals"]:
                    self._assign(catch)
                    return self._go(name, f"{name}.Catch[{index}]", catch["Next"])
            raise
        return self._go(name, f"{name}.Next", state["Next"])


def _kinds(value: Any) -> set[str]:
    """What a variable holds, so that one that changes its type is seen. Null stands for nothing yet; a number is a number."""
    return set() if value is None else {type(value).__name__.replace("float", "int")}


_FREE = frozenset({"request", "static", "best"})
"""Variables with fields that the user names."""


_evaluated: dict[tuple[str, str], Any] = {}


def evaluate(text: str, variables: Json) -> Any:
    """The expression's value; evaluated once for each combination of the variables that it names."""
    used = {name: variables[name] for name in _names(text) if name in variables}
    key = (text, json.dumps(used, sort_keys=True, default=str))
    if key not in _evaluated:
        try:
            _evaluated[key] = evaluate_jsonata(text, used)
        except QueryError as error:
            _evaluated[key] = error
    found = _evaluated[key]
    if isinstance(found, QueryError):
        raise found
    return copy.deepcopy(found)


@functools.lru_cache(maxsize=50_000)
def _names(text: str) -> frozenset[str]:
    try:
        return frozenset(str(node.value) for node in nodes(tree(text)) if node.type == "variable")
    except Exception as error:  # the parser raises several unrelated types
        raise QueryError(f"The JSONata expression '{text}' cannot be parsed: {error}") from error


# --- what AWS answers ------------------------------------------------------------------------------------------------------


class Account:
    """Answers as AWS gives them when everything works; ``faults`` maps a state to what it raises or answers instead."""

    def __init__(self, *, bucket: str = "data-bucket", prefix: str = "dogs-dev", account: str = ACCOUNT, **faults: Any) -> None:
        self.bucket, self.prefix, self.account = bucket, prefix, account
        self.faults = faults
        self.endpoint: Json | None = None
        self.image_built = False
        self.summary: Json = {
            "top1": 0.97,
            "top5": 1.0,
            "num_pictures": 100,
            "champion_top1": None,
            "num_classes": 10,
            "labels_uri": f"s3://{bucket}/models/run-1/labels.json",
            "model_data_url": f"s3://{bucket}/models/run-1/model.tar.gz",
            "smoke_uri": f"s3://{bucket}/models/run-1/smoke/",
        }

    def __call__(self, name: str, request: Json) -> Any:
        fault = self.faults.get(name)
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault
        return getattr(self, "on" + re.sub("([A-Z])", r"_\1", name).lower(), lambda _: {})(request)

    def arn(self, resource: str, service: str = "sagemaker") -> str:
        """An ARN in this account."""
        return f"arn:aws:{service}:{REGION}:{self.account}:{resource}"

    def on_prepare_data(self, request: Json) -> Any:
        return {"ProcessingJobName": request["ProcessingJobName"]}

    on_cache_features = on_evaluate = on_report = on_report_failure = on_classify_batch = on_prepare_data

    def on_dry_run(self, request: Json) -> Any:
        return {"Payload": {"checks": [{"check": "source", "found": "it can be read"}]}}

    def on_read_champion(self, request: Json) -> Any:
        champion = {
            "model_package": self.arn(f"model-package/{self.prefix}/7"),
            "model_data_url": f"s3://{self.bucket}/models/old/model.tar.gz",
            "top1": 0.9,
        }
        return {"Body": json.dumps(champion)}

    def on_read_prepared(self, request: Json) -> Any:
        result = {"dataset_hash": "abc", "dataset_uri": f"s3://{self.bucket}/datasets/abc/", "num_classes": 10}
        result["num_pictures"] = {"train": 1000, "valid": 100, "test": 100}
        return {"Body": json.dumps(result)}

    def on_read_evaluation(self, request: Json) -> Any:
        return {"Body": json.dumps(self.summary)}

    def on_tune(self, request: Json) -> Any:
        best = {"learning_rate": "0.0421", "batch_size": "128", "_tuning_objective_metric": "valid:best_top1"}
        # The best of a search that this one continues may lack a value, or tell one that the training does not know.
        earlier = {"learning_rate": "0.0123", "value_of_another_search": "1"}
        return {
            "HyperParameterTuningJobName": request["HyperParameterTuningJobName"],
            "BestTrainingJob": {"TunedHyperParameters": best},
            "OverallBestTrainingJob": {"TunedHyperParameters": earlier},
        }

    def on_train(self, request: Json) -> Any:
        folder = request["OutputDataConfig"]["S3OutputPath"]
        artifact = f"{folder}/{request['TrainingJobName']}/output/model.tar.gz"
        return {"TrainingJobName": request["TrainingJobName"], "ModelArtifacts": {"S3ModelArtifacts": artifact}}

    def on_find_server_image(self, request: Json) -> Any:
        return {"Images": [{"ImageId": request["ImageIds"][0]}] if self.image_built else [], "Failures": []}

    def on_register(self, request: Json) -> Any:
        return {"ModelPackageArn": self.arn(f"model-package/{self.prefix}/1")}

    def on_read_package(self, request: Json) -> Any:
        folder = f"s3://{self.bucket}/models/old"
        return {
            "ModelPackageArn": request["ModelPackageName"],
            "ModelApprovalStatus": "Approved",
            "InferenceSpecification": {
                "Containers": [
                    {
                        "Image": f"{self.account}.dkr.ecr.{REGION}.amazonaws.com/{self.prefix}-server:tag",
                        "ModelDataUrl": f"{folder}/model.tar.gz",
                    }
                ]
            },
            "CustomerMetadataProperties": {
                "labels_uri": f"{folder}/labels.json",
                "smoke_uri": f"{folder}/smoke/",
                "run": "old",
                "top1": "0.91",
                "dataset_hash": "abc",
            },
        }

    def on_create_model(self, request: Json) -> Any:
        return {"ModelArn": self.arn(f"model/{request['ModelName']}")}

    def on_create_endpoint_config(self, request: Json) -> Any:
        return {"EndpointConfigArn": self.arn(f"endpoint-config/{request['EndpointConfigName']}")}

    def on_find_endpoint(self, request: Json) -> Any:
        if self.endpoint is None:
            raise TaskError("SageMaker.SageMakerException", 'Could not find endpoint "arn:…". (Service: SageMaker)')
        return self.endpoint

    on_check_endpoint = on_check_restore = on_check_current = on_check_served = on_find_endpoint

    def on_create_endpoint(self, request: Json) -> Any:
        self.endpoint = {"EndpointStatus": "InService", "EndpointConfigName": request["EndpointConfigName"]}
        return {}

    on_update_endpoint = on_restore_previous = on_create_endpoint

    def on_delete_failed_endpoint(self, request: Json) -> Any:
        self.endpoint = None
        return {}

    on_remove_endpoint = on_delete_failed_endpoint


# --- scenarios -------------------------------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """An input, and an account to meet it."""

    name: str
    given: Any
    account: Callable[[], Account]
    run: str = "run-1"
    succeeds: bool = False
    """Whether the execution must end well all the same."""


def scenarios(config: StageConfig, machine: Json, bucket: str) -> Iterator[Scenario]:
    """Inputs and faults that lead through every branch of the definition."""

    def account(endpoint: str | None = None, /, **faults: Any) -> Callable[[], Account]:
        def make() -> Account:
            # Lists are used up by the account that answers with them.
            own: Json = {name: list(fault) if isinstance(fault, list) else fault for name, fault in faults.items()}
            made = Account(bucket=bucket, prefix=config.prefix, **own)
            if endpoint:
                made.endpoint = {"EndpointStatus": endpoint, "EndpointConfigName": f"{config.prefix}-older", **_MACHINES}
            return made

        return make

    yield from _inputs(config, bucket, account)
    yield from _situations(config, account)
    yield Scenario("the longest name", {"source": "incoming/" + "s" * 171}, account(), "r" * 80)
    for state, definition in machine["States"].items():
        if definition["Type"] == "Task":
            yield from _faults(state, definition, config, account)


_MACHINES = {"ProductionVariants": [{"VariantName": "main", "DesiredInstanceCount": 3}]}
_RANGES = {
    "weight_decay": {"min": 0.00001, "max": 0.01, "scale": "Logarithmic"},
    "epochs": {"min": 5, "max": 20, "integer": True},
    "optimizer": ["sgd", "adamw"],
    "label_smoothing": {"min": 0, "max": 0.2},
}
_Make = Callable[..., Callable[[], Account]]


def _package(config: StageConfig) -> str:
    return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model-package/{config.prefix}/3"


def _inputs(config: StageConfig, bucket: str, account: _Make) -> Iterator[Scenario]:
    given: dict[str, Any] = {
        "all defaults": {},
        "weights by key": {"pretrained": "pretrained/w.pth"},
        "weights among the pictures": {"recipe": "head", "pretrained": "incoming/w.pt"},
        "weights by address": {"pretrained": f"s3://{bucket}/pretrained/w.safetensors"},
        "source by address": {"source": f"s3://{bucket}/incoming/x/"},
        "hyperparameters": {"hyperparameters": {"epochs": 3, "horizontal_flip": False}},
        "warm start": {"tuning": {"warm_start": [f"{config.prefix}-1", f"{config.prefix}-2"]}},
        "deploy": {"action": "deploy", "model_package": _package(config)},
        "batch": {"action": "batch", "input": "incoming/new/"},
        "batch with a package": {"action": "batch", "input": f"s3://{bucket}/incoming/new/", "model_package": _package(config)},
        "dry run": {"dry_run": True},
        "dry run of a batch": {"dry_run": True, "action": "batch", "input": "incoming/new/"},
        "dry run of a deployment": {"dry_run": True, "action": "deploy", "model_package": _package(config)},
        "unknown field": {"colour": "red"},
        "no object": 3,
    }
    for foreign in config.source_buckets:
        given[f"pictures of {foreign}"] = {"source": f"s3://{foreign}/x/"}
        given[f"batch of {foreign}"] = {"action": "batch", "input": f"s3://{foreign}/x/"}
    for recipe in ("head", "finetune", "lp-ft", "scratch"):
        given[f"recipe {recipe}"] = {"recipe": recipe, "pretrained": "none" if recipe == "scratch" else "torchvision"}
    for strategy in ("Bayesian", "Random", "Hyperband"):
        given[f"strategy {strategy}"] = {"tuning": {"strategy": strategy, "ranges": _RANGES}}
    given["strategy Grid"] = {"tuning": {"strategy": "Grid", "batch_size": [64], "ranges": {"optimizer": ["sgd", "adamw"]}}}
    for name, value in given.items():
        yield Scenario(name, value, account())


def _situations(config: StageConfig, account: _Make) -> Iterator[Scenario]:
    """The endpoint in every state, images and models of every kind."""
    prefix = config.prefix
    moving = {"EndpointStatus": "Updating", "EndpointConfigName": f"{prefix}-older", **_MACHINES}
    failed = {"EndpointStatus": "Failed", "EndpointConfigName": f"{prefix}-older", "FailureReason": "no machine"}
    wrong = TaskError("SmokeTestError", '{"errorMessage": "3 of 4 pictures were wrong", "errorType": "SmokeTestError"}')
    small = {"Body": json.dumps({"dataset_hash": "abc", "dataset_uri": "s3://b/datasets/abc/", "num_pictures": {"train": 1}})}
    deploy = {"action": "deploy", "model_package": _package(config)}
    yield Scenario("an older model serves", {}, account("InService"))
    yield Scenario("deploy over an older model", deploy, account("InService"))
    yield Scenario("the endpoint is out of service", deploy, account("OutOfService"))
    yield Scenario("the endpoint has failed", deploy, account("Failed"))
    yield Scenario("the endpoint is moving", deploy, account("InService", FindEndpoint=[moving, moving]))
    yield Scenario("the endpoint never rests", deploy, account("InService", FindEndpoint=moving))
    yield Scenario("the new model never rests", deploy, account("InService", CheckEndpoint=moving))
    yield Scenario("the way back never ends", deploy, account("InService", SmokeTest=wrong, CheckRestore=moving))
    yield Scenario("the new model starts slowly", deploy, account("InService", CheckEndpoint=[moving]))
    yield Scenario("the new model never starts", deploy, account(CheckEndpoint=[failed]))
    yield Scenario("the new model is wrong", deploy, account("InService", SmokeTest=wrong))
    yield Scenario("the first model is wrong", deploy, account(SmokeTest=wrong))
    yield Scenario("the way back is slow", deploy, account("InService", SmokeTest=wrong, CheckRestore=[moving]))
    lost = {"EndpointStatus": "InService", "EndpointConfigName": f"{prefix}-newer"}
    yield Scenario("the way back fails", deploy, account("InService", SmokeTest=wrong, CheckRestore=[lost]))
    back = {**moving, "EndpointStatus": "InService"}
    yield Scenario("the model was taken back", deploy, account("InService", CheckEndpoint=[back], CheckCurrent=[back]))
    taken = TaskError("SageMaker.AmazonSageMakerException", "Cannot update in-progress endpoint. (Service: SageMaker)")
    there = TaskError("SageMaker.AmazonSageMakerException", "Cannot create already existing endpoint. (Service: SageMaker)")
    yield Scenario("another execution updates", deploy, account("InService", UpdateEndpoint=[taken]), succeeds=True)
    yield Scenario("another execution creates", deploy, account(CreateEndpoint=[there]), succeeds=True)
    yield Scenario("another model serves meanwhile", deploy, account("InService", SmokeTest=wrong, CheckCurrent=[lost]))
    yield Scenario("another model has taken over", deploy, account("InService", CheckServed=[lost]))
    rolling = {**moving, "EndpointStatus": "RollingBack"}
    yield Scenario("SageMaker takes long to go back", deploy, account("InService", CheckEndpoint=rolling, CheckCurrent=[rolling]))
    yield Scenario("too few pictures", {}, account(ReadPrepared=small))

    def built() -> Account:
        made = account("InService")()
        made.image_built = True
        return made

    def weak() -> Account:
        made = account("InService")()
        made.summary |= {"top1": 0.1, "champion_top1": 0.9}
        return made

    yield Scenario("the serving image is there", {}, built)
    yield Scenario("the model is refused", {}, weak)
    yield Scenario("the model is refused in silence", {}, lambda: _silent(weak(), "NotifyRefused"))
    yield Scenario("the model is refused and nothing tidied up", {}, lambda: _silent(weak(), "TidyUpRefused"))


def _silent(made: Account, state: str) -> Account:
    made.faults[state] = TaskError("States.TaskFailed", "no")
    return made


def _faults(state: str, definition: Json, config: StageConfig, account: _Make) -> Iterator[Scenario]:
    """One task fails: with a sentence, with the description of a job as ``.sync`` gives it, and for lack of capacity."""
    call = call_of(definition["Resource"])
    deploy = {"action": "deploy", "model_package": _package(config)}
    given: Any = {}
    if state in ("ReadChampion", "ClassifyBatch"):
        given = {"action": "batch", "input": "incoming/new/"}
    elif state == "ReadPackage":
        given = deploy
    elif state == "CacheFeatures":
        given = {"recipe": "head", "pretrained": "pretrained/w.pth"}
    others: Json = {}
    if state in ("RestorePrevious", "CheckRestore", "CheckCurrent", "RemoveEndpoint"):
        given, others = deploy, {"SmokeTest": TaskError("SmokeTestError", "wrong.")}
    if state == "DeleteFailedEndpoint":
        given = deploy
    if state == "DryRun":
        given = {"dry_run": True}
    if state == "ReportFailure" or state == "CleanUp":
        others = {"Train": TaskError("States.TaskFailed", "no")}
    if state == "NotifyFailure":
        given, others = deploy, {"ReadPackage": TaskError("SageMaker.SageMakerException", "no")}
    endpoint = {"DeleteFailedEndpoint": "Failed", "CreateEndpoint": None, "RemoveEndpoint": None}.get(state, "InService")
    errors = [
        "States.TaskFailed",
        *(name for entry in definition["Catch"] for name in entry["ErrorEquals"] if name != "States.ALL"),
    ]
    kind = call.operation.removeprefix("Create")
    job: Json = {f"{kind}Name": f"{config.prefix}-0123", f"{kind}Status": "Failed", "FailureReason": "AlgorithmError: no."}
    if call.service == "codebuild":
        contexts = [{"StatusCode": "COMMAND_EXECUTION_ERROR", "Message": "docker build: exit status 1"}]
        job = {
            "Build": {"BuildStatus": "FAILED", "Phases": [{"PhaseType": "BUILD", "PhaseStatus": "FAILED", "Contexts": contexts}]}
        }
    if state == "ReadTrialFailure":
        others = {"Tune": TaskError("States.TaskFailed", json.dumps(job | {
            "HyperParameterTuningJobName": f"{config.prefix}-0123", "HyperParameterTuningJobStatus": "Failed",
        }))}  # fmt: skip
        trial = {"TrainingJobSummaries": [{"TrainingJobName": f"{config.prefix}-0123-001", "FailureReason": "AlgorithmError: x"}]}
        yield Scenario("a trial says why", {}, account(endpoint, **others, ReadTrialFailure=trial))
        yield Scenario("no trial says why", {}, account(endpoint, **others, ReadTrialFailure={"TrainingJobSummaries": []}))
    for error in errors:
        yield Scenario(f"{state} fails with {error}", given, account(endpoint, **others, **{state: TaskError(error, "no")}))
    if call.sync:
        yield Scenario(
            f"{state}: the job fails",
            given,
            account(endpoint, **others, **{state: TaskError("States.TaskFailed", json.dumps(job))}),
        )
        scarce = TaskError("States.TaskFailed", json.dumps(job | {"FailureReason": "CapacityError: Unable to provision"}))
        waits = account(endpoint, **others, **{state: [scarce, scarce]})
        yield Scenario(f"{state}: no machine for a while", given, waits, succeeds=state in JOB_STATES)
        yield Scenario(f"{state}: no machine at all", given, account(endpoint, **others, **{state: [scarce] * 9}))


class Walked(NamedTuple):
    """What all walks through one definition came to."""

    findings: list[Finding]
    asked: list[tuple[str, Any]]
    """``(state, request)``, each different one once."""


def walks(config: StageConfig, machine: Json, bucket: str) -> Walked:
    """Every scenario walked to its end."""
    findings: dict[str, Finding] = {}
    asked: dict[str, tuple[str, Any]] = {}
    taken: set[tuple[str, str]] = set()
    kinds: dict[str, set[str]] = {}

    def found(where: str, value: str, remedy: str) -> None:
        finding = Finding("walk", where, shown(value), remedy)
        findings.setdefault(f"{where} {value}", finding)

    for scenario in scenarios(config, machine, bucket):
        walk = Walk(machine, scenario.account(), scenario.run)
        expected = {"unknown field": "InvalidInput", "no object": "InvalidInput"}.get(scenario.name)
        try:
            last, output = walk.run(scenario.given)
            if expected and last != expected:
                found(last, f"{scenario.name}: the execution went on", f"expected it to end in {expected}")
            if "States.QueryEvaluationError" in walk.caught and "QueryEvaluationError" not in scenario.name:
                found(
                    last,
                    f"{scenario.name}: {json.dumps(output, ensure_ascii=False)}",
                    "correct the expression that failed on the way",
                )
            if scenario.succeeds and machine["States"][last]["Type"] != "Succeed":
                found(last, f"{scenario.name}: the execution fails", "expected it to try again and to succeed")
            if machine["States"][last]["Type"] == "Succeed":
                for name, value, expected_kind in _odd_outputs(output, scenario.run):
                    found(last, f"output {name} is {value!r}", f"expected {expected_kind}")
        except WalkError as error:
            found(error.state, f"{scenario.name}: {error}", "correct the condition or the way back")
        except QueryError as error:
            found(walk.visited[-1], f"{scenario.name}: {error}", "correct the expression")
        except TaskError as error:
            found(walk.visited[-1], f"{scenario.name}: {error.error} is not caught", "catch States.ALL")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found(
                walk.visited[-1],
                f"{scenario.name}: {type(error).__name__}: {error}",
                "a value has another form than the next state expects",
            )
        taken |= walk.taken
        for name, seen in walk.kinds.items():
            kinds.setdefault(name, set()).update(seen)
        for state, request in walk.asked:
            asked.setdefault(f"{state} {json.dumps(request, sort_keys=True)}", (state, request))
    for name, seen in sorted(kinds.items()):
        if len(seen) > 1:
            found(f"variable {name}", f"is {' and '.join(sorted(seen))}", "expected one type in every Assign")
    for state, definition in machine["States"].items():
        for where, target in transitions(state, definition):
            if (where, str(target)) not in taken and where not in UNREACHED:
                found(where, f"no scenario leads from here to {target}", "add one in infra/verify/walk.py, or remove the branch")
    return Walked(list(findings.values()), list(asked.values()))


UNREACHED: dict[str, str] = {
    "TryAgain.Default": "every state that comes here is one of its choices; a Choice without a default would end the execution",
}
"""Branches that no scenario can take, and why they are there."""


def _odd_outputs(output: Json, run: str) -> Iterator[tuple[str, Any, str]]:
    """What of an execution's output is not as docs/operations.md tells."""
    for name, value in output.items():
        kinds = contracts.OUTPUT_FACTS.get(name)
        if kinds is None:
            yield name, value, f"one of {', '.join(contracts.OUTPUT_FACTS)}"
        elif not isinstance(value, kinds) or isinstance(value, bool):
            yield name, value, " or ".join(kind.__name__ for kind in kinds)
    for name in ("test_top1", "champion_top1"):
        if isinstance(output.get(name), int | float) and not 0 <= output[name] <= 1:
            yield name, output[name], "a share from 0 to 1"
    if output.get("run") != run:
        yield "run", output.get("run"), "the execution's name"
