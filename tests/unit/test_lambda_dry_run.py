"""``{"dry_run": true}`` and new data: what the two Lambdas ask of AWS, and what they say."""

from __future__ import annotations

import datetime
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lambdas" / "deploy"))

import dry_run  # noqa: E402
import incoming  # noqa: E402

REGISTRY = "763104351884.dkr.ecr.us-east-1.amazonaws.com"
IMAGE = f"{REGISTRY}/pytorch:2.13-cpu-amzn2023-sagemaker"
BUILT = "111122223333.dkr.ecr.us-east-1.amazonaws.com/dogs-dev-server:tag"
TRAINING = "ml.m5.xlarge for training job usage"


def refusal(code: str, operation: str = "Call") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, operation)


class Aws:
    """The services that are asked."""

    def __init__(self) -> None:
        self.quotas = {TRAINING: 4.0, "other": 1.0}
        self.keys = ["incoming/dogs/a.jpg", "pretrained/w.pth"]
        self.images = {("763104351884", "pytorch"): ["2.13-cpu-amzn2023-sagemaker"], ("111122223333", "dogs-dev-server"): []}
        self.denied = False

    def client(self, name: str, **_: Any) -> Aws:
        return self

    def get_paginator(self, name: str) -> Aws:
        assert name == "list_service_quotas"
        return self

    def paginate(self, ServiceCode: str) -> list[dict[str, Any]]:  # noqa: N803 - AWS's name
        assert ServiceCode == "sagemaker"
        return [{"Quotas": [{"QuotaName": name, "Value": value}]} for name, value in self.quotas.items()]

    def list_objects_v2(self, **given: Any) -> dict[str, Any]:
        if self.denied:
            raise refusal("AccessDenied")
        return {"KeyCount": len([key for key in self.keys if key.startswith(given["Prefix"])][: given["MaxKeys"]])}

    def batch_get_image(self, **given: Any) -> dict[str, Any]:
        known = self.images.get((given["registryId"], given["repositoryName"]))
        if known is None:
            raise refusal("RepositoryNotFoundException")
        return {"images": [one for one in given["imageIds"] if set(one.values()) & set(known)]}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Aws:
    made = Aws()
    monkeypatch.setattr(boto3, "client", made.client)
    machines = [{"quota": TRAINING, "count": 1, "per_trial": True}, {"quota": TRAINING, "count": 1}]
    for name, value in {
        "MACHINES": json.dumps(machines),
        "IMAGES": json.dumps([IMAGE, BUILT]),
        "BUILT_IMAGE": BUILT,
        "ALLOWED_HOSTS": "pictures.example",
    }.items():
        monkeypatch.setenv(name, value)
    return made


def ask(source: str = "s3://b/incoming/dogs/", weights: str = "", parallel: str = "2") -> dict[str, str]:
    answer = dry_run.handle({"source": source, "weights": weights, "parallel": parallel}, None)
    return {one["check"]: one["found"] for one in answer["checks"]}


def test_all_is_well(aws: Aws):
    found = ask(weights="s3://b/pretrained/w.pth")
    assert found == {
        TRAINING: "4, 2 needed",
        "source": "s3://b/incoming/dogs/ can be read",
        "pretrained": "s3://b/pretrained/w.pth can be read",
        "image pytorch:2.13-cpu-amzn2023-sagemaker": "is there",
        "image dogs-dev-server:tag": "is not built yet; the execution builds it in about five minutes",
    }


def test_nothing_is_read_where_there_is_nothing_to_read(aws: Aws):
    assert "source" not in ask(source="")


def test_trials_at_once_count(aws: Aws):
    with pytest.raises(dry_run.DryRunError, match=rf"{TRAINING}: 4; expected at least 5: ask for more under Service Quotas"):
        ask(parallel="5")


def test_a_quota_that_aws_does_not_list_is_no_failure(aws: Aws):
    aws.quotas = {}
    assert "its default applies" in ask()[TRAINING]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://b/incoming/cats/", "nothing lies under s3://b/incoming/cats/; upload"),
        ("https://elsewhere.example/x.zip", "is on no allowed host; add the host to allowed_hosts"),
        ("http://pictures.example/x.zip", "is on no allowed host"),
        ("file:///etc/passwd", "is on no allowed host"),
    ],
)
def test_data_that_cannot_be_read(aws: Aws, source: str, said: str):
    with pytest.raises(dry_run.DryRunError, match=said):
        ask(source=source)


def test_every_bad_answer_is_told_at_once(aws: Aws):
    aws.denied = True
    aws.images = {}
    with pytest.raises(dry_run.DryRunError) as refused:
        ask(weights="s3://b/pretrained/w.pth")
    for said in ("source: s3://b/incoming/dogs/ answers AccessDenied", "pretrained: ", "RepositoryNotFoundException"):
        assert said in str(refused.value)


