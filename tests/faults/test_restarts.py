"""Row 3: the local cloud, or what started it, is killed when a state begins. Nothing is left, and another run ends as ever."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deployment import OVERRIDE, TWO_TRIALS
from fault_table import Landed

from local_cloud.run import PROJECT

STATES = [
    "PrepareData", "ReadPrepared", "Tune", "Train", "Evaluate", "ReadEvaluation", "Report", "FindServerImage", "BuildServer",
    "Register", "CreateModel", "CreateEndpointConfig", "FindEndpoint", "CreateEndpoint", "CheckEndpoint", "SmokeTest",
    "WriteChampion", "TidyUp", "Publish",
]  # fmt: skip
"""States of a run that do something, in their order."""
SAMPLE = int(os.environ.get("RESTARTS", "6"))
"""How many of them a run of the tests takes; a kill at each (RESTARTS=19) takes half an hour."""
MAX_RUN_S = 900
"""A run that nobody disturbs takes two minutes, on a slow machine ten."""
pytestmark = [pytest.mark.fault(3), pytest.mark.pipeline, pytest.mark.slow, pytest.mark.timeout((SAMPLE + 2) * MAX_RUN_S)]


class Run:
    """``make run EXIT=1`` with a folder of its own for everything temporary."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        folder.mkdir(exist_ok=True)
        self.out = folder.with_suffix(".out")
        environment = {**os.environ, "TMPDIR": str(folder)}
        environment.pop("AWS_ENDPOINT_URL", None)
        override = {**OVERRIDE, "input": {**OVERRIDE["input"], **TWO_TRIALS}}
        command = [sys.executable, "-m", "local_cloud.run", "--exit", "--port", str(port), "--override", json.dumps(override)]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=out, stderr=out)

    def reaches(self, state: str) -> None:
        deadline = time.monotonic() + MAX_RUN_S
        while f"▸ {state}\n" not in self.out.read_text():
            assert self.process.poll() is None, self.out.read_text()[-2000:]
            assert time.monotonic() < deadline, f"{state} was not reached"
            time.sleep(0.02)

    def cloud(self) -> psutil.Process:
        (found,) = [one for one in psutil.Process(self.process.pid).children() if "local_cloud.cloud" in one.cmdline()]
        return found

    def processes(self) -> list[str]:
        """Everything that belongs to the run: told by its folder in command line or environment."""
        return [f"{one.pid} {' '.join(one.cmdline())[:200]}" for one in psutil.process_iter() if self._mine(one)]

    def _mine(self, one: psutil.Process) -> bool:
        try:
            words = [*one.cmdline(), one.environ().get("TMPDIR", ""), one.environ().get("SAGEMAKER_BASE_DIR", "")]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False
        return one.pid != self.process.pid and any(str(self.folder) in word for word in words)

    def left(self) -> list[str]:
        """Processes, files and the port, once they have had time to go."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = [*self.processes(), *(str(path) for path in self.folder.iterdir()), *self._port()]
            if not found:
                return []
            time.sleep(0.2)
        return found

    def _port(self) -> Iterator[str]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError:
                yield f"port {self.port}"


def ended_well(run: Run) -> dict[str, object]:
    """The last line of a run that nobody disturbed."""
    assert run.process.wait(MAX_RUN_S) == 0, run.out.read_text()[-3000:]
    return dict(json.loads(run.out.read_text().strip().splitlines()[-1]))


def test_a_kill_at_a_state_leaves_nothing_and_another_run_ends_as_ever(tmp_path: Path, own_port: int, landed: Landed):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    chance = random.Random(seed)
    whole = Run(tmp_path / "whole", own_port)
    expected = ended_well(whole)
    assert whole.left() == []
    for number, state in enumerate(chance.sample(STATES, SAMPLE)):
        run = Run(tmp_path / f"{number}-{state}", own_port)
        run.reaches(state)
        victim = run.cloud() if number % 2 == 0 else psutil.Process(run.process.pid)
        cloud = run.cloud()
        victim.kill()
        landed()
        code = run.process.wait(90)
        print(f"{state}: {'the cloud' if number % 2 == 0 else 'the launcher'} was killed; exit {code}")
        assert code == (1 if number % 2 == 0 else -signal.SIGKILL), run.out.read_text()[-2000:]
        if number % 2 == 0:
            assert "Traceback" not in run.out.read_text()
            assert "error: " in run.out.read_text()
        psutil.wait_procs([cloud], timeout=20)
        assert run.left() == [] or number % 2 == 1, run.left()
        if number % 2 == 1:
            # Nobody was left to remove the launcher's own folder; the cloud has removed its own, which is the large one.
            assert run.processes() == []
            assert not list(run.folder.rglob("cloud/*"))
    again = Run(tmp_path / "again", own_port)
    result = ended_well(again)
    assert again.left() == []
    # The search draws other learning rates each time, so two runs need not choose the same hyperparameters.
    assert result["prediction"] == result["expected"]
    assert float(str(result["test_top1"])) >= OVERRIDE["input"]["quality_gate"]["min_top1"]  # type: ignore[index]
    assert set(result["seconds"]) == set(expected["seconds"]), "other states ran"  # type: ignore[call-overload]
