"""Smoke test, clean-up after failures, clean-up on deletion, and the authorizer, with stubbed services."""

from __future__ import annotations

import datetime
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lambdas" / "deploy"), str(ROOT / "lambdas" / "authorize")]

import authorize  # noqa: E402
import clean_up  # noqa: E402
import idle  # noqa: E402
import on_destroy  # noqa: E402
import smoke_test  # noqa: E402


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    values = {
        "ENDPOINT_NAME": "dogs-dev",
        "TOKEN_SECRET_ARN": "arn:secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


def stubbed(monkeypatch: pytest.MonkeyPatch, **services: Any) -> None:
    """``boto3.client`` gives these."""
    monkeypatch.setattr(boto3, "client", lambda name, **_: services[name.replace("-", "_")])


def client(name: str) -> Any:
    return boto3.session.Session().client(name)


# --- authorizer ------------------------------------------------------------------------------------------------------------

METHOD = "arn:aws:execute-api:us-east-1:000000000000:abc/dev/POST/predict"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    secrets = client("secretsmanager")
    stubbed(monkeypatch, secretsmanager=secrets)
    authorize.secret.cache_clear()
    with Stubber(secrets) as stub:
        stub.add_response("get_secret_value", {"SecretString": "right"}, {"SecretId": "arn:secret"})
        yield stub
    authorize.secret.cache_clear()


def test_the_right_token_may_call_every_method_of_its_stage(secret: Stubber):
    for token in ("Bearer right", "bearer right"):
        policy = authorize.handle({"authorizationToken": token, "methodArn": METHOD}, None)
        statement = policy["policyDocument"]["Statement"][0]
        assert statement["Effect"] == "Allow"
        assert statement["Resource"] == "arn:aws:execute-api:us-east-1:000000000000:abc/dev/*/*"
    secret.assert_no_pending_responses()


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer ", "Bearer wrong", "right", "Basic right", "Bearer rïght"])
def test_any_other_token_is_unauthorized(secret: Stubber, token: str):
    with pytest.raises(Exception, match=r"^Unauthorized$"):
        authorize.handle({"authorizationToken": token, "methodArn": METHOD}, None)


# --- smoke test ------------------------------------------------------------------------------------------------------------


class Api:
    """An HTTP server that answers POSTs with prepared statuses and labels, in order."""

    def __init__(self, answers: list[tuple[int, str]]) -> None:
        self.tokens: list[str] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                api.tokens.append(self.headers["Authorization"])
                status, label = answers.pop(0)
                body = {"predictions": [{"label": label, "probability": 1}], "model": {"run": "run-1"}}
                content = json.dumps(body if status == 200 else {"error": {"code": "x", "message": label}}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Api:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/dev"


def smoke(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[int, str]], run: str = "run-1") -> Any:
    """One smoke test of three pictures, all of class cat."""
    s3, secrets = client("s3"), client("secretsmanager")
    examples = [{"file": f"{index}.png", "expected": "cat"} for index in range(3)]
    bodies = {"smoke.json": json.dumps(examples).encode(), **{f"{index}.png": b"picture" for index in range(3)}}
    stubbed(monkeypatch, s3=s3, secretsmanager=secrets)
    monkeypatch.setattr(smoke_test, "PAUSE_S", 0.01)
    with Stubber(s3) as objects, Stubber(secrets) as tokens, Api(answers) as api:
        for name, content in bodies.items():
            expected = {"Bucket": "data", "Key": f"runs/run-1/evaluation/smoke/{name}"}
            objects.add_response("get_object", {"Body": StreamingBody(io.BytesIO(content), len(content))}, expected)
        for _ in range(10):
            tokens.add_response("get_secret_value", {"SecretString": "right"}, {"SecretId": ANY})
        monkeypatch.setenv("API_URL", api.url)
        result = smoke_test.handle({"smoke_uri": "s3://data/runs/run-1/evaluation/smoke/", "run": run}, None)
        assert set(api.tokens) == {"Bearer right"}
        return result


def test_right_answers_pass(monkeypatch: pytest.MonkeyPatch):
    assert smoke(monkeypatch, [(200, "cat")] * 3) == {"pictures": 3, "correct": 3}


def test_a_starting_model_is_waited_for_and_one_wrong_answer_is_borne(monkeypatch: pytest.MonkeyPatch):
    answers = [(503, "starting"), (503, "starting"), (200, "cat"), (200, "dog"), (200, "cat")]
    assert smoke(monkeypatch, answers) == {"pictures": 3, "correct": 2}


def test_wrong_answers_fail_with_their_names(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(smoke_test.SmokeTestError, match=r"2 of 3 pictures .*0\.png: dog, expected cat"):
        smoke(monkeypatch, [(200, "dog"), (200, "dog"), (200, "cat")])


def test_a_refusal_is_not_retried(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(smoke_test.SmokeTestError, match="answered 401"):
        smoke(monkeypatch, [(401, "no")])


def test_an_answer_of_another_model_fails(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(smoke_test.SmokeTestError, match="model of run run-1; expected run run-2"):
        smoke(monkeypatch, [(200, "cat")] * 3, run="run-2")


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smoke_test, "DEADLINE_S", 0.05)
    with pytest.raises(smoke_test.SmokeTestError, match="of trying"):
        smoke(monkeypatch, [(503, "starting")] * 50)


# --- clean-up --------------------------------------------------------------------------------------------------------------

KEY = "0123abcd"
LISTS = ("hyper_parameter_tuning_job", "training_job", "processing_job")
FIELDS = {
    "hyper_parameter_tuning_job": ("HyperParameterTuningJobSummaries", "HyperParameterTuningJobName"),
    "training_job": ("TrainingJobSummaries", "TrainingJobName"),
    "processing_job": ("ProcessingJobSummaries", "ProcessingJobName"),
}


def ours(number: int, kind: str = "") -> str:
    return f"dogs-dev-{kind}{KEY}{number:08x}"


def listed(stub: Stubber, jobs: dict[str, list[str]]) -> None:
    """Jobs that run, by kind; ours are stopped."""
    for kind in LISTS:
        summaries, field = FIELDS[kind]
        arn, status = f"{field.removesuffix('Name')}Arn", f"{field.removesuffix('Name')}Status"
        more = {"Strategy": "Bayesian", "TrainingJobStatusCounters": {}, "ObjectiveStatusCounters": {}} if kind == LISTS[0] else {}
        rows = [{field: name, arn: "a" * 30, status: "InProgress", "CreationTime": 0, **more} for name in jobs.get(kind, [])]
        stub.add_response(f"list_{kind}s", {summaries: rows}, {"NameContains": KEY, "StatusEquals": "InProgress"})
        for name in jobs.get(kind, []):
            if name.startswith("dogs-dev-") and name.count("-") <= 3:
                stub.add_response(f"stop_{kind}", {}, {field: name})


def test_what_the_run_made_is_stopped_and_removed(monkeypatch: pytest.MonkeyPatch):
    sagemaker = client("sagemaker")
    stubbed(monkeypatch, sagemaker=sagemaker)
    with Stubber(sagemaker) as stub:
        listed(stub, {"training_job": [ours(1), f"other-{KEY}00000000"], "processing_job": [ours(2, "prep-")]})
        stub.add_client_error("describe_endpoint", "ValidationException", "Could not find endpoint")
        rows = [
            {"EndpointConfigName": name, "EndpointConfigArn": "a" * 20, "CreationTime": 0} for name in (ours(3), f"x-{ours(3)}")
        ]
        stub.add_response("list_endpoint_configs", {"EndpointConfigs": rows}, {"NameContains": KEY})
        stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": ours(3)})
        rows = [{"ModelName": name, "ModelArn": "a" * 20, "CreationTime": 0} for name in (ours(4), f"{ours(4)}-by-hand")]
        stub.add_response("list_models", {"Models": rows}, {"NameContains": KEY})
        stub.add_response("delete_model", {}, {"ModelName": ours(4)})
        found = clean_up.handle({"run": KEY}, None)
        stub.assert_no_pending_responses()
    assert found == {"stopped": [ours(1), ours(2, "prep-")], "removed": [ours(3), ours(4)]}


def serves(stub: Stubber, configs: dict[str, str], status: str = "InService", *, described: bool = True) -> None:
    """Configuration -> model: the one that serves, and, with two, the one that is about to; ``described`` if asked about too."""
    first, *pending = configs
    found = {"EndpointName": "dogs-dev", "EndpointArn": "a" * 20, "EndpointConfigName": first, "CreationTime": 0}
    if pending:
        found["PendingDeploymentSummary"] = {"EndpointConfigName": pending[0]}
    stub.add_response("describe_endpoint", {**found, "LastModifiedTime": 0, "EndpointStatus": status})
    if status == "Deleting" or not described:
        return
    for config in sorted(configs):
        found = {
            "EndpointConfigName": config,
            "EndpointConfigArn": "a" * 20,
            "ProductionVariants": [{"VariantName": "main", "ModelName": configs[config]}],
            "CreationTime": 0,
        }
        stub.add_response("describe_endpoint_config", found, {"EndpointConfigName": config})


def holds(stub: Stubber, configs: list[int], models: list[int], removed: tuple[list[int], list[int]]) -> None:
    """The execution's configurations and models, and which of them it loses."""
    rows = [{"EndpointConfigName": ours(n), "EndpointConfigArn": "a" * 20, "CreationTime": 0} for n in configs]
    stub.add_response("list_endpoint_configs", {"EndpointConfigs": rows})
    for n in removed[0]:
        stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": ours(n)})
    rows = [{"ModelName": ours(n), "ModelArn": "a" * 20, "CreationTime": 0} for n in models]
    stub.add_response("list_models", {"Models": rows})
    for n in removed[1]:
        stub.add_response("delete_model", {}, {"ModelName": ours(n)})


def test_what_serves_is_kept_and_what_was_made_twice_is_not(monkeypatch: pytest.MonkeyPatch):
    sagemaker = client("sagemaker")
    stubbed(monkeypatch, sagemaker=sagemaker)
    with Stubber(sagemaker) as stub:
        listed(stub, {})
        serves(stub, {ours(3): ours(4)})
        holds(stub, [3, 5], [4, 6], removed=([5], [6]))
        assert clean_up.handle({"run": KEY}, None) == {"stopped": [], "removed": [ours(5), ours(6)]}


def test_what_is_about_to_serve_is_kept_while_the_endpoint_says_the_old_configuration(monkeypatch: pytest.MonkeyPatch):
    """An update that takes longer than the execution waits for it may still succeed."""
    sagemaker = client("sagemaker")
    stubbed(monkeypatch, sagemaker=sagemaker)
    with Stubber(sagemaker) as stub:
        listed(stub, {})
        serves(stub, {"dogs-dev-old": "dogs-dev-old-model", ours(3): ours(4)}, "Updating")
        holds(stub, [3, 5], [4, 6], removed=([5], [6]))
        assert clean_up.handle({"run": KEY}, None)["removed"] == [ours(5), ours(6)]


def test_a_champion_that_was_replaced_is_kept_for_the_way_back(monkeypatch: pytest.MonkeyPatch):
    sagemaker = client("sagemaker")
    stubbed(monkeypatch, sagemaker=sagemaker)
    with Stubber(sagemaker) as stub:
        listed(stub, {})
        serves(stub, {"dogs-dev-theirs": "dogs-dev-their-model"})
        holds(stub, [3, 5], [4, 6], removed=([5], [6]))
        named = {"endpoint_config": ours(3), "model": ours(4)}
        assert clean_up.handle({"run": KEY, **named}, None)["removed"] == [ours(5), ours(6)]


def test_the_configuration_of_a_deleted_endpoint_does_not_serve():
    sagemaker = client("sagemaker")
    with Stubber(sagemaker) as stub:
        for status, names in (("InService", {"c", "m"}), ("Deleting", set())):
            serves(stub, {"c": "m"}, status)
            assert clean_up.serving(sagemaker) == names


def test_the_models_of_a_deleted_configuration_are_known_to_nobody():
    sagemaker = client("sagemaker")
    with Stubber(sagemaker) as stub:
        stub.add_client_error("describe_endpoint_config", "ValidationException", "Could not find endpoint configuration")
        assert clean_up.models_of(sagemaker, "c") == set()


def test_a_job_that_has_just_ended_is_no_failure():
    sagemaker = client("sagemaker")
    with Stubber(sagemaker) as stub:
        stub.add_client_error(
            "stop_training_job", "ValidationException", "The request was rejected because the job is in Completed"
        )
        assert not clean_up._done(sagemaker.stop_training_job, TrainingJobName="x")


@pytest.mark.parametrize("key", [None, "", "0123", "0123ABCD", "0123abcd0", "../../..", "*"])
def test_what_is_no_executions_digits_is_refused(monkeypatch: pytest.MonkeyPatch, key: Any):
    stubbed(monkeypatch, sagemaker=client("sagemaker"))
    with pytest.raises(ValueError, match="expected the 8 hex digits"):
        clean_up.handle({"run": key}, None)


def test_an_endpoint_that_begins_to_move_before_it_is_deleted_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_destroy, "PAUSE_S", 0)
    sagemaker = client("sagemaker")
    with Stubber(sagemaker) as stub:
        serves(stub, {"c": "m"}, described=False)
        stub.add_client_error("delete_endpoint", "ValidationException", 'Cannot update in-progress endpoint "arn:…".')
        serves(stub, {"c": "m"}, "SystemUpdating", described=False)
        serves(stub, {"c": "m"}, described=False)
        stub.add_response("delete_endpoint", {}, {"EndpointName": "dogs-dev"})
        stub.add_client_error("describe_endpoint", "ValidationException", "Could not find endpoint")
        on_destroy.delete_endpoint(sagemaker, "dogs-dev", time.monotonic() + 60)
        stub.assert_no_pending_responses()


@pytest.mark.parametrize(("code", "message"), [("AccessDeniedException", "no"), ("ValidationException", "something else")])
def test_an_endpoint_that_may_not_be_deleted_is_said(code: str, message: str):
    sagemaker = client("sagemaker")
    with Stubber(sagemaker) as stub:
        serves(stub, {"c": "m"}, described=False)
        stub.add_client_error("delete_endpoint", code, message)
        with pytest.raises(ClientError, match=message):
            on_destroy.delete_endpoint(sagemaker, "dogs-dev", time.monotonic() + 60)


def test_deleting_the_stack_removes_what_runs_made(monkeypatch: pytest.MonkeyPatch):
    sagemaker, states, logs = client("sagemaker"), client("stepfunctions"), client("logs")
    stubbed(monkeypatch, sagemaker=sagemaker, stepfunctions=states, logs=logs)
    answered: list[dict[str, Any]] = []
    monkeypatch.setattr(on_destroy, "_respond", lambda event, status, reason: answered.append({"status": status, "reason": reason}))
    with Stubber(sagemaker) as stub, Stubber(states) as machine, Stubber(logs) as groups:
        machine.add_response("list_executions", {"executions": []})
        groups.add_response("delete_log_group", {}, {"logGroupName": "/aws/sagemaker/Endpoints/dogs-dev"})
        stub.add_client_error("describe_endpoint", "ValidationException", "Could not find endpoint")
        digits = "0123456789abcdef"
        names = [f"dogs-dev-{digits}", f"other-dogs-dev-{digits}", f"dogs-dev-b-{digits}", "dogs-dev-by-hand"]
        found = [{"EndpointConfigName": name, "EndpointConfigArn": "a" * 20, "CreationTime": 0} for name in names]
        stub.add_response("list_endpoint_configs", {"EndpointConfigs": found})
        stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": names[0]})
        stub.add_response("list_models", {"Models": []})
        stub.add_client_error("list_model_packages", "ValidationException", "Model package group does not exist.")
        properties = {"Prefix": "dogs-dev", "StateMachineArn": "arn:machine", "DeleteData": "true"}
        on_destroy.handle({"RequestType": "Delete", "ResourceProperties": properties}, None)
        stub.assert_no_pending_responses()
        groups.assert_no_pending_responses()
    assert answered == [{"status": "SUCCESS", "reason": ""}]


def test_cloudformation_always_gets_an_answer(monkeypatch: pytest.MonkeyPatch):
    answered: list[str] = []
    monkeypatch.setattr(on_destroy, "_respond", lambda event, status, reason: answered.append(f"{status} {reason}"))
    on_destroy.handle({"RequestType": "Create", "ResourceProperties": {}}, None)
    on_destroy.handle({"RequestType": "Delete", "ResourceProperties": {}}, None)
    assert answered[0].startswith("SUCCESS")
    assert answered[1].startswith("FAILED")


# --- the idle switch -------------------------------------------------------------------------------------------------------

NOW = datetime.datetime(2026, 6, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Stubber]]:
    """Stubs of what the idle switch asks, for a quiet endpoint that is old enough."""
    monkeypatch.setenv("STATE_MACHINE_ARN", "arn:aws:states:us-east-1:000000000000:stateMachine:dogs-dev")
    monkeypatch.setenv("IDLE_HOURS", "2")
    services = {
        name.replace("-", "_"): client(name) for name in ("sagemaker", "stepfunctions", "cloudwatch", "application-autoscaling")
    }
    stubbed(monkeypatch, **services)
    stubs = {name: Stubber(service) for name, service in services.items()}
    for stub in stubs.values():
        stub.activate()
    yield stubs
    for stub in stubs.values():
        stub.assert_no_pending_responses()


def quiet(clients: dict[str, Stubber], *, changed_h: float = 3, running: int = 0, requests: float = 0) -> None:
    """Answers up to the first that keeps the endpoint."""
    changed = NOW - datetime.timedelta(hours=changed_h)
    described = {
        "EndpointName": "dogs-dev",
        "EndpointArn": "arn:aws:sagemaker:us-east-1:0:endpoint/x",
        "EndpointStatus": "InService",
    }
    described |= {"CreationTime": changed, "LastModifiedTime": changed}
    clients["sagemaker"].add_response("describe_endpoint", described, {"EndpointName": "dogs-dev"})
    if changed_h < 2:
        return
    execution = {"executionArn": "a", "stateMachineArn": "m", "name": "n", "status": "RUNNING", "startDate": NOW}
    clients["stepfunctions"].add_response("list_executions", {"executions": [execution] * running})
    if not running:
        clients["cloudwatch"].add_response("get_metric_statistics", {"Datapoints": [{"Sum": requests}] if requests else []})


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"changed_h": 1}, "was changed at"),
        ({"running": 1}, "An execution is running"),
        ({"requests": 3}, "3 requests since 2026-06-01 10:00"),
    ],
)
def test_an_endpoint_that_is_used_or_changing_stays(clients: dict[str, Stubber], state: dict[str, Any], why: str):
    quiet(clients, **state)
    found = idle.decide(NOW, datetime.timedelta(hours=2))
    assert found["asleep"] is False
    assert why in found["why"]


def test_an_endpoint_that_nobody_asks_is_removed_with_its_scaling(clients: dict[str, Stubber]):
    quiet(clients)
    assert idle.decide(NOW, datetime.timedelta(hours=2))["asleep"] is True
    clients["application_autoscaling"].add_client_error("deregister_scalable_target", "ObjectNotFoundException")
    clients["sagemaker"].add_response("delete_endpoint", {}, {"EndpointName": "dogs-dev"})
    idle.remove(boto3.client("sagemaker"), "dogs-dev")


def test_without_an_endpoint_there_is_nothing_to_remove(clients: dict[str, Stubber]):
    clients["sagemaker"].add_client_error("describe_endpoint", "ValidationException", 'Could not find endpoint "x"')
    assert idle.handle({}, None) == {"asleep": False, "why": "There is no endpoint."}
