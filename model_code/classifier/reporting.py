"""The run's report: one self-contained page, the profiler's page, and the same facts as JSON."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier import charts, profiling, storage
from classifier.findings import Finding
from classifier.profile_rules import profile_findings
from classifier.rules import training_findings
from classifier.saved_tensors import loss_series

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1080px;padding:16px 20px;color:#111827;background:#fff}
h1{font-size:24px;margin:8px 0}h2{font-size:18px;margin:32px 0 8px;border-bottom:1px solid #e5e7eb;padding-bottom:4px}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{text-align:left;padding:4px 8px;border-bottom:1px solid #e5e7eb}
td.n{font-variant-numeric:tabular-nums}.muted{color:#6b7280}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0}.card{border:1px solid #e5e7eb;border-radius:8px;padding:8px 14px}
.card b{display:block;font-size:22px}.card small,td small{display:block;color:#6b7280}
.fired{color:#b91c1c;font-weight:600}.fine{color:#047857}
.grid>div{min-width:0;overflow:hidden}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:8px}details{margin:8px 0}
.scroll{max-height:420px;overflow:auto}.pairs img{height:84px;margin-right:4px;border-radius:4px;vertical-align:top}
"""


@dataclass(frozen=True)
class ReportFlags:
    """Flags of report.py."""

    run: str
    run_dir: str
    report: str
    rules: str
    tuning_job: str = ""
    training_job: str = ""
    run_uri: str = ""
    """Where the run's files are stored: tensors and profile are fetched from there. Empty: they lie in ``run_dir`` already."""


WATCHED = ("debug-output", "profiler-output")


def fetch_watched(flags: ReportFlags) -> list[str]:
    """Copy what was recorded during the training into ``run_dir``; notes say what is missing. Never raises.

    The job does this itself because SageMaker fails a processing job of which an input holds no object.
    """
    notes = []
    for name in WATCHED if flags.run_uri else ():
        uri = f"{flags.run_uri.rstrip('/')}/{name}/"
        try:
            if not storage.download_all(uri, Path(flags.run_dir) / name):
                notes.append(f"{uri} is empty: the log of the training job says why nothing was uploaded")
        except Exception as problem:
            notes.append(f"{uri} could not be read ({type(problem).__name__}: {problem})")
    return notes


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _client() -> Any:
    import boto3

    return boto3.client("sagemaker")


def read_trials(tuning_job: str) -> tuple[list[dict[str, Any]], str]:
    """``(trials, note)`` from SageMaker; the note says why there are none."""
    if not tuning_job or tuning_job == "none":
        return [], "no tuning job was named"
    try:
        rows: list[dict[str, Any]] = []
        for page in (
            _client()
            .get_paginator("list_training_jobs_for_hyper_parameter_tuning_job")
            .paginate(HyperParameterTuningJobName=tuning_job)
        ):
            rows += [_trial(job) for job in page["TrainingJobSummaries"]]
    except Exception as problem:
        return [], f"tuning job {tuning_job!r} could not be read ({type(problem).__name__}: {problem})"
    return sorted(rows, key=lambda row: -(row["objective"] if row["objective"] is not None else -1)), ""


def _trial(job: dict[str, Any]) -> dict[str, Any]:
    tuned = job.get("TunedHyperParameters", {})
    objective = job.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value")
    start, end = job.get("TrainingStartTime"), job.get("TrainingEndTime")
    return {
        "name": job["TrainingJobName"],
        "status": job["TrainingJobStatus"],
        "hyperparameters": tuned,
        "learning_rate": float(tuned["learning_rate"]) if "learning_rate" in tuned else None,
        "batch_size": float(str(tuned["batch_size"]).strip('"')) if "batch_size" in tuned else None,
        "objective": None if objective is None else float(objective),
        "seconds": (end - start).total_seconds() if start and end else None,
    }


def read_training(training_job: str) -> tuple[dict[str, Any], str]:
    """``(facts of the training job, note)``."""
    if not training_job or training_job == "none":
        return {}, "no training job was named"
    try:
        job = _client().describe_training_job(TrainingJobName=training_job)
    except Exception as problem:
        return {}, f"training job {training_job!r} could not be read ({type(problem).__name__}: {problem})"
    parameters = {k: str(v) for k, v in job.get("HyperParameters", {}).items() if not k.startswith("sagemaker_")}
    facts = {
        "name": training_job,
        "status": job.get("TrainingJobStatus"),
        "billable_seconds": job.get("BillableTimeInSeconds"),
        "instance": job.get("ResourceConfig", {}).get("InstanceType"),
        "image": job.get("AlgorithmSpecification", {}).get("TrainingImage"),
        "hyperparameters": parameters,
    }
    return facts, ""


