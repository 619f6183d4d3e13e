"""One page over all runs of a bucket: accuracy against cost, hyperparameters, data set, champion.

Of every run only ``report/summary.json`` is read, which its report job wrote, a few kilobytes; of the bucket, ``champion.json``.
A run without a summary (it is going on, or its report failed) is listed by its name.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier import charts, storage
from classifier.errors import DataError
from classifier.files import replace_text, to_text
from classifier.markup import Html, absent, escape, in_csv, name, plot, setting, table
from classifier.report_page import Section, page
from classifier.report_sections import dollars, duration, guarded

Facts = dict[str, Any]
SUMMARY_BYTES = 64 * 1024
"""A larger summary was not written by this code: it is not read."""
MAX_RUNS = 2000
KEPT = (
    "run", "outcome", "written", "top1", "top1_low", "top1_high", "num_classes", "dataset_hash", "cost_usd", "cost_complete",
    "seconds", "hyperparameters", "rules_fired",
)  # fmt: skip
NUMBERS = ("top1", "top1_low", "top1_high", "cost_usd", "seconds")


@dataclass(frozen=True)
class CompareFlags:
    """Flags of compare_runs.py."""

    bucket_uri: str
    """``s3://bucket``; a folder as ``file:///…`` is read the same way."""
    report: str
    """Folder for ``runs.html``, ``runs.csv`` and ``runs.json``."""


def read_runs(bucket_uri: str) -> tuple[list[Facts], list[str]]:
    """``(one row a run, the best first; notes)``. Never more in memory than the rows."""
    bucket = bucket_uri.rstrip("/")
    notes = []
    names = list(storage.folders(f"{bucket}/runs/"))
    if len(names) > MAX_RUNS:
        notes.append(f"the bucket holds {len(names):,} runs; the last {MAX_RUNS:,} by name are compared")
        names = names[-MAX_RUNS:]
    with ThreadPoolExecutor(16, thread_name_prefix="runs") as pool:
        rows = list(pool.map(lambda run: _row(bucket, run), names))
    champion = _champion(bucket, notes)
    for row in rows:
        row["champion"] = row["run"] == champion
    if champion and champion not in names:
        notes.append(f"the champion, run {champion}, has left no files here: its run's folder has expired")
    return sorted(rows, key=lambda row: (row["top1"] is None, -(row["top1"] or 0.0), row["run"])), notes


def _row(bucket: str, run: str) -> Facts:
    """The summary, with every field of the expected kind; ``problem`` says what is wrong with one that cannot be read."""
    uri = f"{bucket}/runs/{run}/report/summary.json"
    found: Facts = {}
    problem = ""
    try:
        if storage.head(uri).size > SUMMARY_BYTES:
            problem = f"its summary is larger than {SUMMARY_BYTES:,} bytes"
        else:
            found = storage.read_json_optional(uri) or {}
    except DataError:
        problem = "no report yet"
    except Exception as raised:
        problem = f"its summary could not be read ({type(raised).__name__})"
    row = {key: found.get(key) for key in KEPT} | {"run": run, "problem": problem}
    for key in NUMBERS:
        row[key] = row[key] if isinstance(row[key], (int, float)) and not isinstance(row[key], bool) else None
    row["hyperparameters"] = row["hyperparameters"] if isinstance(row["hyperparameters"], dict) else {}
    row["rules_fired"] = row["rules_fired"] if isinstance(row["rules_fired"], list) else []
    return row


def _champion(bucket: str, notes: list[str]) -> str:
    try:
        return str((storage.read_json_optional(f"{bucket}/champion.json") or {}).get("run") or "")
    except Exception as problem:
        notes.append(f"champion.json could not be read ({type(problem).__name__}: {problem})")
        return ""


def compare(flags: CompareFlags) -> list[Facts]:
    """Write the page, the CSV and the JSON; the rows."""
    rows, notes = read_runs(flags.bucket_uri)
    parts = [
        Section("accuracy", "Accuracy against cost", guarded(lambda: _plots(rows))),
        Section("runs", "All runs", guarded(lambda: _table(rows))),
        Section("hyperparameters", "Hyperparameters", guarded(lambda: _hyperparameters(rows))),
    ]
    report = Path(flags.report)
    replace_text(report / "runs.html", page("Runs compared", _head(rows, notes), parts))
    replace_text(report / "runs.csv", _csv(rows))
    replace_text(report / "runs.json", to_text(rows))
    return rows


def _head(rows: list[Facts], notes: list[str]) -> str:
    measured = sum(row["top1"] is not None for row in rows)
    champion = next((row for row in rows if row["champion"]), None)
    serving = f"The champion is <strong>{name(champion['run'])}</strong>." if champion else "No run here is the champion."
    listed = "".join(f"<li>{name(note)}</li>" for note in notes)
    return f"<p>{len(rows)} runs, {measured} of them with a test accuracy. {serving}</p>" + (f"<ul>{listed}</ul>" if listed else "")


def _plots(rows: list[Facts]) -> str:
    if not any(row["top1"] is not None for row in rows):
        return absent("No run has a test accuracy yet.")
    cost = charts.runs(rows, "cost_usd", "Test top1 against cost")
    seconds = charts.runs(rows, "seconds", "Test top1 against duration")
    first = (
        plot(cost) if cost else absent("No cost is known: the runs' machines have no list price, or their jobs could not be read.")
    )
    return first + (plot(seconds) if seconds else absent("No duration is known."))


def _table(rows: list[Facts]) -> str:
    if not rows:
        return absent("The bucket holds no runs.")
    cells: list[list[object]] = [
        [
            Html(f"{name(row['run'])}{' <strong>champion</strong>' if row['champion'] else ''}"),
            row["top1"],
            Html(
                escape(dollars(row["cost_usd"])) + ("" if row["cost_complete"] else " <small>incomplete</small>"), row["cost_usd"]
            ),
            Html(escape(duration(row["seconds"])), row["seconds"]),
            row["dataset_hash"],
            row["num_classes"],
            ", ".join(map(str, row["rules_fired"])) or "none",
            row["written"],
            row["problem"] or row["outcome"] or "",
        ]
        for row in rows
    ]
    head = [
        "run",
        "test top1",
        "cost (USD, estimated)",
        "duration",
        "data set",
        "classes",
        "rules fired",
        "report written",
        "outcome",
    ]
    return table("runs-table", "All runs, the most accurate first", head, cells, sortable=True)


def _hyperparameters(rows: list[Facts]) -> str:
    keys = sorted({str(key) for row in rows for key in row["hyperparameters"]})[:40]
    known = [row for row in rows if row["hyperparameters"]]
    if not known:
        return absent("No run's training job is known.")
    cells: list[list[object]] = [
        [row["run"], row["top1"], *(setting(row["hyperparameters"].get(key)) for key in keys)] for row in known
    ]
    return table("hyperparameters-table", "Hyperparameters of the trainings", ["run", "test top1", *keys], cells, sortable=True)


def _csv(rows: list[Facts]) -> str:
    keys = sorted({str(key) for row in rows for key in row["hyperparameters"]})
    plain_keys = (
        "run",
        "champion",
        "top1",
        "top1_low",
        "top1_high",
        "cost_usd",
        "seconds",
        "dataset_hash",
        "num_classes",
        "outcome",
    )
    cells = ([*(row[key] for key in plain_keys), *(row["hyperparameters"].get(key) for key in keys)] for row in rows)
    return in_csv([*plain_keys, *keys], cells)
