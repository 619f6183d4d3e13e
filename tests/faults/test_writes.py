"""Row 2: a process is killed while it writes a checkpoint, a shard, a manifest, a report, a model artifact or ``champion.json``."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from classifier import checkpoint, preparation
from classifier.dataset import read_info
from classifier.errors import DataError
from fault_table import Landed
from model_fakes import MODEL_CODE, flags, prepared, write_folder
from report_fakes import write_run
from serving_fakes import write_model

pytestmark = pytest.mark.fault(2)

HERE = Path(__file__).parent
WRITERS = str(HERE / "writers.py")
MOMENTS = [60, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 1, None))]
"""Bytes after which the process dies; None: when it gives the complete file its name."""


def killed(tmp_path: Path, path: str, at: int | None, *command: str, nth: int = 1, worker: bool = False) -> None:
    """Run a program that dies while it writes what ``path`` matches; asserts that it did, or that its ``worker`` did."""
    plan = {"event": "os.rename" if at is None else "open", "path": path, "nth": nth, "bytes": at, "mark": str(tmp_path / "mark")}
    done = run(str(HERE / "dying.py"), json.dumps(plan), *command, cwd=tmp_path)
    assert (tmp_path / "mark").exists(), f"it never came to {path}: {done.stderr[-500:]}"
    assert done.returncode == (1 if worker else -signal.SIGKILL if at is None else -signal.SIGXFSZ), done.stderr[-500:]
    assert not worker or "a worker process was killed" in done.stderr


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program to its end, and of everything that it started, as a container's first process takes the others with it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAGEMAKER_BASE_DIR": str(cwd / "opt-ml"), "PYTHONDONTWRITEBYTECODE": "1"}
    out, err = cwd / "stdout", cwd / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen([sys.executable, *words], env=env, stdout=stdout, stderr=stderr, cwd=cwd, start_new_session=True)
        code = process.wait(120)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


# --- data sets ---------------------------------------------------------------------------------------------------------------


PARTS = {
    "shard": r"train-\d+\.partial$",
    "manifest": r"manifest\.parquet\.partial$",
    "description": r"dataset\.json\.partial$",
    "list of refused files": r"datasets/[0-9a-f]{16}/refused\.jsonl\.partial$",
    "index": r"index/[0-9a-f]+\.json\.partial$",
    "result": r"result\.json\.partial$",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "pictures")


def arguments(pictures: Path, out: Path) -> list[str]:
    given = flags(pictures.as_uri(), out)
    names = ("source", "dataset_root", "result", "dataset", "picture_size", "max_quarantined_share")
    return [word for name in names for word in (f"--{name}", str(getattr(given, name)))]


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    preparation.prepare(flags(pictures.as_uri(), out))
    return stored(out)


def stored(out: Path) -> dict[str, bytes]:
    """Complete files of the data sets."""
    found = {path.relative_to(out).as_posix(): path for path in (out / "datasets").rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith(".partial") and "index" not in name}


@pytest.mark.parametrize("at", MOMENTS)
@pytest.mark.parametrize("part", PARTS)
def test_a_preparation_that_dies_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, pictures: Path, whole: dict[str, bytes], landed: Landed, part: str, at: int | None
):
    if part == "manifest" and at is not None:
        # pyarrow opens the file itself: the limit starts with the file before it.
        path = r"refused/thumbnails\.json\.partial$"
        nth = 3
    else:
        path, nth = PARTS[part], 1
    killed(tmp_path, path, at, str(MODEL_CODE / "prepare.py"), *arguments(pictures, tmp_path), nth=nth, worker=part == "shard")
    for folder in [path.parent for path in (tmp_path / "datasets").rglob("dataset.json")]:
        # Described means complete.
        assert preparation.is_complete(folder.parent.as_uri(), folder.name)
        read_info(folder)
    for path_of in (tmp_path / "datasets").rglob("*.json"):
        json.loads(path_of.read_text())
    if part in ("shard", "manifest", "description"):
        assert not list((tmp_path / "datasets").rglob("dataset.json"))
    assert run(str(MODEL_CODE / "prepare.py"), *arguments(pictures, tmp_path), cwd=tmp_path).returncode == 0
    assert stored(tmp_path) == whole
    landed()


def test_a_description_without_its_shards_is_refused(tmp_path: Path, pictures: Path, landed: Landed):
    """An upload that was cut off: the description came, shards did not, or came short."""
    preparation.prepare(flags(pictures.as_uri(), tmp_path))
    (folder,) = [path.parent for path in (tmp_path / "datasets").rglob("dataset.json")]
    shard = next((folder / "shards").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert not preparation.is_complete(folder.parent.as_uri(), folder.name)
    landed()
    shard.unlink()
    with pytest.raises(DataError):
        read_info(folder)
    landed()


# --- checkpoints -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(WRITERS, "training", str(dataset), str(folder / "checkpoints"), str(folder / "result.pt"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(torch.load(folder / "result.pt", weights_only=True))


def kill_a_checkpoint(dataset: Path, folder: Path, undisturbed: dict[str, Any], nth: int, at: int | None) -> None:
    folder.mkdir(exist_ok=True)
    words = ("training", str(dataset), str(folder / "checkpoints"), str(folder / "result.pt"))
    killed(folder, r"last\.pt\.part$", at, WRITERS, *words, nth=nth)
    assert (folder / "checkpoints" / f".{checkpoint.NAME}.part").exists()
    before = (folder / "checkpoints" / checkpoint.NAME).exists()
    assert before == (nth > 1)
    if before:
        assert checkpoint.load(folder / "checkpoints") is not None
    done = run(WRITERS, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert ("goes on" in done.stdout or "resume" in done.stdout) == before, done.stdout
    result = torch.load(folder / "result.pt", weights_only=True)
    assert result["losses"] == undisturbed["losses"]
    for name, value in undisturbed["weights"].items():
        assert torch.equal(result["weights"][name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(("nth", "at"), [(1, 100_000), (3, 5_000_000)])
def test_a_training_that_dies_in_a_checkpoint_goes_on_from_the_one_before(
    dataset: Path, tmp_path: Path, undisturbed: dict[str, Any], landed: Landed, nth: int, at: int
):
    kill_a_checkpoint(dataset, tmp_path / "run", undisturbed, nth, at)
    landed()


@pytest.mark.slow
def test_a_training_that_dies_anywhere_in_a_checkpoint(dataset: Path, tmp_path: Path, undisturbed: dict[str, Any], landed: Landed):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    chance = random.Random(seed)
    for number in range(12):
        at = None if number % 4 == 0 else chance.randrange(10_000_000)
        kill_a_checkpoint(dataset, tmp_path / str(number), undisturbed, chance.randrange(1, 6), at)
        landed()


# --- model artifact and report -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that can be packed."""
    folder = write_model(tmp_path / "model")
    (folder / "weights.safetensors").write_bytes(os.urandom(200_000))
    return folder


