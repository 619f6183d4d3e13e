"""The whole of report.py: gathers what is known of a run, and writes the pages, the JSON and the CSV files.

A run that failed, was stopped, or is still going gets its report too: every input may be missing or half written, and what could
not be read is named in ``notes``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from classifier import profiling, report_jobs, report_sections, storage
from classifier.files import replace_texts, to_text
from classifier.findings import Finding
from classifier.markup import in_csv
from classifier.profile_rules import profile_findings
from classifier.report_page import Section, page
from classifier.rules import training_findings
from classifier.saved_tensors import loss_series

T = TypeVar("T")
Facts = dict[str, Any]


@dataclass(frozen=True)
class ReportFlags:
    """Flags of report.py. A job may be ``none``: the run has none of the kind."""

    run: str
    run_dir: str
    report: str
    rules: str
    tuning_job: str = ""
    training_job: str = ""
    run_uri: str = ""
    """Where the run's files are stored: all that the report reads is fetched from there. Empty: they lie in ``run_dir`` already."""
    processing_jobs: str = ""
    """Names of the run's processing jobs, separated by commas, for their cost and duration."""
    outcome: str = ""
    """Why the run failed or was stopped; empty for one that did not."""
    live: bool = False
    """The page reads itself again every 5 s: for a server that writes it anew while the run goes on."""


WATCHED = ("debug-output", "profiler-output")
"""Recorded while the training goes on; what is missing there is worth a note."""
STORED = ("prepare", "evaluation", "rule-output")
MODEL_BYTES = 2 * 2**30
"""A larger model is not downloaded for the few kilobytes of its training.json."""


# --- fetching ----------------------------------------------------------------------------------------------------------------


def fetch_watched(flags: ReportFlags) -> list[str]:
    """Copy what was recorded during the training into ``run_dir``; notes say what is missing. Never raises.

    The job does this itself because SageMaker fails a processing job of which an input holds no object.
    """
    notes = []
    for folder in WATCHED if flags.run_uri else ():
        uri = f"{flags.run_uri.rstrip('/')}/{folder}/"
        try:
            if not _fetch(uri, Path(flags.run_dir) / folder):
                notes.append(f"{uri} is empty: the log of the training job says why nothing was uploaded")
        except Exception as problem:
            notes.append(f"{uri} could not be read ({type(problem).__name__}: {problem})")
    return notes


def _fetch_stored(flags: ReportFlags) -> list[str]:
    """Copy what the jobs left at their end; what is not there is noted where it is read."""
    notes = []
    for folder in STORED if flags.run_uri else ():
        uri = f"{flags.run_uri.rstrip('/')}/{folder}/"
        try:
            _fetch(uri, Path(flags.run_dir) / folder)
        except Exception as problem:
            notes.append(f"{uri} could not be read ({type(problem).__name__}: {problem})")
    return notes


def _fetch(uri: str, folder: Path) -> int:
    """Download what is new or has grown; how many objects there are. A page that refreshes itself asks every few seconds."""

    def changed(entry: storage.Entry, target: Path) -> bool:
        return "rule-output" in uri or not target.is_file() or target.stat().st_size != entry.size

    return storage.download_all(uri, folder, changed)


def _json(path: Path) -> Facts:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _client() -> Any:
    import boto3

    return boto3.client("sagemaker")


def _tried(notes: list[str], what: str, read: Callable[[], T], empty: Callable[[], T]) -> T:
    """What ``read`` gives; a note and ``empty()`` when it raises."""
    try:
        return read()
    except Exception as problem:
        notes.append(f"{what} could not be read ({type(problem).__name__}: {problem})")
        return empty()


# --- gathering ---------------------------------------------------------------------------------------------------------------


def collect(flags: ReportFlags) -> tuple[Facts, Facts]:
    """``(all facts of the run as one JSON object, what the machine section draws)``; what is missing is in ``notes``."""
    root = Path(flags.run_dir)
    notes = [*fetch_watched(flags), *_fetch_stored(flags)]
    trials, tuning, trials_note = report_jobs.read_tuning(_client, flags.tuning_job)
    job, job_note = report_jobs.read_training(_client, flags.training_job)
    processing, processing_notes = report_jobs.read_processing(_client, [n.strip() for n in flags.processing_jobs.split(",")])
    notes += [note for note in (trials_note, job_note, *processing_notes) if note]
    evaluation = _json(root / "evaluation" / "evaluation.json")
    prepared, result = _json(root / "prepare" / "report.json"), _json(root / "prepare" / "result.json")
    for what, known in (("evaluation", evaluation), ("prepare report", prepared)):
        if not known:
            notes.append(f"{what} is missing from the run")
    record = _training_record(flags, notes)
    history: list[Facts] = _tried(notes, "the epochs", lambda: [dict(row) for row in record.get("history") or []], list)
    machine = _machine(root / "profiler-output", notes)
    profiler = _profiler(root, record, notes)
    jobs = report_jobs.bill(processing, tuning, trials, job)
    facts = {
        "run": flags.run,
        "outcome": flags.outcome,
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "notes": notes,
        # Beside the training the profiler's rules run too; here they are those of the whole profile.
        "findings": [part for part in _findings(root, history, prepared, notes) if part["RuleName"] not in profiler],
        "profiler": profiler,
        "dataset": {**prepared, **{k: v for k, v in result.items() if k != "source"}},
        "trials": trials,
        "tuning": tuning,
        "training_job": job,
        "history": history,
        "saved_losses": _saved_losses(root / "debug-output", notes),
        "evaluation": evaluation,
        "operators": machine["operators"],
        "overhead": machine["overhead"],
        "jobs": jobs,
        "cost_usd": _sum(job["cost_usd"] for job in jobs),
        "cost_complete": bool(jobs) and bool(processing) and all(job["cost_usd"] is not None for job in jobs),
        "seconds": _sum(job["seconds"] for job in jobs),
        "input": _tried(
            notes, "the input", lambda: _input(root, flags, prepared, job, tuning), lambda: {"exact": False, "value": {}}
        ),
        "versions": _versions(result, job, processing),
    }
    return facts, machine


