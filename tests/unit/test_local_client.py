"""``make predict`` and ``make logs``: what they ask, what they print, and how they refuse."""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber

from local_cloud import client
from local_cloud.client import ClientSideError

MACHINE = "arn:aws:states:us-east-1:000000000000:stateMachine:dogs-dev"
SECRET = "arn:aws:secretsmanager:us-east-1:000000000000:secret:token"


class Session:
    """Clients whose answers are given; each must be asked for."""

    region_name = "us-east-1"

    def __init__(self, **answers: list[tuple[str, dict[str, Any]]]) -> None:
        self.clients, self.stubs = {}, []
        for service, calls in answers.items():
            made = boto3.client(service, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
            stub = Stubber(made)
            for call, answer in calls:
                if "code" in answer:
                    stub.add_client_error(call, answer["code"], answer["message"])
                else:
                    stub.add_response(call, answer)
            stub.activate()
            self.clients[service] = made
            self.stubs.append(stub)

    def client(self, service: str) -> Any:
        return self.clients[service]


def stack(**outputs: str) -> tuple[str, dict[str, Any]]:
    found = [{"OutputKey": key, "OutputValue": value} for key, value in outputs.items()]
    described = {"StackName": "x", "CreationTime": datetime.now(UTC), "StackStatus": "CREATE_COMPLETE", "Outputs": found}
    return "describe_stacks", {"Stacks": [described]}


class Api(BaseHTTPRequestHandler):
    """Wakes up at the third request."""

    seen: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.headers["Authorization"], self.headers["Content-Type"], body))
        answers: dict[bool, tuple[int, dict[str, Any]]] = {
            True: (200, {"predictions": [{"label": "pug", "probability": 0.75}, {"label": "cat", "probability": 0.25}]}),
            False: (503, {"error": {"code": "waking_up"}}),
        }
        status, answer = (400, {"error": {"code": "bad_picture"}}) if body == b"bad" else answers[len(self.seen) > 2]
        content = json.dumps(answer).encode()
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "0.1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    Api.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/dev/"
        server.shutdown()


def asking(url: str) -> Session:
    return Session(
        cloudformation=[stack(ApiUrl=url, TokenSecretArn=SECRET)],
        secretsmanager=[("get_secret_value", {"SecretString": "t0ken"})],
    )


def test_a_picture_is_sent_with_the_token_until_the_endpoint_is_awake(api: str, tmp_path: Path, capsys: Any):
    picture = tmp_path / "dog.PNG"
    picture.write_bytes(b"pixels")
    client.predict("dev", str(picture), asking(api))
    assert Api.seen == [("Bearer t0ken", "image/png", b"pixels")] * 3
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [" 0.7500  pug", " 0.2500  cat"]
    assert shown.err.count("asking again") == 2
    assert "t0ken" not in shown.out + shown.err


def test_a_refusal_is_shown_and_not_repeated(api: str, tmp_path: Path):
    picture = tmp_path / "dog.jpg"
    picture.write_bytes(b"bad")
    with pytest.raises(ClientSideError, match=r"the API answered 400: .*bad_picture"):
        client.predict("dev", str(picture), asking(api))
    assert len(Api.seen) == 1


def test_waiting_has_an_end(api: str):
    request = urllib.request.Request(api, b"x", {"Content-Type": "image/png", "Authorization": "Bearer x"})
    started = time.monotonic()
    with pytest.raises(ClientSideError, match="503"):
        client.answer_to(request, max_wait_s=0.05)
    assert time.monotonic() - started < 5
    assert len(Api.seen) == 1


@pytest.mark.parametrize(
    ("name", "said"), [("none.jpg", "IMAGE=.*none.jpg: no such file"), ("here.txt", "expected a file that ends in .jpg")]
)
def test_what_is_no_picture_is_refused_before_anything_is_sent(tmp_path: Path, name: str, said: str):
    (tmp_path / "here.txt").write_text("x")
    with pytest.raises(ClientSideError, match=said):
        client.request_for(tmp_path / name, {"ApiUrl": "http://x", "TokenSecretArn": SECRET}, None)