def collect(flags: ReportFlags) -> dict[str, Any]:
    """All facts of the run as one JSON object; what is missing is named in ``notes``."""
    root = Path(flags.run_dir)
    trials, trials_note = read_trials(flags.tuning_job)
    job, job_note = read_training(flags.training_job)
    evaluation = _json(root / "evaluation" / "evaluation.json")
    training = _json(root / "evaluation" / "training.json")
    prepared, result = _json(root / "prepare" / "report.json"), _json(root / "prepare" / "result.json")
    notes = [*fetch_watched(flags), *(note for note in (trials_note, job_note) if note)]
    notes += [
        f"{name} is missing from the run" for name, found in (("evaluation", evaluation), ("prepare report", prepared)) if not found
    ]
    history = training.get("history", [])
    findings = _findings(root / "debug-output", history, prepared, notes)
    profile = profile_findings(root / "profiler-output", training.get("started"), training.get("batch_size"))
    return {
        "run": flags.run,
        "notes": notes,
        "findings": [finding.to_json() for finding in findings],
        "profiler": {finding.rule: finding.to_json() for finding in profile},
        "dataset": {**prepared, **{k: v for k, v in result.items() if k != "source"}},
        "trials": trials,
        "training_job": job,
        "history": history,
        "evaluation": evaluation,
    }


def _findings(tensors: Path, history: list[dict[str, Any]], prepared: dict[str, Any], notes: list[str]) -> list[Finding]:
    counts = [int(row.get("train", 0)) for row in prepared.get("classes", [])]
    findings, unread = training_findings(tensors, history, counts)
    notes += unread
    return findings


