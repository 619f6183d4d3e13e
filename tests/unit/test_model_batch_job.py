"""batch.py: a folder of pictures becomes Parquet and CSV, the unreadable ones named."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from classifier import batch_job
from classifier.batch_job import BatchFlags, classify
from classifier.errors import ConfigError, DataError
from model_fakes import run_script
from serving_fakes import COLOURS, colour, write_model


@pytest.fixture
def flags(tmp_path: Path) -> BatchFlags:
    write_model(tmp_path / "m")
    (tmp_path / "model").mkdir()
    with tarfile.open(tmp_path / "model" / "model.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "m", ".")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    return BatchFlags(str(tmp_path / "in"), str(tmp_path / "model"), str(tmp_path / "out" / "predictions"))


def test_every_file_gets_a_row(flags: BatchFlags, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch_job, "ROW_GROUP", 2)
    source = Path(flags.input)
    for number, name in enumerate(COLOURS):
        (source / "deep" / f"{number}.png").write_bytes(colour(name))
    (source / "=1+1.png").write_bytes(b"no picture")
    summary = classify(flags)
    assert (summary["pictures"], summary["failed"]) == (4, 1)
    assert summary["classes"] == dict.fromkeys(COLOURS, 1)
    out = Path(flags.predictions)
    rows = pq.read_table(out / "predictions-algo-1.parquet").to_pylist()
    assert [row["file"] for row in rows] == ["=1+1.png", "deep/0.png", "deep/1.png", "deep/2.png"]
    assert [row["label"] for row in rows[1:]] == list(COLOURS)
    assert all(row["probability"] == row["probabilities"][0] and 0 <= row["novelty"] <= 1 for row in rows[1:])
    assert "not a picture" in rows[0]["error"]
    assert rows[0]["label"] is None
    with (out / "predictions-algo-1.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["file"] == "'=1+1.png"  # no formula in a spreadsheet
    assert json.loads(lines[1]["labels"])[0] == "red"
    assert json.loads((out / "summary-algo-1.json").read_text())["model"]["run"] == "colours"


def test_without_pictures_or_model_it_says_so(flags: BatchFlags, tmp_path: Path):
    with pytest.raises(DataError, match="there is no file under"):
        classify(flags)
    with pytest.raises(ConfigError, match=r"holds 0 files named model\.tar\.gz"):
        classify(BatchFlags(flags.input, str(tmp_path / "in"), flags.predictions))
    with pytest.raises(ConfigError, match="is no folder"):
        classify(BatchFlags(str(tmp_path / "nowhere"), flags.model, flags.predictions))


def test_the_entry_point_ends_with_one_line(flags: BatchFlags):
    done = run_script("batch.py", "--input", "/nowhere", "--model", flags.model, "--predictions", flags.predictions)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: input=/nowhere is no folder: give one with pictures"