def test_an_api_behind_iam_says_how_it_is_asked(tmp_path: Path):
    (tmp_path / "dog.jpg").write_bytes(b"x")
    with pytest.raises(ClientSideError, match="SigV4"):
        client.request_for(tmp_path / "dog.jpg", {"ApiUrl": "http://x"}, None)


def test_a_stage_that_is_not_deployed_says_what_to_do():
    missing = {"code": "ValidationError", "message": "Stack with id ImageClassifier-dogs-prod does not exist"}
    with pytest.raises(ClientSideError, match=r"STAGE=prod: .* us-east-1.*make deploy STAGE=prod"):
        client.outputs_of("prod", Session(cloudformation=[("describe_stacks", missing)]))


def execution(name: str, day: int) -> dict[str, Any]:
    return {
        "executionArn": f"{MACHINE.replace('stateMachine', 'execution')}:{name}",
        "stateMachineArn": MACHINE,
        "name": name,
        "status": "FAILED",
        "startDate": datetime(2026, 1, day, tzinfo=UTC),
    }


def listed(*executions: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "list_executions", {"executions": list(executions)}


def event(number: int, kind: str, **details: Any) -> dict[str, Any]:
    return {"timestamp": datetime(2026, 1, 2, 10, 0, number, tzinfo=UTC), "type": kind, "id": number, **details}


HISTORY = [
    event(1, "TaskStateEntered", stateEnteredEventDetails={"name": "Train"}),
    event(
        2,
        "TaskScheduled",
        taskScheduledEventDetails={
            "resourceType": "sagemaker",
            "resource": "createTrainingJob.sync",
            "region": "us-east-1",
            "parameters": json.dumps({"TrainingJobName": "dogs-dev-1"}),
        },
    ),
    event(3, "TaskFailed", taskFailedEventDetails={"resourceType": "sagemaker", "resource": "x", "error": "E", "cause": "no disk"}),
]


def test_the_newest_execution_is_shown_with_its_jobs_last_lines(capsys: Any):
    group = "/aws/sagemaker/TrainingJobs"
    session = Session(
        cloudformation=[stack(StateMachineArn=MACHINE)],
        stepfunctions=[
            listed(execution("older", 1), execution("newer", 2)),
            ("describe_execution", {**execution("newer", 2), "cause": "Train failed"}),
            ("get_execution_history", {"events": HISTORY}),
        ],
        logs=[
            ("describe_log_streams", {"logStreams": [{"logStreamName": "dogs-dev-1/algo-1"}]}),
            ("get_log_events", {"events": [{"message": "epoch=1"}, {"message": "No space left\n"}]}),
        ],
    )
    client.show_logs("dev", "", session)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["10:00:01  Train", "10:00:03    failed: E: no disk"]
    assert lines[3:6] == [f"== {group} dogs-dev-1/algo-1", "epoch=1", "No space left"]
    assert lines[-1] == "Execution newer: FAILED Train failed"
    for stub in session.stubs:
        stub.assert_no_pending_responses()


def test_a_job_without_a_log_is_named(capsys: Any):
    session = Session(
        cloudformation=[stack(StateMachineArn=MACHINE)],
        stepfunctions=[
            listed(execution("one", 1)),
            ("describe_execution", execution("one", 1)),
            ("get_execution_history", {"events": HISTORY}),
        ],
        logs=[("describe_log_streams", {"code": "ResourceNotFoundException", "message": "no group"})],
    )
    client.show_logs("dev", "one", session)
    assert "dogs-dev-1: no log" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "name", "said"),
    [([], "", "has never been started"), ([execution("one", 1)], "two", "RUN=two: .*The newest are one")],
)
def test_an_execution_that_is_not_there_is_refused(there: list[dict[str, Any]], name: str, said: str):
    session = Session(stepfunctions=[listed(*there)])
    with pytest.raises(ClientSideError, match=said):
        client.execution_of(MACHINE, name, session.client("stepfunctions"))


def test_without_a_region_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["make", "logs"])
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    with pytest.raises(SystemExit) as ended:
        client.main()
    assert ended.value.code == 1
    assert said.getvalue().startswith("error: no region is set: export AWS_REGION")
    assert said.getvalue().count("\n") == 1
