"""What is left of a run for people to read: the page of a run that failed, the live page, ``make report``, the notebook."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from local_cloud import emulator
from local_cloud.run import PROJECT

pytestmark = pytest.mark.pipeline

NOTEBOOK = PROJECT / "notebooks" / "explore_run.ipynb"


@pytest.fixture(scope="module")
def shell(deployed) -> dict[str, str]:
    """A shell with the account's credentials, as a person has one."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return names | {
        "AWS_ENDPOINT_URL": deployed.cloud.url,
        "AWS_REGION": emulator.REGION,
        "AWS_DEFAULT_REGION": emulator.REGION,
        "AWS_ACCESS_KEY_ID": emulator.ROOT_ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": emulator.ROOT_SECRET_ACCESS_KEY,
        "OMP_NUM_THREADS": "1",
    }


def stored(deployed: Any, key: str) -> str:
    bucket = deployed.outputs["DataBucket"]
    return str(deployed.cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read().decode())


def page_of(deployed: Any, name: str) -> str:
    """The live page, once it is made; it is final when the execution has ended."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        with urllib.request.urlopen(f"{deployed.cloud.url}/report/{name}", timeout=30) as answer:
            text = answer.read().decode()
        if "http-equiv=refresh" not in text[:1000]:
            return text
        time.sleep(0.5)
    raise AssertionError(f"no page within two minutes: {text}")


def test_a_run_that_failed_leaves_a_report_and_says_where(finished, deployed):
    before = deployed.denied()
    _, ended = deployed.execute({"tuning": {"batch_size": [8192]}})
    assert ended["status"] == "FAILED"
    assert ended["error"] == "CheckBatchSizeFailed"
    uri = f"s3://{deployed.outputs['DataBucket']}/runs/{ended['name']}/report/report.html"
    assert ended["cause"].endswith(f" Report: {uri}")
    assert ended["name"] in stored(deployed, f"runs/{ended['name']}/report/report.html")
    assert deployed.denied() == before, "the report's role suffices"


def test_the_rules_that_fired_are_a_part_of_the_output(finished):
    assert isinstance(finished.output["rules_fired"], list)
    assert all(isinstance(name, str) for name in finished.output["rules_fired"])


def test_the_live_page_of_a_run_that_has_ended_is_its_report(finished, deployed):
    text = page_of(deployed, finished.name)
    assert finished.name in text
    assert finished.output["dataset_hash"] in text


def test_make_report_makes_the_page_from_s3(finished, deployed, shell, tmp_path: Path):
    uri = f"s3://{deployed.outputs['DataBucket']}/runs/{finished.name}"
    words = [sys.executable, "-m", "local_cloud.report", "report", "--uri", uri, "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=PROJECT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1])
    assert page == tmp_path / "report.html"
    text = page.read_text()
    assert finished.output["dataset_hash"] in text
    # Nobody named the jobs: they are found by what they wrote.
    assert finished.output["tuning_job"] in text
    assert finished.output["best_hyperparameters"]["batch_size"] in text


def test_make_compare_shows_the_runs(finished, deployed, shell, tmp_path: Path):
    uri = f"s3://{deployed.outputs['DataBucket']}"
    words = [sys.executable, "-m", "local_cloud.report", "compare", "--uri", uri, "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=PROJECT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert finished.name in Path(done.stdout.splitlines()[-1]).read_text()


# ---- make predict and make logs -----------------------------------------------------------------------------------------


def asked(shell: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "local_cloud.client", *words, "--stage", "local"]
    done = subprocess.run(command, cwd=PROJECT, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_predict_finds_api_and_token_by_the_stage(finished, digits: Path, shell):
    picture = next(digits.rglob("*.png"))
    labels = [line.split()[1] for line in asked(shell, "predict", "--image", str(picture)).splitlines()]
    assert len(labels) >= 2
    assert set(labels) <= {folder.name for folder in picture.parent.parent.iterdir()}


def test_make_logs_shows_states_and_what_jobs_said(finished, shell):
    shown = asked(shell, "logs", "--run", finished.name)
    assert "  PrepareData" in shown
    assert "  Done" in shown
    assert f"/aws/sagemaker/TrainingJobs {finished.output['training_job']}/" in shown
    assert f"/aws/sagemaker/TrainingJobs {finished.output['tuning_job']}-" in shown
    assert "/aws/sagemaker/ProcessingJobs " in shown
    assert "epoch=" in shown
    assert "no log" not in shown
    assert shown.rstrip().endswith(f"Execution {finished.name}: SUCCEEDED")


# ---- The notebook -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed(finished, deployed, shell) -> list[Any]:
    """The notebook's code cells after a run from top to bottom."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    uri = f"s3://{deployed.outputs['DataBucket']}/runs/{finished.name}"
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PROJECT)}})
    client.execute(env={**shell, "RUN_URI": uri})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(cells: list[Any], word: str) -> Any:
    (found,) = [cell for cell in cells if word in cell.source]
    return found


def texts(cell: Any) -> str:
    parts = [output.get("text", "") or output.get("data", {}).get("text/html", "") for output in cell.outputs]
    return "\n".join(parts)


def plot(cell: Any) -> dict[str, Any]:
    (figure,) = [
        o["data"]["application/vnd.plotly.v1+json"] for o in cell.outputs if "plotly" in json.dumps(list(o.get("data", {})))
    ]
    return dict(figure)


def numbers(axis: Any) -> list[float]:
    """An axis of a plot: plotly stores arrays of numbers in base64."""
    if isinstance(axis, dict):
        return [float(value) for value in np.frombuffer(base64.b64decode(axis["bdata"]), dtype=axis["dtype"])]
    return [float(value) for value in axis]


def test_the_notebook_names_the_tensors(executed):
    said = texts(cell_with(executed, "create_trial(f"))
    assert int(said.split(" tensors")[0].split()[-1]) > 0
    assert "losses" in said


def test_the_notebook_plots_the_losses_of_train_and_valid(executed):
    figure = plot(cell_with(executed, "modes.EVAL"))
    losses = {trace["name"].split(":")[0]: numbers(trace["y"]) for trace in figure["data"]}
    assert set(losses) == {"train", "valid"}
    assert len(losses["train"]) > 1
    assert all(0 < loss < 100 for line in losses.values() for loss in line)
    assert all(numbers(trace["x"]) == sorted(numbers(trace["x"])) for trace in figure["data"])
    assert figure["layout"]["xaxis"]["title"]["text"]


def test_the_notebook_plots_the_cores(executed):
    figure = plot(cell_with(executed, "S3SystemMetricsReader(f"))
    assert len(figure["data"]) == os.cpu_count()
    for trace in figure["data"]:
        assert len(numbers(trace["x"])) > 5
        assert all(0 <= percent <= 100 for percent in numbers(trace["y"]))
        assert max(numbers(trace["y"])) > 0


def test_the_notebook_shows_the_profilers_report_inline(executed):
    said = texts(cell_with(executed, "srcdoc"))
    assert "<iframe srcdoc=" in said
    assert "LowGPUUtilization" in said


def test_the_notebook_shows_the_rules_and_runs_one_of_its_own(executed):
    assert "LowGPUUtilization" in texts(cell_with(executed, "RuleTriggered"))
    said = texts(cell_with(executed, "invoke_rule(rule"))
    assert "lowest loss" in said
    assert " in 0 saved steps" not in said