def _e(value: object) -> str:
    """Escaped text; numbers are rounded."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape("–" if value is None else str(value))


def _table(head: list[str], rows: list[list[object]]) -> str:
    def cell(value: object, tag: str) -> str:
        kind = " class=n" if isinstance(value, (int, float)) else ""
        return f"<{tag}{kind}>{_e(value)}</{tag}>"

    top = "".join(cell(name, "th") for name in head)
    body = "".join("<tr>" + "".join(cell(value, "td") for value in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _plot(figure: Any) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}))


def _rule_rows(facts: dict[str, Any]) -> list[tuple[str, bool, str, str]]:
    rows = [(f["RuleName"], bool(f["RuleTriggered"]), f["Detail"], f["Remedy"]) for f in facts["findings"]]
    rows += [(name, bool(p["RuleTriggered"]), p["Detail"], p["Remedy"]) for name, p in facts["profiler"].items()]
    return sorted(rows, key=lambda row: not row[1])


def _rules_html(facts: dict[str, Any]) -> str:
    rows = _rule_rows(facts)
    fired = sum(row[1] for row in rows)
    lines = []
    for name, hit, detail, remedy in rows:
        state = "<span class=fired>fired</span>" if hit else "<span class=fine>fine</span>"
        lines.append(f"<tr><td>{_e(name)}</td><td>{state}</td><td>{_e(detail)}{_e('. ' + remedy) if remedy else ''}</td></tr>")
    top = f"<p>{fired} of {len(rows)} rules fired.</p>"
    return f"{top}<div class=scroll><table><tr><th>rule<th>state<th>what it saw</tr>{''.join(lines)}</table></div>"


def _cards(facts: dict[str, Any]) -> str:
    test, champion = facts["evaluation"].get("test", {}), facts["evaluation"].get("champion") or {}
    speed = facts["evaluation"].get("latency_ms", {})
    before = test.get("ece_before")
    values = [
        ("test top1", test.get("top1"), _interval(test.get("top1_interval"))),
        ("test top5", test.get("top5"), _interval(test.get("top5_interval"))),
        ("test pictures", test.get("num_pictures"), ""),
        ("calibration error", test.get("ece_after"), "" if before is None else f"{_e(before)} before scaling"),
        ("ms per picture (p50)", speed.get("p50"), ""),
        ("champion top1", champion.get("top1"), ""),
    ]
    cards = (f"<div class=card>{_e(name)}<b>{_e(value)}</b><small>{_e(note)}</small></div>" for name, value, note in values)
    return f"<div class=cards>{''.join(cards)}</div>"


def _interval(bounds: list[float] | None) -> str:
    return f"{_e(float(bounds[0]))} to {_e(float(bounds[1]))} (95 %)" if bounds else ""


_EXAMPLE = re.compile(r"examples/\d+-\d+-\d+\.jpg")


def _image(folder: Path, file: str | None, text: str) -> str:
    """A picture of the evaluation, inline; nothing where there is none."""
    if file is None or not _EXAMPLE.fullmatch(file) or not (folder / file).is_file():
        return ""
    data = base64.b64encode((folder / file).read_bytes()).decode("ascii")
    return f'<img alt="{_e(text)}" title="{_e(text)}" src="data:image/jpeg;base64,{data}">'


def _pairs_html(pairs: list[dict[str, Any]], folder: Path) -> str:
    """The most confused pairs: confused pictures, and one of either class that is classified right."""
    lines = []
    for pair in pairs:
        names = {"expected": pair["expected"], "said": pair["said"]}
        wrong = "".join(_image(folder, e["file"], f"said with probability {e['probability']:.2f}") for e in pair["examples"])
        right = {name: _image(folder, pair["references"].get(name), f"{label}, classified right") for name, label in names.items()}
        cells = [f"{_e(label)}<br>{right[name]}" for name, label in names.items()]
        share = f"{pair['count']}<small>{pair['share']:.0%} of the class</small>"
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (cells[0], wrong, cells[1], share)) + "</tr>")
    head = "<tr><th>true class<th>taken for the other<th>predicted class<th>pictures</tr>"
    return f"<h2>Most confused</h2><div class='scroll pairs'><table>{head}{''.join(lines)}</table></div>" if pairs else ""


def _dataset_html(dataset: dict[str, Any]) -> str:
    if not dataset:
        return "<p class=muted>No preparation report.</p>"
    counts = dataset.get("num_pictures", {})
    lead = (
        f"<p>Data set <code>{_e(dataset.get('dataset_hash'))}</code> from <code>{_e(dataset.get('source'))}</code>: "
        f"{_e(len(dataset.get('classes', [])))} classes, split {_e(dataset.get('split'))}. "
        f"Quarantined {_e(dataset.get('num_quarantined'))}, duplicates {_e(dataset.get('num_duplicates'))} "
        f"(of them {_e(dataset.get('num_leaks'))} leaked between splits).</p>"
    )
    lead += "".join(f"<p class=muted>{_e(note)}</p>" for note in dataset.get("notes", []))
    totals = _table(["split", "pictures"], [[name, counts.get(name)] for name in ("train", "valid", "test")])
    rows = [[c["folder"], c["train"], c["valid"], c["test"]] for c in dataset.get("classes", [])]
    classes = f"<details><summary>Pictures per class</summary>{_table(['class', 'train', 'valid', 'test'], rows)}</details>"
    bad = [[entry["file"], entry["reason"]] for entry in dataset.get("quarantined", [])]
    quarantine = f"<details open><summary>Quarantined files</summary>{_table(['file', 'reason'], bad)}</details>" if bad else ""
    return lead + totals + classes + quarantine


def _trials_html(facts: dict[str, Any]) -> str:
    rows = facts["trials"]
    if not rows:
        return "<p class=muted>No trials to show (see the notes).</p>"
    table = _table(
        ["trial", "status", "learning rate", "batch size", "best valid top1", "seconds"],
        [[r["name"], r["status"], r["learning_rate"], r["batch_size"], r["objective"], r["seconds"]] for r in rows],
    )
    plottable = [r for r in rows if r["learning_rate"] and r["batch_size"]]
    return table + (_plot(charts.trials(plottable)) if plottable else "")


def _evaluation_html(evaluation: dict[str, Any], folder: Path) -> str:
    if not evaluation:
        return "<p class=muted>No evaluation.</p>"
    reliability = evaluation["reliability"]
    plots = _plot(charts.confusion(evaluation["confusion"], evaluation["classes"]))
    plots += _plot(charts.calibration(reliability["before"], reliability["after"]))
    rows = sorted(evaluation["per_class"], key=lambda r: (r["f1"] is not None, r["f1"] or 0))
    if macro := evaluation.get("macro"):
        label = f"macro average of {macro['num_classes']} classes"
        rows = [{"label": label, "num_pictures": evaluation["test"]["num_pictures"], **macro}, *rows]
    table = _table(
        ["class", "test pictures", "precision", "recall", "F1"],
        [[r["label"], r["num_pictures"], r["precision"], r["recall"], r["f1"]] for r in rows],
    )
    wrong = [[w["expected"], w["said"], w["probability"]] for w in evaluation.get("confident_errors", [])]
    errors = f"<details><summary>Most confident errors</summary>{_table(['expected', 'said', 'probability'], wrong)}</details>"
    pairs = _pairs_html(evaluation.get("confused_pairs", []), folder)
    return plots + pairs + "<h2>Per class, worst first</h2>" + table + errors


def page(facts: dict[str, Any], root: Path) -> str:
    """The report as one HTML page with plotly.js inside."""
    notes = "".join(f"<p class=muted>Note: {_e(note)}.</p>" for note in facts["notes"])
    history = facts["history"]
    training = ""
    if history:
        training = f"<div class=grid>{_plot(charts.curves(history, 'loss'))}{_plot(charts.curves(history, 'top1'))}</div>"
    if parameters := facts["training_job"].get("hyperparameters"):
        rows: list[list[object]] = [[name, value] for name, value in sorted(parameters.items())]
        training += f"<details><summary>Hyperparameters</summary>{_table(['name', 'value'], rows)}</details>"
    sections = [
        ("Rules", _rules_html(facts)),
        ("Data set", _dataset_html(facts["dataset"])),
        ("Tuning", _trials_html(facts)),
        ("Training", training or "<p class=muted>No history of epochs.</p>"),
        ("Machine", _machine_html(root, facts)),
        ("Test", _evaluation_html(facts["evaluation"], root / "evaluation")),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    return _html(f"Run {facts['run']}", _cards(facts) + notes + body)


def _machine_html(root: Path, facts: dict[str, Any]) -> str:
    events, steps = profiling.read_system(root / "profiler-output"), profiling.read_steps(root / "profiler-output")
    if not events:
        return "<p class=muted>No system metrics.</p>"
    start = events[0]["Timestamp"]
    plots = [charts.usage(profiling.cpu_series(events), profiling.cpu_series(events, "memory"), start)]
    if steps:
        plots.append(charts.phases(steps, start, profiling.PHASES))
    return "".join(_plot(figure) for figure in plots)


def _html(title: str, body: str) -> str:
    from plotly.offline import get_plotlyjs

    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{_e(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        # A plot drawn before its neighbour exists takes the whole row; told once that the page is whole, it takes its share.
        f"<body><h1>{_e(title)}</h1>{body}"
        "<script>addEventListener('load',()=>dispatchEvent(new Event('resize')))</script></body></html>\n"
    )


def _profiler_page(facts: dict[str, Any], root: Path) -> str:
    rows: list[list[object]] = [
        [name, "fired" if part["RuleTriggered"] else "fine", part["Detail"], part["Remedy"]]
        for name, part in facts["profiler"].items()
    ]
    table = _table(["rule", "state", "what it saw", "what to do"], rows)
    return _html(f"Profiler report of run {facts['run']}", table + _machine_html(root, facts))


def write(flags: ReportFlags) -> dict[str, Any]:
    """The whole of report.py; returns the facts."""
    facts, root = collect(flags), Path(flags.run_dir)
    report = Path(flags.report)
    report.mkdir(parents=True, exist_ok=True)
    tensors = root / "debug-output"
    if not any("tensors could not be read" in note for note in facts["notes"]):
        facts["saved_losses"] = loss_series(tensors)
    (report / "report.json").write_text(json.dumps(facts, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    (report / "report.html").write_text(page(facts, root), encoding="utf-8")
    rules = Path(flags.rules) / "ProfilerReport" / "profiler-output"
    parts = rules / "profiler-reports"
    parts.mkdir(parents=True, exist_ok=True)
    (rules / "profiler-report.html").write_text(_profiler_page(facts, root), encoding="utf-8")
    for name, part in facts["profiler"].items():
        (parts / f"{name}.json").write_text(json.dumps({"RuleName": name, **part}, indent=1) + "\n", encoding="utf-8")
    for finding in facts["findings"]:
        folder = Path(flags.rules) / finding["RuleName"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{finding['RuleName']}.json").write_text(json.dumps(finding, indent=1) + "\n", encoding="utf-8")
    return facts
