"""The report's sections: from the facts of a run to markup. A section without facts says why in a sentence."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from classifier import charts
from classifier.markup import Html, absent, details, escape, name, plain, plot, setting, table
from classifier.prices import PRICED_ON, REGION
from classifier.profiling import PHASES
from classifier.report_page import Section

Facts = dict[str, Any]
Rows = list[list[object]]

_PICTURES = re.compile(r"(examples/\d+-\d+-\d+|refused/\d+)\.jpg")
MAX_LISTED = 100


def duration(seconds: float | None) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``12.3 s``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes}\u00a0min\u00a0{rest:02d}\u00a0s" if minutes < 60 else f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02d}\u00a0min"
    )


def dollars(cost: float | None) -> str:
    """US dollars with as many digits as tell something."""
    return "–" if cost is None else f"${cost:.2f}" if cost >= 1 else f"${cost:.4f}"


def sections(facts: Facts, root: Path, machine: Facts) -> list[Section]:
    """All sections in order. ``machine``: ``events``, ``steps``, ``operators``, ``overhead`` of ``profiling``'s readers.

    A section that cannot be made of half-written facts says so and takes no other section with it.
    """
    makers: list[tuple[str, str, Callable[[], str]]] = [
        ("findings", "Findings", lambda: findings(facts)),
        ("dataset", "Data set", lambda: dataset(facts, root / "prepare")),
        ("tuning", "Tuning", lambda: tuning(facts)),
        ("training", "Training", lambda: training(facts)),
        *machine_makers(facts, machine),
        ("evaluation", "Evaluation", lambda: evaluation(facts, root / "evaluation")),
        ("cost", "Cost", lambda: cost(facts)),
        ("versions", "Versions", lambda: versions(facts)),
        ("reproduce", "Reproduce", lambda: reproduce(facts)),
    ]
    return [Section(ident, title, guarded(make)) for ident, title, make in makers]


def machine_makers(facts: Facts, machine: Facts) -> list[tuple[str, str, Callable[[], str]]]:
    """The sections on the machine; the profiler's page has them too."""
    return [
        ("machine", "Machine", lambda: usage(machine)),
        ("steps", "Step time", lambda: steps(machine)),
        ("operators", "Operators", lambda: operators(machine)),
        ("overhead", "Overhead", lambda: overhead(machine)),
    ]


def guarded(make: Callable[[], str]) -> str:
    """The section, or a sentence when its facts are not of the expected form: a report is never lost over a part of it."""
    try:
        return make()
    except Exception as problem:
        return absent(f"This part could not be made of what the run left ({type(problem).__name__}: {problem}).")


# --- head --------------------------------------------------------------------------------------------------------------------


def head(facts: Facts) -> str:
    """Outcome, key figures, and the notes on what is missing."""
    outcome = f'<p class="outcome" role="note"><strong>Outcome:</strong> {name(facts["outcome"])}</p>' if facts["outcome"] else ""
    notes = "".join(f"<li>{name(note)}</li>" for note in facts["notes"])
    listed = details("notes", f"Notes on what is missing ({len(facts['notes'])})", f"<ul>{notes}</ul>") if notes else ""
    written = f'<p class="soft">Written {escape(facts["written"])}.</p>'
    return outcome + guarded(lambda: _cards(facts)) + listed + written


def _cards(facts: Facts) -> str:
    cards = "".join(
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd><dd><small>{escape(note)}</small></dd></div>'
        for label, value, note in _figures(facts)
    )
    return f'<dl class="cards">{cards}</dl>'


def _figures(facts: Facts) -> list[tuple[str, object, str]]:
    found = facts["evaluation"]
    test, champion = found.get("test") or {}, found.get("champion") or {}
    before = test.get("ece_before")
    fired, count = sum(row["fired"] for row in rule_rows(facts)), len(rule_rows(facts))
    partly = "" if facts["cost_complete"] else "not all jobs are known or priced"
    return [
        ("Test top1", test.get("top1"), _interval(test.get("top1_interval"))),
        ("Test top5", test.get("top5"), _interval(test.get("top5_interval"))),
        ("Calibration error", test.get("ece_after"), "" if before is None else f"{plain(before)} before scaling"),
        ("Champion top1", champion.get("top1"), "on the same test split"),
        ("Rules fired", f"{fired} of {count}", "see the findings" if trained(facts) else "no training to judge"),
        ("Cost, estimated", dollars(facts["cost_usd"]), partly or f"list prices of {REGION}, {PRICED_ON}"),
        ("Duration of the jobs", duration(facts["seconds"]), "all jobs added up"),
        ("Milliseconds per picture", (found.get("latency_ms") or {}).get("p50"), "median, decoding included"),
    ]


