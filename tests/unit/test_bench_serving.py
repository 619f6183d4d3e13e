"""The load client of the serving benchmark counts what it sends, what is answered, and what is not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from serving_fakes import colour, serving, write_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import serving_load


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory):
    with serving(write_model(tmp_path_factory.mktemp("served"))) as address:
        yield int(address.rsplit(":", 1)[1])


@pytest.fixture
def requests(tmp_path: Path) -> list[bytes]:
    (tmp_path / "0.jpg").write_bytes(colour("red", "JPEG"))
    return serving_load.requests_of(tmp_path, "/invocations")


def test_clients_ask_again_as_soon_as_they_are_answered(port: int, requests: list[bytes]):
    seen = asyncio.run(serving_load.closed_loop(port, requests, 3, 0.5))
    found = serving_load.summary(seen, 0.5, 0.1)
    assert found["statuses"] == {"200": len(seen)}
    assert found["per_s"] == len(seen) / 0.5
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]


def test_a_pace_is_kept_and_what_is_late_counts_as_late(port: int, requests: list[bytes]):
    seen = asyncio.run(serving_load.open_loop(port, requests, 4, 1.0, 20))
    assert len(seen) == 20
    assert {status for status, _ in seen} == {200}


def test_a_server_that_is_gone_is_counted_as_broken(requests: list[bytes]):
    seen = asyncio.run(serving_load.closed_loop(1, requests, 2, 0.05))
    found = serving_load.summary(seen, 0.05, 0)
    assert set(found["statuses"]) == {"0"}
    assert found["p99_ms"] is None
