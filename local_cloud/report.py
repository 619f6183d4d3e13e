"""``make report RUN=s3://bucket/runs/<execution>``: the page on a run, made on this machine from what lies in S3.

It works while the run goes on, after it was stopped, and after it ended, with your own credentials: on AWS, or on the local cloud
through ``AWS_ENDPOINT_URL``. ``make compare BUCKET=s3://bucket`` makes the page over all runs. Both run the jobs' own code.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

PROJECT = Path(__file__).resolve().parent.parent
MODEL_CODE = PROJECT / "model_code"

_BUCKET = r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])"
_RUN = re.compile(_BUCKET + r"/runs/([A-Za-z0-9._-]{1,80})/?")
_TRIAL = re.compile(r"(.+)-\d{3}-[0-9a-f]{8}")
"""A trial's name is its tuning job's, a number, and eight digits of SageMaker's."""


class ReportError(Exception):
    """Something the user can mend; printed as one message, exit code 1."""


@dataclass(frozen=True)
class Run:
    """A run in S3, and the names of its jobs as far as they are known (``none`` otherwise)."""

    uri: str
    """``s3://<bucket>/runs/<execution>``."""
    tuning_job: str = "none"
    training_job: str = "none"
    processing_jobs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The execution's name."""
        return self.uri.rsplit("/", 1)[-1]


def command(run: Run, folder: Path, fetched: Path, *, live: bool = False, outcome: str = "") -> list[str]:
    """What makes ``folder/report.html``, to be started in ``model_code/``; the run's files are copied to ``fetched``.

    ``live`` makes a page that reads itself again; ``outcome`` says why the run failed or was stopped.
    """
    flags = {
        "run": run.name,
        "run_uri": run.uri,
        "run_dir": str(fetched),
        "report": str(folder),
        "rules": str(folder / "rule-output"),
        "tuning_job": run.tuning_job,
        "training_job": run.training_job,
        "processing_jobs": ",".join(run.processing_jobs) or "none",
        "outcome": " ".join(outcome.split()),
        "live": "true" if live else "false",
    }
    return [sys.executable, "report.py", *(f"--{name}={value}" for name, value in flags.items())]


def parse(uri: str) -> tuple[str, str]:
    """``(bucket, execution)`` of ``s3://<bucket>/runs/<execution>``. Raises ReportError for anything else."""
    found = _RUN.fullmatch(uri.strip())
    if found is None:
        raise ReportError(
            f"RUN={uri}: expected s3://<bucket>/runs/<execution>, the folder that the execution's output and messages name. "
            "Example: make report RUN=s3://my-data-bucket/runs/run-20261124-101500"
        )
    return found[1], found[2]


def find(uri: str, s3: Any) -> Run:
    """The run at ``uri``, with its jobs' names read from the keys that they wrote. Raises ReportError when there is none."""
    bucket, name = parse(uri)
    prefix = f"runs/{name}/"
    if not _answer(s3.list_objects_v2, bucket, prefix, MaxKeys=1).get("KeyCount"):
        raise ReportError(
            f"RUN={uri}: the bucket {bucket} holds nothing under {prefix}. Check the execution's name; runs expire after the "
            f"stage's retention_days. These are there: {', '.join(_folders(s3, bucket, 'runs/')[-5:]) or 'none'}"
        )
    trials = [match[1] for job in _folders(s3, bucket, f"{prefix}tuning/") if (match := _TRIAL.fullmatch(job))]
    trainings = _folders(s3, bucket, f"{prefix}training/")
    return Run(f"s3://{bucket}/runs/{name}", trials[-1] if trials else "none", trainings[-1] if trainings else "none")


def _folders(s3: Any, bucket: str, prefix: str) -> list[str]:
    """Names of the folders under a prefix, in S3's order; at most a thousand."""
    found = _answer(s3.list_objects_v2, bucket, prefix, Delimiter="/")
    return [str(item["Prefix"]).removeprefix(prefix).rstrip("/") for item in found.get("CommonPrefixes", [])]


def _answer(call: Any, bucket: str, prefix: str, **options: Any) -> dict[str, Any]:
    try:
        return dict(call(Bucket=bucket, Prefix=prefix, **options))
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ReportError(
            f"no AWS credentials were found ({error}). Log in (aws configure, aws sso login), or set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for the local cloud also AWS_ENDPOINT_URL"
        ) from None
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("NoSuchBucket", "404"):
            raise ReportError(f"there is no bucket {bucket}: take the one that `cdk deploy` printed as DataBucket") from None
        raise ReportError(
            f"s3://{bucket}/{prefix} could not be listed ({code}): your credentials need s3:ListBucket and s3:GetObject there"
        ) from None
    except BotoCoreError as error:
        raise ReportError(f"S3 could not be reached ({error}). Check the network, AWS_REGION and AWS_ENDPOINT_URL") from None


def _made(words: Sequence[str], page: Path) -> Path:
    """Run one of the jobs' scripts; its page. Raises ReportError with the script's last words."""
    done = subprocess.run(words, cwd=MODEL_CODE, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    if done.returncode or not page.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ReportError(f"{words[1]} made no {page.name} (exit code {done.returncode}):\n" + "\n".join(said[-6:]))
    return page


def report(uri: str, out: str, s3: Any) -> Path:
    """Make the page of one run; its path."""
    run = find(uri, s3)
    folder = Path(out).resolve() if out else PROJECT / "build" / "reports" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="report-") as fetched:
        return _made(command(run, folder, Path(fetched)), folder / "report.html")


def compare(uri: str, out: str, s3: Any) -> Path:
    """Make the page over all runs of a bucket; its path."""
    found = re.fullmatch(_BUCKET + "/?", uri.strip())
    if found is None:
        raise ReportError(f"BUCKET={uri}: expected s3://<bucket>, the DataBucket that `cdk deploy` printed")
    if not _folders(s3, found[1], "runs/"):
        raise ReportError(f"BUCKET={uri}: the bucket holds no run under runs/. Start the state machine first")
    folder = Path(out).resolve() if out else PROJECT / "build" / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "compare_runs.py", f"--bucket_uri=s3://{found[1]}", f"--report={folder}"]
    return _made(words, folder / "runs.html")


def main() -> None:
    """Make a page and print its path; every refusal is one clear message and exit code 1."""
    parser = argparse.ArgumentParser(prog="make report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["report", "compare"], help="one run, or all runs of a bucket")
    parser.add_argument("--uri", default="", help="s3://<bucket>/runs/<execution>, or s3://<bucket>")
    parser.add_argument("--out", default="", help="folder for the page; default: below build/reports")
    arguments = parser.parse_args()
    make = report if arguments.kind == "report" else compare
    try:
        # S3's global endpoint answers for every region, so none need be configured.
        region = boto3.Session().region_name or "us-east-1"
        print(make(arguments.uri, arguments.out, boto3.client("s3", region_name=region)))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