def _interval(bounds: list[float] | None) -> str:
    return f"{plain(float(bounds[0]))} to {plain(float(bounds[1]))} (95 %)" if bounds else ""


# --- findings ----------------------------------------------------------------------------------------------------------------


def trained(facts: Facts) -> bool:
    """Whether a training has left anything that rules can judge."""
    return bool(facts["history"] or facts["saved_losses"])


def rule_rows(facts: Facts) -> list[Facts]:
    """Every rule once, those that fired first."""
    parts = [*facts["findings"], *({"RuleName": rule, **part} for rule, part in facts["profiler"].items())]
    rows = [
        {
            "rule": part.get("RuleName", "–"),
            "fired": bool(part.get("RuleTriggered")),
            "detail": part.get("Detail", ""),
            "remedy": part.get("Remedy", ""),
            "steps": part.get("Steps") or [],
            "threshold": part.get("Threshold", ""),
            "source": part.get("Source", ""),
        }
        for part in parts
    ]
    return sorted(rows, key=lambda row: not row["fired"])


def findings(facts: Facts) -> str:
    """Fired rules one by one: what was seen, at which step, what to change; the others in a table."""
    rows = rule_rows(facts)
    if not rows:
        return absent("No rule has run: neither tensors nor epochs were left by the training.")
    fired = [row for row in rows if row["fired"]]
    quiet: Rows = [[row["rule"], row["detail"], row["threshold"], row["source"]] for row in rows if not row["fired"]]
    quiet_why = "" if trained(facts) else " The training has left no loss and no epoch: most rules had nothing to judge."
    lead = f"<p>{len(fired)} of {len(rows)} rules fired.{quiet_why}</p>"
    fine = table("quiet-rules", "Rules that did not fire", ["rule", "what it saw", "threshold", "source"], quiet) if quiet else ""
    return lead + "".join(map(_finding, fired)) + details("quiet", f"Rules that did not fire ({len(quiet)})", fine)


def _finding(row: Facts) -> str:
    parts = [("Seen", row["detail"]), ("At step", _steps(row["steps"])), ("Change", row["remedy"])]
    parts += [("Threshold", row["threshold"]), ("Source", row["source"])]
    lines = "".join(f"<dt>{label}</dt><dd>{name(value)}</dd>" for label, value in parts if value)
    return f'<div class="finding"><h3><span class="fired">Fired:</span> {name(row["rule"])}</h3><dl>{lines}</dl></div>'


def _steps(steps: list[int]) -> str:
    if not steps:
        return ""
    return ", ".join(str(step) for step in steps[:8]) + (f" … ({len(steps)} steps)" if len(steps) > 8 else "")


# --- data set ----------------------------------------------------------------------------------------------------------------


def dataset(facts: Facts, folder: Path) -> str:
    """Classes and their balance, and the pictures that were refused."""
    found = facts["dataset"]
    if not found:
        return absent("The preparation left no report: it failed, was stopped, or has not ended yet.")
    counts = found.get("num_pictures", {})
    lead = (
        f"<p>Data set <code>{escape(found.get('dataset_hash'))}</code> from <code>{name(found.get('source'))}</code>: "
        f"{len(found.get('classes', []))} classes, split {escape(found.get('split'))}, pictures of "
        f"{escape(found.get('picture_size'))} pixels on the short side. "
        f"Left out: {escape(found.get('num_quarantined'))} quarantined "
        f"and {escape(found.get('num_duplicates'))} duplicates, {escape(found.get('num_leaks'))} of them leaked between splits.</p>"
    )
    lead += "".join(f'<p class="soft">{name(note)}</p>' for note in found.get("notes", []))
    totals = table("splits", "Pictures by split", ["split", "pictures"], [[s, counts.get(s)] for s in ("train", "valid", "test")])
    classes = found.get("classes", [])
    return (
        lead + totals + (plot(charts.balance(classes)) if classes else absent("No classes are listed.")) + _refused(found, folder)
    )


