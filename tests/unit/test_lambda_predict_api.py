"""The API in front of the real serving application: batches, heat maps, waking up, second tries, and its description."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import api_fakes
import handler
import pytest
import schemathesis
from api_fakes import TOKEN, Endpoint, connected, missing_endpoint, model_error, set_environment
from botocore.exceptions import ClientError, ReadTimeoutError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from serving_fakes import COLOURS, colour, serving, write_model
from werkzeug.test import Client

import bodies  # isort: skip
import waking  # isort: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the serving application with a model of three colours."""
    with serving(write_model(tmp_path_factory.mktemp("served"))) as address:
        yield address


@pytest.fixture
def endpoint(served: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    set_environment(monkeypatch, METRIC_NAMESPACE="ImageClassifier/dogs-dev", WAKES="true")
    found = Endpoint(served)
    with connected(found, list(COLOURS)):
        yield found
    found.close()


@pytest.fixture
def api(endpoint: Endpoint) -> Client:
    return Client(api_fakes.application)


def post(api: Client, path: str, data: bytes, kind: str, **options: Any) -> Any:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind, **options.pop("headers", {})}
    return api.post(path, data=data, headers=headers, **options)


def form(*pictures: bytes) -> tuple[bytes, str]:
    parts = [b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + one + b"\r\n" for one in pictures]
    return b"".join(parts) + b"--xyz--\r\n", 'multipart/form-data; boundary="xyz"'


def images(*pictures: bytes) -> tuple[bytes, str]:
    return json.dumps({"images": [base64.b64encode(one).decode() for one in pictures]}).encode(), "application/json"


def test_one_picture_gets_its_class_and_how_strange_it_is(api: Client):
    answer = post(api, "/predict?top_k=2&threshold=0.5", colour("red"), "image/png").json
    assert [entry["label"] for entry in answer["predictions"]] == ["red"]
    assert 0 <= answer["novelty"] <= 1
    assert answer["model"]["form"] == "onnxruntime-fp32"
    as_json = json.dumps({"image": base64.b64encode(colour("blue <&>")).decode()}).encode()
    assert post(api, "/predict", as_json, "application/json").json["predictions"][0]["label"] == "blue <&>"


@pytest.mark.parametrize("encode", [form, images])
def test_a_batch_answers_each_picture_and_names_the_broken_one(api: Client, encode: Any):
    answer = post(api, "/predict/batch?top_k=1", *encode(colour("red"), b"no picture", colour("green", "JPEG")))
    assert answer.status_code == 200
    first, second, third = answer.json["results"]
    assert (first["predictions"][0]["label"], third["predictions"][0]["label"]) == ("red", "green")
    assert second["error"]["code"] == "not_decodable"


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (*images(), 422, "no_pictures"),
        (*images(*[colour("red")] * 17), 422, "too_many_pictures"),
        (*form(*[colour("red")] * 17), 422, "too_many_pictures"),
        (b'{"images": 3}', "application/json", 400, "bad_request"),
        (b"[" * 100_000, "application/json", 400, "bad_request"),
        (form(colour("red"))[0][:-10], form()[1], 400, "bad_request"),
        (form(colour("red"))[0], "multipart/form-data", 400, "bad_request"),
        (colour("red"), "image/png", 415, "unsupported_media_type"),
    ],
    ids=["none", "17", "17 parts", "no list", "deep", "cut off", "no boundary", "picture"],
)
def test_what_is_no_batch_is_refused(api: Client, endpoint: Endpoint, body: bytes, kind: str, status: int, code: str):
    answer = post(api, "/predict/batch", body, kind)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code)
    assert endpoint.calls == []


def test_a_heat_map_is_a_picture_and_says_of_which_class(api: Client):
    accepted = {"Accept": "image/png"}
    answer = post(api, "/explain", colour("green"), "image/png", headers=accepted)
    assert answer.status_code == 200
    assert answer.data.startswith(b"\x89PNG")
    assert answer.headers["X-Label"] == "green"
    assert float(answer.headers["X-Probability"]) > 0.5
    other = post(api, "/explain?label=blue%20%3C%26%3E", colour("green"), "image/png", headers=accepted)
    assert other.headers["X-Label"] == "blue%20%3C%26%3E"
    unknown = post(api, "/explain?label=purple", colour("green"), "image/png", headers=accepted)
    assert (unknown.status_code, unknown.json["error"]["code"]) == (422, "unknown_label")
    assert post(api, "/explain", colour("green"), "image/png").status_code == 406


