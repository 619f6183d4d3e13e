"""A folder of pictures in, their classes as Parquet and CSV out; memory does not grow with the number of pictures.

Several instances each get a part of the folder (ShardedByS3Key) and write files of their own.
"""

from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifier.cpus import cpu_count
from classifier.errors import ConfigError, DataError, base_dir
from classifier.evaluation import unpack_model
from classifier.served_model import ModelError, ServedModel
from classifier.serving import PictureError, normalise, top_k

TOP = 5
ROW_GROUP = 5_000
AHEAD = 4
"""Pictures under way for each CPU."""
MAX_FILE_BYTES = 64 * 2**20
EVERY_S = 5.0
COLUMNS = ("file", "label", "probability", "labels", "probabilities", "novelty", "error")
"""``labels`` and ``probabilities`` hold the TOP likeliest, as JSON lists in the CSV and as lists in Parquet."""

Row = dict[str, Any]


@dataclass(frozen=True)
class BatchFlags:
    """Flags of batch.py."""

    input: str
    """Folder of pictures, searched through and through."""
    model: str
    """Folder that holds model.tar.gz."""
    predictions: str
    """Folder to write into."""


def classify(flags: BatchFlags) -> Row:
    """The whole of batch.py; returns the summary. Raises ConfigError or DataError with one clear line."""
    source, target = Path(flags.input), Path(flags.predictions)
    if not source.is_dir():
        raise ConfigError(f"input={flags.input} is no folder: give one with pictures")
    model = _model(Path(flags.model), target.parent)
    target.mkdir(parents=True, exist_ok=True)
    host, started = _host(), time.monotonic()
    counts: Counter[str] = Counter()
    with _Writer(target, host) as writer:
        said = started
        for row in _rows(source, model):
            writer.add(row)
            counts["failed" if row["error"] else row["label"]] += 1
            if time.monotonic() - said > EVERY_S:
                said = time.monotonic()
                print(f"progress pictures={counts.total()} pictures_per_s={counts.total() / (said - started):.1f}", flush=True)
    if not counts:
        raise DataError(f"there is no file under {flags.input}: check the input, and that it has files for each instance")
    seconds = time.monotonic() - started
    failed = counts.pop("failed", 0)
    summary = {
        "pictures": counts.total() + failed,
        "failed": failed,
        "classes": dict(counts.most_common()),
        "seconds": round(seconds, 2),
        "pictures_per_s": round((counts.total() + failed) / max(seconds, 1e-9), 1),
        "model": model.describe(),
    }
    (target / f"summary-{host}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _model(folder: Path, work: Path) -> ServedModel:
    archives = sorted(folder.rglob("model.tar.gz"))
    if len(archives) != 1:
        raise ConfigError(f"model={folder} holds {len(archives)} files named model.tar.gz, expected one: give a model artifact")
    try:
        return ServedModel(unpack_model(archives[0], work / "model-unpacked"), threads=1)
    except ModelError as problem:
        raise DataError(str(problem)) from None


def _host() -> str:
    """This instance's name, ``algo-1`` outside a job."""
    path = base_dir() / "config" / "resourceconfig.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(found.get("current_host", "algo-1"))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, one by one, links left out."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in sorted(names) if not (Path(place) / name).is_symlink())


def _rows(folder: Path, model: ServedModel) -> Iterator[Row]:
    """A row for each file, in order; several are under way."""
    under_way: deque[Future[Row]] = deque()
    with ThreadPoolExecutor(cpu_count()) as pool:
        for path in _files(folder):
            under_way.append(pool.submit(_row, path, folder, model))
            if len(under_way) >= AHEAD * cpu_count():
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _row(path: Path, folder: Path, model: ServedModel) -> Row:
    row: Row = dict.fromkeys(COLUMNS) | {
        "file": path.relative_to(folder).as_posix(),
        "labels": [],
        "probabilities": [],
        "error": "",
    }
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PictureError(f"more than {MAX_FILE_BYTES:,} bytes")
        logits = model.logits(normalise(model.square(model.decode(path.read_bytes()))[None], model.preprocessing))
    except (PictureError, OSError) as problem:
        return row | {"error": str(problem)[:200]}
    found = top_k(np.asarray(model.probabilities(logits)[0]), model.labels, TOP)
    strange = model.novelty(logits)
    return row | {
        "error": "",
        "label": found[0]["label"],
        "probability": found[0]["probability"],
        "labels": [entry["label"] for entry in found],
        "probabilities": [entry["probability"] for entry in found],
        "novelty": None if strange is None else strange[0],
    }


class _Writer:
    """Rows into ``predictions-<host>.parquet`` and ``.csv``."""

    def __init__(self, folder: Path, host: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"probability": pa.float64(), "novelty": pa.float64(), "labels": pa.list_(pa.string())}
        kinds["probabilities"] = pa.list_(pa.float64())
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        self._parquet = pq.ParquetWriter(folder / f"predictions-{host}.parquet", self._schema)
        self._file = (folder / f"predictions-{host}.csv").open("w", encoding="utf-8", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)
        self._rows: list[Row] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._parquet.close()
        self._file.close()

    def add(self, row: Row) -> None:
        """One row."""
        self._csv.writerow([_cell(row[name]) for name in COLUMNS])
        self._rows.append(row)
        if len(self._rows) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


def _cell(value: Any) -> Any:
    """A CSV cell that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    if isinstance(value, list):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value