def _sum(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) if known else None


def _training_record(flags: ReportFlags, notes: list[str]) -> Facts:
    """training.json as the evaluation left it; without an evaluation, the one inside the training job's artifact."""
    found = _json(Path(flags.run_dir) / "evaluation" / "training.json")
    if found or not flags.run_uri:
        return found
    uri = f"{flags.run_uri.rstrip('/')}/training/"
    return _tried(notes, f"the model under {uri}", lambda: _record_in_model(uri), dict)


def _record_in_model(uri: str) -> Facts:
    archives = [entry for entry in storage.listing(uri) if entry.name.endswith("model.tar.gz") and entry.size <= MODEL_BYTES]
    if not archives:
        return {}
    with tempfile.TemporaryDirectory() as work:
        archive = Path(work) / "model.tar.gz"
        storage.download(archives[-1].uri, archive)
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if member.isfile() and Path(member.name).name == "training.json" and (file := tar.extractfile(member)):
                    found = json.loads(file.read())
                    return found if isinstance(found, dict) else {}
    return {}


def _findings(root: Path, history: list[Facts], prepared: Facts, notes: list[str]) -> list[Facts]:
    """The training's rules, judged anew where tensors are there; else as the job beside the training left them."""
    live = {
        part["RuleName"]: part for path in sorted((root / "rule-output").glob("*/*.json")) if "RuleName" in (part := _json(path))
    }

    def judge() -> tuple[list[Finding], list[str]]:
        counts = [int(row.get("train", 0)) for row in prepared.get("classes") or []]
        return training_findings(root / "debug-output", history, counts)

    found, problems = _tried(notes, "the rules", judge, lambda: ([], []))
    notes += problems
    judged = {finding.rule: finding.to_json() for finding in found}
    if problems or not history:
        # Without epochs a rule on epochs has nothing to say; what it said while the training ran counts.
        judged = {**judged, **{rule: part for rule, part in live.items() if rule not in judged or part.get("RuleTriggered")}}
    return list({**live, **judged}.values())


def _profiler(root: Path, record: Facts, notes: list[str]) -> dict[str, Facts]:
    folder = root / "profiler-output"
    read: list[Finding] = _tried(
        notes, "the profile", lambda: profile_findings(folder, record.get("started"), record.get("batch_size")), list
    )
    if read:
        return {finding.rule: finding.to_json() for finding in read}
    stored = root / "rule-output" / "ProfilerReport" / "profiler-output" / "profiler-reports"
    return {path.stem: part for path in sorted(stored.glob("*.json")) if (part := _json(path))}


def _saved_losses(tensors: Path, notes: list[str]) -> list[tuple[int, float]]:
    if any("tensors could not be read" in note for note in notes):
        return []
    return _tried(notes, "the saved losses", lambda: loss_series(tensors), list)


def _machine(profile: Path, notes: list[str]) -> Facts:
    return {
        "events": _tried(notes, "the system metrics", lambda: profiling.read_system(profile), list),
        "steps": _tried(notes, "the step phases", lambda: profiling.read_steps(profile), list),
        "operators": _tried(notes, "the operators", lambda: profiling.read_operators(profile), list),
        "overhead": _tried(notes, "the overhead", lambda: profiling.read_overhead(profile), dict),
    }


