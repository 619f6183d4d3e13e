"""docs/faults.md: what was injected, how often, and what came of it, written from a run of the tests marked ``fault(row)``.

``--write-faults`` writes the rows whose tests ran; the others keep their line and its date, so that one row can be run alone.

A test takes the fixture ``landed`` and calls it once for each injection, after it has seen that the fault was really there. A test
of a fault that counts none has proven nothing and fails.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from xdist import is_xdist_worker

PAGE = Path(__file__).resolve().parent.parent / "docs" / "faults.md"

ROWS = {
    1: ("`kill -9` of a training process, anywhere", "the resumed run ends with the same weights, bit for bit"),
    2: (
        "kill while a checkpoint, shard, manifest, model artifact or `champion.json` is written",
        "the last complete one is used; no partial file is read",
    ),
    3: ("kill of the local cloud at a state boundary, then another run", "same end state; no orphan process, port or folder"),
    4: (
        "an API call of the machine, a Lambda or a job fails once: throttling, 500, lost answer, no quota, no permission",
        "recovery, or clean-up with a message that names the cause; the old endpoint answers throughout",
    ),
    5: ("disk full in preparation, checkpoint, artifact, report", "exit code 1, the reason said, the last good output intact"),
    6: (
        "corrupt pictures, a missing split, trials that all fail, a loss that is NaN",
        "exact list of what was refused; above the cap the run ends before training; the reason reaches the user",
    ),
    7: (
        "model artifact corrupt, cut off, swapped, or with a pickle that holds code",
        "refused; the old model serves; nothing is run",
    ),
    8: ("hostile archives", "nothing outside the target; limits hold; the message names the entry"),
    9: ("data set addresses that lead inside, redirects, rebinding, slow and endless bodies", "refused or cut off; no connection"),
    10: (
        "API: tokens, headers, bodies, sockets, methods and paths of an attacker",
        "documented answers only; others are served meanwhile; sockets closed in 15 s",
    ),
    11: ("the endpoint is in motion or broken when a deployment comes", "a branch with a deadline; never two updates at once"),
    12: (
        "spot interruption, no capacity, a job stopped by hand, an aborted execution, a time limit",
        "as designed; stopped jobs are stopped; the state names what happened",
    ),
    13: ("two executions at once; one aborted while the other deploys", "one complete endpoint configuration, always"),
    14: ("a canary in file name, EXIF, pixels and token", "found in no log, metric, trace, error or report"),
    15: ("clocks that jump, a slow S3, events out of order", "no wrong success; deadlines by monotonic time"),
}
"""Number of a row -> (what is injected, what must hold)."""

Landed = Callable[..., None]
_COUNTS = pytest.StashKey[list[int]]()
_FAULT = "fault"
_outcomes: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-faults", action="store_true", help="write the rows of docs/faults.md whose tests ran")


@pytest.fixture
def landed(request: pytest.FixtureRequest) -> Landed:
    """Counts injections of the test's row: call it once a fault was seen to be there."""
    counts: list[int] = []
    request.node.stash[_COUNTS] = counts
    return lambda number=1: counts.append(number)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report: Any = yield
    mark = item.get_closest_marker("fault")
    if mark is not None:
        injections = sum(item.stash.get(_COUNTS, []))
        if report.when == "call" and report.outcome == "passed" and not injections:
            report.outcome, report.longrepr = "failed", "the fault never landed: this test has proven nothing"
        # A property of the report reaches the process that writes the page, whichever ran the test.
        report.user_properties.append((_FAULT, {"row": mark.args[0], "injections": injections}))
    return report  # type: ignore[no-any-return]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    fault: Any = dict(report.user_properties).get(_FAULT)
    if fault is not None:
        seen = _outcomes.setdefault(report.nodeid, {"seconds": 0.0, "result": "passed"})
        # Fixtures take their time too: a cloud that is started for a row belongs to it.
        seen.update(fault, seconds=seen["seconds"] + report.duration)
        if report.outcome != "passed":
            seen["result"] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write-faults") and not is_xdist_worker(session):
        PAGE.write_text(page(list(_outcomes.values()), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(outcomes: list[dict[str, Any]], written: str) -> str:
    """The page, from what was counted and, for rows that did not run, from the page as it is ``written``."""
    lines = [
        "# Faults",
        "",
        "Made by `make faults`, which runs the tests in `tests/faults/`; each fault is seen to land before it is counted. What the",
        "rows prove in the threat model: [security.md](security.md). Those of a minute and more run in `make test-all` only.",
        "",
        "| # | injected | must hold | injections | tests | result | seconds | on |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(number, outcomes) or _kept(rf"\| {number} \|.*", written) for number in ROWS),
    ]
    counts = {kind: sum(one["injections"] for one in outcomes if one["row"] == kind) for kind in ("pictures", "inputs")}
    told = " and ".join(f"{count:,} {kind}" for kind, count in counts.items())
    fuzzed = (
        f"Fuzzed beside these: {told} of the state machine." if all(counts.values()) else _kept("Fuzzed beside these.*", written)
    )
    return "\n".join([*lines, "", fuzzed]) + "\n"


def _line(number: int, outcomes: list[dict[str, Any]]) -> str:
    """A row of the table; nothing where none of its tests ran."""
    mine = [one for one in outcomes if one["row"] == number]
    if not mine:
        return ""
    results = Counter(one["result"] for one in mine)
    result = "passed" if set(results) == {"passed"} else ", ".join(f"{count} {name}" for name, count in results.items())
    injections, seconds = sum(one["injections"] for one in mine), sum(one["seconds"] for one in mine)
    on = f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}"
    return f"| {number} | {' | '.join(ROWS[number])} | {injections:,} | {len(mine)} | {result} | {seconds:,.0f} | {on} |"


def _kept(pattern: str, written: str) -> str:
    found = re.search(f"^{pattern}$", written, re.MULTILINE)
    return found.group() if found else ""