def test_an_image_of_somebody_elses_that_is_missing(aws: Aws, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUILT_IMAGE", "another")
    with pytest.raises(dry_run.DryRunError, match="dogs-dev-server:tag does not exist; correct serving_image_uri"):
        ask()


def test_an_image_may_be_named_by_its_digest(aws: Aws):
    digest = "sha256:" + 64 * "a"
    aws.images["111122223333", "team/own"] = [digest]
    registry = "111122223333.dkr.ecr.us-east-1.amazonaws.com"
    assert dry_run.available(f"{registry}/team/own@{digest}") == ("is there", "")
    assert "does not exist" in dry_run.available(f"{registry}/team/own@sha256:{64 * 'b'}")[0]


class Web(BaseHTTPRequestHandler):
    """A host with one archive, and a redirect to somewhere else."""

    def do_HEAD(self) -> None:
        status = {"/x.zip": 200, "/moved.zip": 302}.get(self.path, 404)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://169.254.169.254/latest/")
        self.send_header("Content-Length", "1234")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("path", "said"), [("/x.zip", "answers 200, 1234 bytes"), ("/moved.zip", "answers 302"), ("/gone.zip", "answers 404")]
)
def test_an_archive_is_asked_for_with_head_and_no_redirect_is_followed(
    aws: Aws, monkeypatch: pytest.MonkeyPatch, path: str, said: str
):
    server = HTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = dry_run.urllib.request.Request
    # TLS ends elsewhere; everything behind the address is the real thing.
    monkeypatch.setattr(
        dry_run.urllib.request,
        "Request",
        lambda url, **given: real(url.replace("https://pictures.example", f"http://127.0.0.1:{server.server_port}"), **given),
    )
    try:
        found, problem = dry_run.readable(f"https://pictures.example{path}")
    finally:
        server.shutdown()
        server.server_close()
    assert said in found
    assert bool(problem) == (path != "/x.zip")


def test_a_host_that_does_not_answer(aws: Aws, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALLOWED_HOSTS", "host.invalid")
    assert "cannot be reached" in dry_run.readable("https://host.invalid/x.zip")[0]


# --- new data --------------------------------------------------------------------------------------------------------------


class Scheduler:
    """EventBridge Scheduler with one group."""

    def __init__(self, refuse: str = "") -> None:
        self.schedules: dict[str, dict[str, Any]] = {}
        self.refuse = refuse
        self.created = 0

    def update_schedule(self, **given: Any) -> None:
        if given["Name"] not in self.schedules:
            raise refusal(self.refuse or "ResourceNotFoundException")
        self.schedules[given["Name"]] = given

    def create_schedule(self, **given: Any) -> None:
        if given["Name"] in self.schedules or self.refuse == "ConflictException":
            raise refusal("ConflictException")
        self.created += 1
        self.schedules[given["Name"]] = given


@pytest.fixture
def appointment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SCHEDULE_GROUP": "dogs-dev",
        "SCHEDULE_ROLE_ARN": "arn:aws:iam::111122223333:role/r",
        "STATE_MACHINE_ARN": "arn:aws:states:us-east-1:111122223333:stateMachine:dogs-dev",
        "QUIET_S": "900",
    }.items():
        monkeypatch.setenv(name, value)


def test_many_files_make_one_appointment_after_the_last(appointment: None):
    scheduler = Scheduler()
    start = datetime.datetime(2026, 11, 27, 3, 0, tzinfo=datetime.UTC)
    for minute in range(200):
        incoming.push(scheduler, start + datetime.timedelta(minutes=minute))
    assert scheduler.created == 1
    (made,) = scheduler.schedules.values()
    assert made["ScheduleExpression"] == "at(2026-11-27T06:19:00)"
    assert made["ActionAfterCompletion"] == "DELETE"
    assert made["Target"]["Input"] == "{}"


def test_the_appointment_is_what_scheduler_accepts(appointment: None):
    from local_cloud.validation import problems, service_model

    scheduler = Scheduler()
    incoming.push(scheduler, datetime.datetime.now(datetime.UTC))
    for operation in ("CreateSchedule", "UpdateSchedule"):
        assert problems(service_model("scheduler").operation_model(operation), scheduler.schedules["incoming"]) == []


def test_two_first_files_at_the_same_moment(appointment: None):
    scheduler = Scheduler(refuse="")
    scheduler.update_schedule = lambda **_: (_ for _ in ()).throw(refusal("ResourceNotFoundException"))  # type: ignore[method-assign]
    scheduler.schedules["incoming"] = {}
    incoming.push(scheduler, datetime.datetime.now(datetime.UTC))


def test_other_errors_are_not_hidden(appointment: None):
    with pytest.raises(ClientError, match="AccessDenied"):
        incoming.push(Scheduler(refuse="AccessDenied"), datetime.datetime.now(datetime.UTC))


def test_the_handler_names_the_time(appointment: None, monkeypatch: pytest.MonkeyPatch):
    scheduler = Scheduler()
    monkeypatch.setattr(boto3, "client", lambda name: scheduler)
    assert incoming.handle({}, None)["starts"].endswith("Z")
    assert scheduler.created == 1