@pytest.mark.parametrize("at", [*MOMENTS, 100_000])
def test_an_artifact_that_is_being_written_leaves_the_one_before(tmp_path: Path, model: Path, landed: Landed, at: int | None):
    target = tmp_path / "artifact"
    assert run(WRITERS, "artifact", str(model), str(target), cwd=tmp_path).returncode == 0
    before = (target / "model.tar.gz").read_bytes()
    (model / "weights.safetensors").write_bytes(os.urandom(200_000))
    killed(tmp_path, r"model\.tar\.gz", at, WRITERS, "artifact", str(model), str(target))
    assert (target / "model.tar.gz").read_bytes() == before
    assert run(WRITERS, "artifact", str(model), str(target), cwd=tmp_path).returncode == 0
    with tarfile.open(target / "model.tar.gz") as tar:
        stream = tar.extractfile("weights.safetensors")
        assert stream is not None
        assert stream.read() == (model / "weights.safetensors").read_bytes()
    landed()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["report.html", "report.json", "summary.json", "profiler-report.html"])
@pytest.mark.parametrize("at", [0, 60, None])
def test_a_report_that_is_being_written_leaves_the_one_before(tmp_path: Path, landed: Landed, part: str, at: int | None):
    write_run(tmp_path / "run")
    assert run(WRITERS, "report", str(tmp_path), cwd=tmp_path).returncode == 0
    page = next(tmp_path.rglob(part))
    before = page.read_bytes()
    killed(tmp_path, rf"\.{re.escape(part)}\.\d+\.partial$", at, WRITERS, "report", str(tmp_path))
    assert page.read_bytes() == before
    assert run(WRITERS, "report", str(tmp_path), cwd=tmp_path).returncode == 0
    landed()


# --- champion.json -----------------------------------------------------------------------------------------------------------


@pytest.mark.pipeline
def test_a_champion_that_is_being_written_is_the_old_one(cloud: Any, landed: Landed):
    """The state machine writes it with one PutObject: S3 shows an object when all of it is there, never before."""
    s3, bucket = cloud.client("s3"), "half-written"
    s3.create_bucket(Bucket=bucket)
    old, new = json.dumps({"run": "old"}).encode(), json.dumps({"run": "new"}).encode()
    s3.put_object(Bucket=bucket, Key="champion.json", Body=old)
    address = urlsplit(s3.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": "champion.json"}))
    for sent in range(len(new)):
        connection = http.client.HTTPConnection("localhost", address.port, timeout=10)
        connection.putrequest("PUT", f"{address.path}?{address.query}")
        connection.putheader("Content-Length", str(len(new)))
        connection.endheaders()
        connection.send(new[:sent])
        assert s3.get_object(Bucket=bucket, Key="champion.json")["Body"].read() == old
        connection.close()
        assert s3.get_object(Bucket=bucket, Key="champion.json")["Body"].read() == old
        landed()
    s3.put_object(Bucket=bucket, Key="champion.json", Body=new)
    assert s3.get_object(Bucket=bucket, Key="champion.json")["Body"].read() == new