def _input(root: Path, flags: ReportFlags, prepared: Facts, job: Facts, tuning: Facts) -> Facts:
    """The execution's input: ``input.json`` of the run where it was kept, else put together from what the jobs were told."""
    uri = f"{flags.run_uri.rstrip('/')}/input.json"
    given: Facts | None = _json(root / "input.json")
    if not given and flags.run_uri:
        given = _tried([], uri, lambda: storage.read_json_optional(uri), lambda: None)
    if given:
        return {"exact": True, "value": given}
    told = dict(job.get("hyperparameters") or {})
    value: Facts = {"source": prepared["source"]} if prepared.get("source") else {}
    value |= {key: told.pop(key) for key in ("recipe", "backbone", "pretrained") if key in told}
    if "image_size" in told:
        value["image_size"] = int(float(told.pop("image_size")))
    ranges = tuning.get("ranges") or {}
    searched = [entry["Name"] for kind in ranges.values() if isinstance(kind, list) for entry in kind if "Name" in entry]
    if told:
        value["hyperparameters"] = {key: text for key, text in sorted(told.items()) if key not in searched}
    return {"exact": False, "value": value}


def _versions(result: Facts, job: Facts, processing: list[Facts]) -> dict[str, str]:
    packages = ("torch", "torchvision", "smdebug", "onnxruntime", "plotly")
    known = {"data set (hash of its pictures)": result.get("dataset_hash"), "python": platform.python_version()}
    known |= {package: _version(package) for package in packages}
    known["training image"], known["training code"] = job.get("image"), job.get("code")
    for row in processing:
        if row["arguments"].get("code_hash"):
            known["code (hash)"] = row["arguments"]["code_hash"]
        known["processing image"] = row["image"] or known.get("processing image")
    return {key: str(value) for key, value in known.items() if value}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def summary(facts: Facts) -> Facts:
    """The run in a few lines, for the page that compares runs. Small whatever the run was."""
    known = {key: facts[key] for key in ("run", "written", "cost_usd", "cost_complete", "seconds")}
    told = facts["training_job"].get("hyperparameters") or {}
    return {
        **known,
        **_tried([], "the test", lambda: _test(facts["evaluation"]), dict),
        "outcome": facts["outcome"][:500],
        "num_classes": _tried([], "the classes", lambda: len(facts["dataset"]["classes"]), lambda: None),
        "dataset_hash": facts["dataset"].get("dataset_hash"),
        "hyperparameters": {key[:60]: str(value)[:60] for key, value in sorted(told.items())[:60]},
        "rules_fired": [row["rule"] for row in report_sections.rule_rows(facts) if row["fired"]][:40],
    }


def _test(evaluation: Facts) -> Facts:
    test = evaluation["test"]
    low, high = test["top1_interval"]
    return {"top1": test["top1"], "top1_low": low, "top1_high": high}


# --- writing -----------------------------------------------------------------------------------------------------------------


def write(flags: ReportFlags) -> Facts:
    """Write ``report.html``, ``report.json``, ``summary.json`` and CSV files under ``report``, and the rules' files; the facts."""
    facts, machine = collect(flags)
    root, report, rules = Path(flags.run_dir), Path(flags.report), Path(flags.rules)
    written: dict[Path, str] = {
        report / "report.json": to_text(facts),
        report / "summary.json": to_text(summary(facts)),
        report / "report.html": page(
            f"Run {facts['run']}", report_sections.head(facts), report_sections.sections(facts, root, machine), live=flags.live
        ),
        report / "trials.csv": _trials_csv(facts),
        report / "per_class.csv": _tried(facts["notes"], "the figures of the classes", lambda: _per_class_csv(facts), str),
    }
    profiler = rules / "ProfilerReport" / "profiler-output"
    written[profiler / "profiler-report.html"] = _profiler_page(facts, machine, live=flags.live)
    for name, part in facts["profiler"].items():
        written[profiler / "profiler-reports" / f"{name}.json"] = to_text({"RuleName": name, **part})
    for finding in facts["findings"]:
        name = str(finding["RuleName"])
        if name.isidentifier():  # it becomes a path, and a stored one was read from outside
            written[rules / name / f"{name}.json"] = to_text(finding)
    replace_texts(written)
    return facts


def _profiler_page(facts: Facts, machine: Facts, *, live: bool) -> str:
    only = {**facts, "findings": []}
    found = Section("findings", "Rules of the profiler", report_sections.guarded(lambda: report_sections.findings(only)))
    makers = report_sections.machine_makers(facts, machine)
    parts = [found, *(Section(ident, title, report_sections.guarded(make)) for ident, title, make in makers)]
    return page(f"Profiler report of run {facts['run']}", "", parts, live=live)


def _trials_csv(facts: Facts) -> str:
    keys = sorted({key for row in facts["trials"] for key in row["hyperparameters"]})
    rows = [
        [
            row["name"],
            row["status"],
            row["stopped_early"],
            row["objective"],
            row["seconds"],
            *(row["hyperparameters"].get(k) for k in keys),
        ]
        for row in facts["trials"]
    ]
    return in_csv(["trial", "status", "stopped_early", "objective", "seconds", *keys], rows)


def _per_class_csv(facts: Facts) -> str:
    columns = ("label", "num_pictures", "precision", "recall", "f1")
    rows = [[row.get(column) for column in columns] for row in facts["evaluation"].get("per_class") or []]
    return in_csv(columns, rows)