def test_a_model_that_fails_is_asked_again_and_counted(api: Client, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]):
    endpoint.problems = [model_error(500, "broken"), model_error(500, "broken")]
    assert post(api, "/predict", colour("red"), "image/png").status_code == 200
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ModelErrors"] for line in lines] == [1, 1]
    about = lines[0]["_aws"]["CloudWatchMetrics"][0]
    assert (about["Namespace"], about["Dimensions"]) == ("ImageClassifier/dogs-dev", [["Endpoint"]])
    endpoint.problems = [model_error(500, "broken")] * 3
    assert post(api, "/predict", colour("red"), "image/png").status_code == 502


@pytest.mark.parametrize(
    "content",
    [b"", b"no json", b"[]", b'{"predictions": [{"label": "a", "probability": NaN}]}', b'{"predictions": [{"label": 3}]}'],
)
def test_nonsense_of_the_model_never_reaches_the_client(
    api: Client, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
):
    monkeypatch.setattr(endpoint, "invoke_endpoint", lambda **_: {"Body": api_fakes.Stream(content)})
    answer = post(api, "/predict", colour("red"), "image/png")
    assert (answer.status_code, answer.json["error"]["code"]) == (502, "model_failed")
    assert capsys.readouterr().out.count('"InvalidAnswers": 1') == 3


# --- waking up -------------------------------------------------------------------------------------------------------------


class StepFunctions:
    """Executions with AWS's rules about names: the same name and input while it runs is the same execution."""

    def __init__(self) -> None:
        self.executions: dict[str, dict[str, str]] = {}
        self.started = Counter[str]()
        self._lock = threading.Lock()

    def start_execution(self, stateMachineArn: str, name: str, input: str) -> dict[str, str]:  # noqa: N803, A002 - AWS's names
        arn = f"{stateMachineArn.replace(':stateMachine:', ':execution:')}:{name}"
        with self._lock:
            known = self.executions.get(arn)
            if known is None:
                self.executions[arn] = {"status": "RUNNING", "input": input}
                self.started[name] += 1
            elif known["status"] != "RUNNING" or known["input"] != input:
                raise ClientError({"Error": {"Code": "ExecutionAlreadyExists", "Message": name}}, "StartExecution")
        return {"executionArn": arn}

    def describe_execution(self, executionArn: str) -> dict[str, str]:  # noqa: N803 - AWS's names
        return {"status": self.executions[executionArn]["status"]}


@pytest.fixture
def sleeping(endpoint: Endpoint) -> StepFunctions:
    """No endpoint, and a state machine that can bring it back."""
    endpoint.problems = [missing_endpoint() for _ in range(1000)]
    found = StepFunctions()
    handler.model().waker = waking.Waker(found, api_fakes.ENVIRONMENT["STATE_MACHINE_ARN"])
    return found


def test_fifty_who_ask_at_once_wake_the_endpoint_once(api: Client, sleeping: StepFunctions):
    body = colour("red")
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: post(Client(api_fakes.application), "/predict", body, "image/png"), range(50)))
    assert {(answer.status_code, answer.json["error"]["code"]) for answer in answers} == {(503, "waking_up")}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in answers)
    assert sleeping.started == {"wake-0123456789abcdef-0": 1}
    given = next(iter(sleeping.executions.values()))["input"]
    assert json.loads(given) == {"action": "deploy", "model_package": api_fakes.CHAMPION["model_package"]}


def test_a_waking_that_failed_is_tried_again_but_not_for_ever(api: Client, sleeping: StepFunctions):
    for attempt in range(waking.ATTEMPTS):
        assert post(api, "/predict", colour("red"), "image/png").json["error"]["code"] == "waking_up"
        assert list(sleeping.started) == [f"wake-0123456789abcdef-{n}" for n in range(attempt + 1)]
        for execution in sleeping.executions.values():
            execution["status"] = "FAILED"
    failed = post(api, "/predict", colour("red"), "image/png")
    assert (failed.status_code, failed.json["error"]["code"]) == (503, "wake_failed")
    assert "wake-0123456789abcdef-3" in failed.json["error"]["message"]


