"""``make report`` and ``make compare``: what they make of their arguments, and how they refuse them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from local_fakes import BUCKET, FakeCloud, moto_cloud

from local_cloud import report
from local_cloud.report import ReportError, Run

RUN = f"s3://{BUCKET}/runs/run-1"


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[FakeCloud]:
    with moto_cloud(tmp_path) as made:
        yield made


def refusal(uri: str, s3: object) -> str:
    with pytest.raises(ReportError) as raised:
        report.report(uri, "", s3)
    return str(raised.value)


@pytest.mark.parametrize(
    "uri", ["", "run-1", "s3://data", "s3://data/run-1", "s3://data/runs/", "s3://data/runs/a/report/report.html", "s3://A/runs/x"]
)
def test_anything_but_a_runs_folder_is_refused_with_an_example(uri: str) -> None:
    said = refusal(uri, None)
    assert said.startswith(f"RUN={uri}: expected s3://<bucket>/runs/<execution>")
    assert "make report RUN=s3://" in said


def test_a_run_that_is_not_there_is_refused_with_those_that_are(cloud: FakeCloud) -> None:
    cloud.put("runs/run-0/prepare/result.json", "{}")
    said = refusal(RUN, cloud.client("s3"))
    assert "holds nothing under runs/run-1/" in said
    assert said.endswith("These are there: run-0")


def test_a_bucket_that_is_not_there_is_named(cloud: FakeCloud) -> None:
    assert refusal("s3://nowhere/runs/run-1", cloud.client("s3")).startswith("there is no bucket nowhere: ")


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [(NoCredentialsError(), "aws configure"), (EndpointConnectionError(endpoint_url="http://x"), "AWS_ENDPOINT_URL")],
)
def test_no_credentials_and_no_network_say_what_to_do(problem: Exception, remedy: str) -> None:
    class Broken:
        def list_objects_v2(self, **_: object) -> None:
            raise problem

    assert remedy in refusal(RUN, Broken())


def test_without_credentials_the_command_ends_with_one_line(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    words = [sys.executable, "-m", "local_cloud.report", "report", "--uri", RUN]
    done = subprocess.run(words, cwd=report.PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no AWS credentials were found")
    assert "Traceback" not in done.stderr


def test_the_names_of_the_jobs_are_those_that_wrote_the_runs_files(cloud: FakeCloud) -> None:
    for number in (1, 2):
        cloud.put(f"runs/run-1/tuning/dogs-dev-0123456789abcdef-00{number}-1234abcd/output/model.tar.gz", "x")
    cloud.put("runs/run-1/training/dogs-dev-train-0123456789abcdef/output/model.tar.gz", "x")
    found = report.find(f"{RUN}/", cloud.client("s3"))
    assert found == Run(RUN, tuning_job="dogs-dev-0123456789abcdef", training_job="dogs-dev-train-0123456789abcdef")


def test_a_run_that_had_only_begun_is_a_run(cloud: FakeCloud) -> None:
    cloud.put("runs/run-1/prepare/result.json", "{}")
    assert report.find(RUN, cloud.client("s3")) == Run(RUN, "none", "none")


def test_the_script_is_told_all_that_is_known(tmp_path: Path) -> None:
    run = Run(RUN, "t", "train", ("p", "e"))
    words = report.command(run, tmp_path, tmp_path / "run", live=True, outcome="Train failed:\n no space")
    given = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    assert given["run"] == "run-1"
    assert given["run_uri"] == RUN
    assert given["processing_jobs"] == "p,e"
    assert given["outcome"] == "Train failed: no space"
    assert given["live"] == "true"
    assert "--processing_jobs=none" in report.command(Run(RUN), tmp_path, tmp_path)


def test_what_the_script_says_last_is_shown_when_it_fails(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print('disk is full', file=sys.stderr); sys.exit(3)"]
    with pytest.raises(ReportError, match=r"exit code 3\):\ndisk is full"):
        report._made(words, tmp_path / "report.html")


def test_a_page_of_a_run_that_only_prepared_its_data(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The jobs' own code against S3's protocol: what is not there is named, not fatal."""
    cloud.put("runs/run-1/prepare/result.json", '{"dataset_hash": "abc"}')
    for name, value in {"AWS_ENDPOINT_URL": cloud.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    base = tmp_path / "ml"
    base.mkdir()
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(base))
    page = report.report(RUN, str(tmp_path / "out"), boto3.client("s3"))
    assert page == tmp_path / "out" / "report.html"
    assert "run-1" in page.read_text()
    assert not (tmp_path / "out" / "run").exists(), "the copies are gone"
    # In a processing job this is its last word, which the state machine's output repeats.
    assert f"rules_fired={(base / 'output' / 'message').read_text()}\n" in capfd.readouterr().out


@pytest.mark.parametrize("uri", ["", "data", f"s3://{BUCKET}/runs/run-1", "s3://x"])
def test_compare_wants_a_bucket(uri: str) -> None:
    with pytest.raises(ReportError, match="expected s3://<bucket>"):
        report.compare(uri, "", None)


def test_compare_wants_runs(cloud: FakeCloud) -> None:
    with pytest.raises(ReportError, match="holds no run"):
        report.compare(f"s3://{BUCKET}", "", cloud.client("s3"))
