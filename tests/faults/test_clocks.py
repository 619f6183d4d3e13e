"""Row 15: clocks that jump, a slow S3, events out of order. No wrong success; deadlines by monotonic time."""

from __future__ import annotations

import ast
import datetime
import itertools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from classifier import checkpoint, exchange
from classifier.errors import DataError
from classifier.exchange import Hosts
from deployment import LONGER, TWO_TRIALS, Rules
from fault_table import Landed

pytestmark = pytest.mark.fault(15)

PROJECT = Path(__file__).resolve().parents[2]


def _jump(monkeypatch: pytest.MonkeyPatch, by_s: float) -> list[float]:
    """The wall clock goes wrong by so much at every look; returns the looks."""
    looks: list[float] = []
    real = time.time

    def wrong() -> float:
        looks.append(real() + by_s * (len(looks) + 1))
        return looks[-1]

    monkeypatch.setattr(time, "time", wrong)
    return looks


JUMPS = [-86_400.0, -3600.0, 3600.0, 86_400.0, 4e9]


@pytest.mark.parametrize("by_s", JUMPS)
def test_the_next_checkpoint_is_due_by_a_clock_that_does_not_jump(monkeypatch: pytest.MonkeyPatch, landed: Landed, by_s: float):
    _jump(monkeypatch, by_s)
    assert abs(time.time() - datetime.datetime.now(datetime.UTC).timestamp()) > 60 * 30
    landed()
    clock = checkpoint.Clock(1.0)
    assert not clock.due()
    time.sleep(1.0)
    assert clock.due()
    clock.reset()
    assert not clock.due()


@pytest.mark.parametrize("by_s", JUMPS)
def test_instances_wait_for_each_other_by_a_clock_that_does_not_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landed: Landed, by_s: float
):
    _jump(monkeypatch, by_s)
    assert abs(time.time() - datetime.datetime.now(datetime.UTC).timestamp()) > 60 * 30
    landed()
    first, second = (Hosts(["a", "b"], mine, (tmp_path / "meeting").as_uri(), 30.0) for mine in (0, 1))
    threading.Timer(0.5, lambda: second.tell_text("done", "x")).start()
    heard: list[str] = []
    first.collect("done", tmp_path, lambda host, _: heard.append(host))
    assert heard == ["b"]
    late = Hosts(["a", "b"], 0, (tmp_path / "empty").as_uri(), 0.5)
    started = time.monotonic()
    with pytest.raises(DataError, match="nothing was heard of instance b"):
        late.collect("done", tmp_path, lambda *_: None)
    assert 0.5 <= time.monotonic() - started < 3


def test_no_deadline_of_jobs_and_lambdas_goes_by_the_wall_clock(landed: Landed):
    """A deadline is a sum or a comparison; stamps for people are neither."""
    wrong = []
    for path in [*PROJECT.glob("model_code/**/*.py"), *PROJECT.glob("lambdas/**/*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare | ast.BinOp) and isinstance(getattr(node, "op", ast.Add()), ast.Add):
                calls = [part for part in ast.walk(node) if isinstance(part, ast.Call) and ast.unparse(part.func) == "time.time"]
                if calls:
                    wrong.append(f"{path.relative_to(PROJECT)}:{node.lineno}: {ast.unparse(node)}")
        landed()
    assert wrong == []


@pytest.mark.parametrize("by_s", JUMPS)
def test_the_smoke_test_ends_by_a_clock_that_does_not_jump(monkeypatch: pytest.MonkeyPatch, landed: Landed, by_s: float):
    sys.path.insert(0, str(PROJECT / "lambdas" / "deploy"))
    import smoke_test

    _jump(monkeypatch, by_s)
    assert abs(time.time() - datetime.datetime.now(datetime.UTC).timestamp()) > 60 * 30
    landed()
    monkeypatch.setattr(smoke_test, "PAUSE_S", 0.1)
    monkeypatch.setenv("API_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("AUTH", "token")
    monkeypatch.setattr(smoke_test, "_token", lambda: "t")
    started = time.monotonic()
    with pytest.raises(smoke_test.SmokeTestError, match="of trying"):
        smoke_test.ask("0.png", b"x", time.monotonic() + 0.6)
    assert 0.4 <= time.monotonic() - started < 5


# --- events ----------------------------------------------------------------------------------------------------------------


class Scheduler:
    """EventBridge Scheduler's two calls."""

    def __init__(self) -> None:
        self.expression = ""

    def update_schedule(self, **appointment: Any) -> None:
        from botocore.exceptions import ClientError

        if not self.expression:
            raise ClientError({"Error": {"Code": "ResourceNotFoundException", "Message": "x"}}, "UpdateSchedule")
        self.expression = appointment["ScheduleExpression"]

    def create_schedule(self, **appointment: Any) -> None:
        self.expression = appointment["ScheduleExpression"]


def test_events_in_any_order_and_twice_give_one_appointment_after_the_last(monkeypatch: pytest.MonkeyPatch, landed: Landed):
    """What counts is when an event is handled, not what it says of its own time."""
    sys.path.insert(0, str(PROJECT / "lambdas" / "deploy"))
    import incoming

    for name in ("SCHEDULE_GROUP", "STATE_MACHINE_ARN", "SCHEDULE_ROLE_ARN"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("QUIET_S", "600")
    events = [{"time": f"2026-01-01T00:0{n}:00Z", "detail": {"object": {"key": f"incoming/{n}.zip"}}} for n in range(4)]
    for order in itertools.permutations([*events, events[0]], 5):
        scheduler = Scheduler()
        monkeypatch.setattr(incoming.boto3, "client", lambda _, made=scheduler: made)
        for event in order:
            before = datetime.datetime.now(datetime.UTC)
            incoming.handle(event, None)
        when = datetime.datetime.strptime(scheduler.expression, "at(%Y-%m-%dT%H:%M:%S)").replace(tzinfo=datetime.UTC)
        assert when >= before.replace(microsecond=0) + datetime.timedelta(seconds=600)
        landed()


def test_an_older_hosts_word_is_not_taken_for_this_jobs(tmp_path: Path, landed: Landed):
    """The folder in which instances meet belongs to one job: a late file of another is never looked at."""
    other = Hosts(["a", "b"], 1, (tmp_path / "job-1").as_uri(), 1.0)
    other.tell_text("done", "old")
    mine = Hosts(["a", "b"], 0, (tmp_path / "job-2").as_uri(), 0.3)
    with pytest.raises(DataError, match="nothing was heard"):
        mine.collect("done", tmp_path, lambda *_: None)
    assert exchange.POLL_S > 0
    landed()


# --- a slow S3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.pipeline
@pytest.mark.slow
def test_a_run_on_a_slow_s3_ends_well(finished, deployed, landed: Landed):
    """Two seconds for every call of the machine, the jobs and the Lambdas."""
    rules = Rules(deployed.cloud.root)
    before = rules.obeyed()
    rules.set({"call": "^s3:", "delay_s": 2, "times": 100_000})
    try:
        _, ended = deployed.execute({**LONGER, **TWO_TRIALS})
    finally:
        rules.set()
    landed(rules.obeyed() - before)
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    assert json.loads(ended["output"])["dataset_hash"] == finished.output["dataset_hash"]