@pytest.mark.parametrize(
    "problem",
    [
        ReadTimeoutError(endpoint_url="x"),
        ClientError({"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}, "StartExecution"),
    ],
)
def test_a_busy_step_functions_is_waited_for(api: Client, sleeping: StepFunctions, monkeypatch: pytest.MonkeyPatch, problem: Any):
    def busy(**_: Any) -> Any:
        raise problem

    monkeypatch.setattr(sleeping, "start_execution", busy)
    answer = post(api, "/predict", colour("red"), "image/png")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0


def test_without_the_idle_switch_a_missing_endpoint_is_no_model(api: Client, endpoint: Endpoint):
    handler.model().waker = None
    endpoint.problems = [missing_endpoint()]
    assert post(api, "/predict", colour("red"), "image/png").json["error"]["code"] == "no_model"


# --- other origins ---------------------------------------------------------------------------------------------------------


def test_other_origins_may_read_answers_only_where_they_are_configured(api: Client, monkeypatch: pytest.MonkeyPatch):
    ours = {"Origin": "https://ours.example"}
    plain = post(api, "/predict", colour("red"), "image/png", headers=ours)
    assert "Access-Control-Allow-Origin" not in plain.headers
    monkeypatch.setenv("CORS_ORIGINS", "https://ours.example,https://also.example")
    allowed = post(api, "/predict", colour("red"), "image/png", headers=ours)
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://ours.example"
    assert allowed.headers["Vary"] == "Origin"
    other = post(api, "/predict", colour("red"), "image/png", headers={"Origin": "https://theirs.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


# --- whatever comes --------------------------------------------------------------------------------------------------------

_HEADERS = st.dictionaries(st.sampled_from(["content-type", "Content-Type", "origin"]), st.text(max_size=80))
_EVENTS = st.fixed_dictionaries(
    {},
    optional={
        "httpMethod": st.sampled_from(["GET", "POST", "PUT", ""]),
        "resource": st.sampled_from([*api_fakes.ROUTES, "/x", ""]),
        "headers": st.none() | _HEADERS,
        "queryStringParameters": st.none()
        | st.dictionaries(st.sampled_from(["top_k", "threshold", "label"]), st.text(max_size=5000)),
        "body": st.none() | st.text(max_size=300) | st.binary(max_size=300).map(lambda data: base64.b64encode(data).decode()),
        "isBase64Encoded": st.booleans(),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=_EVENTS)
def test_no_event_is_answered_with_a_500(endpoint: Endpoint, event: dict[str, Any]):
    answer = handler.handle(event, None)
    assert answer["statusCode"] in {200, 400, 404, 406, 413, 415, 422}
    if answer["statusCode"] != 200:
        assert set(json.loads(answer["body"])) == {"error", "request_id"}


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_the_parts_of_a_form_come_out_as_they_went_in(parts: list[bytes]):
    boundary = b"b" * 60  # no part of this size can hold it
    content = b"".join(
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n' + part + b"\r\n" for part in parts
    )
    kind = f"multipart/form-data; boundary={boundary.decode()}"
    assert bodies.files_of_form(content + b"--" + boundary + b"--", kind) == parts


# --- the description -------------------------------------------------------------------------------------------------------


# Random bytes are a valid body by the document, and no picture: 422 is the right answer to them.
_LEFT_OUT = [schemathesis.checks.positive_data_acceptance]


def check_description(examples: int) -> None:
    """Generated requests to every operation, valid and not: the answers must be those that the document names."""
    schema = schemathesis.openapi.from_wsgi("/openapi.json", api_fakes.open_application)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == len(api_fakes.ROUTES)
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                case.call_and_validate(excluded_checks=_LEFT_OUT)

            with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
                check()


def test_the_description_is_true(endpoint: Endpoint):
    check_description(25)


@pytest.mark.slow
def test_the_description_is_true_at_length(endpoint: Endpoint):
    check_description(1500)