def _refused(found: Facts, folder: Path) -> str:
    """Refused files with their reasons, and the pictures of those that could be decoded."""
    pictures = _thumbnails(folder / "refused" / "thumbnails.json")
    entries = [*found.get("quarantined", []), *found.get("duplicates", [])]
    if not entries:
        return "<p>No picture was refused.</p>"
    reasons: Rows = [[reason, count] for reason, count in (found.get("quarantine_reasons") or {}).items()]
    by_reason = table("reasons", "Reasons of the quarantine", ["reason", "files"], reasons) if reasons else ""
    rows: Rows = [
        [
            file := str(entry.get("file")),
            entry.get("kind"),
            entry.get("split"),
            _why(entry),
            _picture(folder, pictures.get(file), file),
        ]
        for entry in entries[:MAX_LISTED]
    ]
    shown = table("refused", "Refused pictures", ["file", "kind", "split", "why", "picture"], rows)
    total = int(found.get("num_quarantined") or 0) + int(found.get("num_duplicates") or 0)
    more = (
        "" if total <= len(rows) else f'<p class="soft">The first {len(rows)} of {total:,}; all are in prepare/refused.jsonl.</p>'
    )
    return (
        "<h3>Refused pictures</h3>" + by_reason + details("refused-files", f"Refused files ({total:,})", shown + more, opened=True)
    )


def _why(entry: Facts) -> str:
    return str(entry.get("reason") or f"the same picture as {plain(entry.get('same_as'), 120)}")


