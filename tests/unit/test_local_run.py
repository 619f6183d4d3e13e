"""``make run`` before anything is started: what it makes of its arguments, and how it refuses them."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from local_cloud import run
from local_cloud.source import Source

PROJECT = run.PROJECT
PETS = Source("dev", None, "incoming/pets.zip")
DIGITS = Source("local", None, None)


def arguments(**given: str) -> argparse.Namespace:
    return argparse.Namespace(**{"input": "{}", "backbone": "", **given})


# ---- The port ---------------------------------------------------------------------------------------------------------


def test_a_busy_port_is_named_with_a_remedy() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(run.RunError, match=rf"^port {port} is in use .*choose another: make run PORT=4600$"):
            run._check_port(port)


def test_a_port_is_free_again_after_its_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            served, _ = listener.accept()
            served.close()  # the server ends first: its side of the connection lingers in TIME_WAIT
    run._check_port(port)


# ---- The machine's input ----------------------------------------------------------------------------------------------


def test_the_digits_start_the_machine_with_its_defaults() -> None:
    assert run._machine_input(arguments(), DIGITS, None) == {}


def test_data_is_the_source_and_backbone_is_passed_on() -> None:
    made = run._machine_input(arguments(backbone="resnet18"), PETS, None)
    assert made == {"source": "incoming/pets.zip", "backbone": "resnet18"}


def test_weights_choose_the_head_recipe() -> None:
    made = run._machine_input(arguments(backbone="resnet18"), PETS, Path("/x/w.pth"))
    assert made == {
        "source": "incoming/pets.zip",
        "pretrained": "incoming/weights/w.pth",
        "backbone": "resnet18",
        "recipe": "head",
        "image_size": 224,
    }


def test_input_wins_over_data_and_weights() -> None:
    given = '{"source": "incoming/others.zip", "recipe": "finetune", "tuning": {"max_jobs": 2}}'
    made = run._machine_input(arguments(input=given, backbone="resnet18"), PETS, Path("/x/w.pth"))
    assert made["source"] == "incoming/others.zip"
    assert made["recipe"] == "finetune"
    assert made["tuning"] == {"max_jobs": 2}
    assert made["pretrained"] == "incoming/weights/w.pth"


@pytest.mark.parametrize("text", ["{", "max_jobs=2", "{'a': 1}"])
def test_input_that_is_not_json(text: str) -> None:
    with pytest.raises(run.RunError) as raised:
        run._machine_input(arguments(input=text), DIGITS, None)
    assert str(raised.value).startswith(f"INPUT={text}: not JSON (")
    assert """Example: INPUT='{"tuning": {"max_jobs": 2}}'""" in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "3", '"head"', "null"])
def test_input_that_is_no_object(text: str) -> None:
    with pytest.raises(run.RunError) as raised:
        run._machine_input(arguments(input=text), DIGITS, None)
    assert str(raised.value) == f"""INPUT={text}: expected a JSON object, e.g. '{{"recipe": "head"}}'"""


# ---- As a user meets it -----------------------------------------------------------------------------------------------


def command(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_cloud.run", *words],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_refusal_is_one_line_and_exit_code_1(tmp_path: Path, free_port: int) -> None:
    weights = tmp_path / "torn.pth"
    weights.write_bytes(b"torn")
    port = ("--port", str(free_port))
    cases = {
        ("--data", "/nonexistent"): "error: DATA=/nonexistent: no such file or folder. Give",
        ("--data", "dogs", "--input", "[]"): "error: INPUT=[]: expected a JSON object",
        ("--data", "dogs", "--weights", "/no.pth"): "error: WEIGHTS=/no.pth: no such file. Give",
    }
    for words, message in cases.items():
        ended = command(tmp_path, *words, *port)
        assert ended.returncode == 1, ended.stdout + ended.stderr
        said = (ended.stdout + ended.stderr).strip()
        assert said.startswith(message)
        assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == [weights.name], "the scratch folder was left"


def test_weights_that_cannot_be_read_are_named(tmp_path: Path, free_port: int) -> None:
    weights = tmp_path / "torn.pth"
    weights.write_bytes(b"torn")
    ended = command(tmp_path, "--data", "dogs", "--weights", str(weights), "--port", str(free_port))
    assert ended.returncode == 1
    said = (ended.stdout + ended.stderr).strip()
    assert said.startswith(f"error: WEIGHTS={weights}: ")
    assert said.endswith("Name the architecture with BACKBONE=<torchvision model>")
    assert "Traceback" not in said


def test_a_busy_port_ends_the_command(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        ended = command(tmp_path, "--data", "dogs", "--port", str(busy.getsockname()[1]))
    assert ended.returncode == 1
    assert (ended.stdout + ended.stderr).strip().startswith(f"error: port {busy_port(ended)} is in use")


def busy_port(ended: subprocess.CompletedProcess[str]) -> str:
    return (ended.stdout + ended.stderr).split("port ", 1)[1].split()[0]


# ---- A run that failed ------------------------------------------------------------------------------------------------


def test_a_failed_run_points_to_its_report_where_there_is_one(tmp_path: Path) -> None:
    ended = {"name": "run-1", "status": "FAILED", "cause": "no space"}
    assert run._failure_message(ended, tmp_path) == f"the execution run-1 failed: no space\nWhat is known of it: {tmp_path}"
    page = tmp_path / "report" / "report.html"
    page.parent.mkdir()
    page.write_text("")
    assert run._failure_message(ended, tmp_path).endswith(f"What is known of it: {page}")