def _thumbnails(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _picture(folder: Path, picture: object, file: str) -> Html:
    shown = image(folder, picture, f"Refused picture {plain(file, 60)}")
    return Html(f'<span class="pictures">{shown}</span>' if shown else "<small>not decodable, or not kept</small>")


def image(folder: Path, file: object, text: str) -> str:
    """A picture that a job left, inline; nothing where there is none. Only names of the jobs' own form are opened."""
    if not isinstance(file, str) or not _PICTURES.fullmatch(file) or not (folder / file).is_file():
        return ""
    data = base64.b64encode((folder / file).read_bytes()).decode("ascii")
    return f'<img alt="{escape(text)}" title="{escape(text)}" src="data:image/jpeg;base64,{data}">'


# --- tuning and training -----------------------------------------------------------------------------------------------------


def tuning(facts: Facts) -> str:
    """Every trial, in plots and in a table."""
    rows, about = facts["trials"], facts["tuning"]
    if not rows:
        return absent("No trial is known: the search had not begun, or its job could not be read (see the notes).")
    metric = str(about.get("objective") or "objective")
    stopped, failed = sum(row["stopped_early"] for row in rows), sum(row["status"] == "Failed" for row in rows)
    lead = (
        f"<p>Tuning job {name(about.get('name'))}: {len(rows)} trials, "
        f"strategy {name(about.get('strategy'))}, objective {name(metric)}; "
        f"{stopped} stopped early, {failed} failed.</p>"
    )
    plots = "".join(plot(chart) for chart in (charts.parallel(rows, metric), charts.objective(rows, metric)) if chart)
    keys = sorted({key for row in rows for key in row["hyperparameters"]})
    listed: Rows = [
        [row["name"], row["status"], *(setting(row["hyperparameters"].get(key)) for key in keys), row["objective"], row["seconds"]]
        for row in rows
    ]
    head_row = ["trial", "status", *keys, metric, "seconds"]
    return (
        lead
        + (plots or absent("No trial has reached its objective."))
        + table("trials", "All trials, best first", head_row, listed)
    )


def training(facts: Facts) -> str:
    """Curves by epoch, or the saved losses by step where the epochs are not known; the hyperparameters."""
    history, saved, job = facts["history"], facts["saved_losses"], facts["training_job"]
    parts = []
    if history:
        parts.append(f'<div class="grid">{plot(charts.curves(history, "loss"))}{plot(charts.curves(history, "top1"))}</div>')
    if saved:
        parts.append(plot(charts.losses(saved)))
    if not parts:
        parts.append(absent("No curve: the training left neither its epochs nor saved losses."))
    elif not history:
        parts.insert(
            0, absent("The epochs are known only when the training has ended; the curve is of the losses saved until now.")
        )
    if metrics := job.get("metrics"):
        parts.append(
            details("last-metrics", "Last metrics of the job", _pairs("last-metrics-table", "Last metrics of the job", metrics))
        )
    if given := job.get("hyperparameters"):
        parts.append(details("hyperparameters", "Hyperparameters", _pairs("hyperparameters-table", "Hyperparameters", given)))
    return "".join(parts)


def _pairs(ident: str, caption: str, values: dict[str, Any]) -> str:
    return table(ident, caption, ["name", "value"], [[key, value] for key, value in sorted(values.items())])


# --- machine -----------------------------------------------------------------------------------------------------------------


def usage(machine: Facts) -> str:
    """Use over time with the step phases under it, node by node."""
    events, rows = machine["events"], machine["steps"]
    if not events and not rows:
        return absent("No system metrics and no steps were recorded.")
    return "".join(plot(charts.timeline(events, rows, node, PHASES)) for node in charts.nodes_of(events, rows))


def steps(machine: Facts) -> str:
    """Share of the phases."""
    return plot(charts.step_time(machine["steps"], PHASES)) if machine["steps"] else absent("No step was recorded.")


def operators(machine: Facts) -> str:
    """Top operators of the profiled window."""
    rows = machine["operators"]
    return plot(charts.operators(rows)) if rows else absent("No torch.profiler window was recorded.")


def overhead(machine: Facts) -> str:
    """What the hook, the sampler and the phases cost, measured in the run."""
    shares = machine["overhead"]
    if not shares:
        return absent("The cost of watching was not measured in this run.")
    known = {
        key.removesuffix("_share").replace("_", " "): 100 * value for key, value in sorted(shares.items()) if key.endswith("_share")
    }
    together = sum(known.values())
    rows: Rows = [[part, value] for part, value in known.items()] + [["together", together]]
    trained_s = _trained_s(machine["steps"])
    # Of a training of seconds a large share is little: the hook saves its first steps whatever they cost.
    absolute = f", about {together / 100 * trained_s:.1f} s of {duration(trained_s)}" if trained_s else ""
    lead = f"<p>Watching took {together:.2f} % of the training time{absolute}, measured in this run.</p>"
    return lead + table("overhead-table", "Cost of watching", ["part", "share of the training time (%)"], rows)


def _trained_s(steps: list[Facts]) -> float:
    """Seconds that the first worker spent in steps."""
    workers = [(row["node"], row.get("rank")) for row in steps]
    return sum(float(row["duration"]) for row, worker in zip(steps, workers, strict=True) if worker == workers[0])


# --- test --------------------------------------------------------------------------------------------------------------------


def evaluation(facts: Facts, folder: Path) -> str:
    """Confusion, calibration, the most confused pairs with pictures, figures per class."""
    found = facts["evaluation"]
    if not found:
        return absent("The test split was not read: the run ended before, or the evaluation left nothing.")
    parts = [lambda: _plots(found), lambda: _confused(found.get("confused_pairs", []), folder), lambda: _per_class(found)]
    return "".join(map(guarded, parts))


def _plots(found: Facts) -> str:
    reliability = found["reliability"]
    confusion = plot(charts.confusion(found["confusion"], found["classes"]))
    return confusion + plot(charts.calibration(reliability["before"], reliability["after"]))


def _confused(pairs: list[Facts], folder: Path) -> str:
    """The most confused pairs: confused pictures, and one of either class that is classified right."""
    rows: Rows = []
    for pair in pairs:
        references = pair.get("references", {})
        wrong = "".join(
            image(
                folder,
                e.get("file"),
                f"A {plain(pair['expected'], 60)} taken for {plain(pair['said'], 60)}, p = {e['probability']:.2f}",
            )
            for e in pair["examples"]
        )
        right = {
            key: image(folder, references.get(key), f"{plain(pair[key], 60)}, classified right") for key in ("expected", "said")
        }
        cells = [Html(f'{name(pair[key])}<div class="pictures">{right[key]}</div>') for key in ("expected", "said")]
        share = Html(f"{pair['count']} <small>({pair['share']:.0%} of the class)</small>", pair["count"])
        rows.append([cells[0], Html(f'<div class="pictures">{wrong}</div>'), cells[1], share])
    if not rows:
        return "<h3>Most confused</h3>" + absent("No class was taken for another.")
    columns = ["true class", "taken for the other", "predicted class", "pictures"]
    return "<h3>Most confused</h3>" + table("pairs", "Most confused pairs of classes", columns, rows)


def _per_class(found: Facts) -> str:
    rows = sorted(found["per_class"], key=lambda row: (row["f1"] is not None, row["f1"] or 0))
    listed: Rows = [[row["label"], row["num_pictures"], row["precision"], row["recall"], row["f1"]] for row in rows]
    if macro := found.get("macro"):
        label = f"macro average of {macro['num_classes']} classes"
        listed.insert(0, [label, found["test"]["num_pictures"], macro["precision"], macro["recall"], macro["f1"]])
    columns = ["class", "test pictures", "precision", "recall", "F1"]
    parts = "<h3>Per class, worst first</h3>" + table("per-class", "Figures of every class", columns, listed, sortable=True)
    wrong: Rows = [[row["expected"], row["said"], row["probability"]] for row in found.get("confident_errors", [])]
    if wrong:
        errors = table("confident-errors", "Most confident errors", ["true class", "predicted class", "probability"], wrong)
        parts += details("errors", "Most confident errors", errors)
    return parts


# --- cost, versions, again ---------------------------------------------------------------------------------------------------


def cost(facts: Facts) -> str:
    """Every job with its duration and its estimated cost."""
    if not facts["jobs"]:
        return absent("No job is known: none was named, or SageMaker could not be asked (see the notes).")
    rows: Rows = [
        [
            job["name"],
            job["kind"],
            job["status"],
            _machine(job),
            Html(escape(duration(job["seconds"])), job["seconds"]),
            Html(
                escape(dollars(job["cost_usd"])) + (f" <small>{escape(job['why'])}</small>" if job["why"] else ""), job["cost_usd"]
            ),
        ]
        for job in facts["jobs"]
    ]
    lead = (
        f"<p>An estimate: seconds times the list price on demand of {REGION} as of {PRICED_ON}, without spot, discounts, storage "
        f"and traffic. Together {escape(dollars(facts['cost_usd']))} and {escape(duration(facts['seconds']))} of job time.</p>"
    )
    columns = ["job", "kind", "status", "machine", "duration", "cost (USD, estimated)"]
    return lead + table("jobs", "Jobs of the run", columns, rows, sortable=True)


def _machine(job: Facts) -> str:
    count = int(job.get("count") or 1)
    return f"{count} × {job['instance']}" if count > 1 else str(job["instance"] or "–")


def versions(facts: Facts) -> str:
    """Hashes of data and code, container images, packages."""
    known = {key: value for key, value in facts["versions"].items() if value}
    return _pairs("versions-table", "Data, code, images and packages", known) if known else absent("No version is known.")


def reproduce(facts: Facts) -> str:
    """The input of the execution and the command that starts it again."""
    given = facts["input"]
    if not given["value"]:
        return absent("Neither the execution's input nor its jobs are known.")
    text = json.dumps(given["value"], indent=2, ensure_ascii=True)
    how = "The input as it was given:" if given["exact"] else "The input, put together from what the jobs were told:"
    return (
        f"<p>{how}</p><pre>{html.escape(text)}</pre><p>Save it as <code>input.json</code>, then:</p>"
        f"<pre>aws stepfunctions start-execution --state-machine-arn &lt;StateMachineArn of the stack&gt; --input file://input.json</pre>"
    )
