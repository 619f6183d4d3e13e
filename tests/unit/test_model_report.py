"""The report's facts, files and texts: whole runs, runs of which anything is missing, hostile names, cost, comparison."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from classifier import charts, comparing, markup, preparation, prices, report_sections, reporting, storage
from classifier.errors import DataError
from classifier.findings import Finding
from classifier.report_page import Section, page
from model_fakes import flags as prepare_flags
from model_fakes import write_folder
from report_fakes import HOSTILE, FakeSageMaker, flags, history, prepared, write_json, write_profile, write_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # smdebug, which reads profiles, is unmaintained


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> FakeSageMaker:
    fake = FakeSageMaker()
    monkeypatch.setattr(reporting, "_client", lambda: fake)
    return fake


def report(base: Path, **changes: object) -> tuple[dict, str]:
    facts = reporting.write(flags(base, **changes))
    return facts, (base / "report" / "report.html").read_text(encoding="utf-8")


def section(page_text: str, ident: str) -> str:
    begin = page_text.index(f'<section id="{ident}"')
    return page_text[begin : page_text.index("</section>", begin)]


# --- a whole run -------------------------------------------------------------------------------------------------------------


def test_the_report_of_a_whole_run_has_every_part_and_every_file(tmp_path: Path):
    write_run(tmp_path / "run")
    facts, html = report(tmp_path)
    for ident in ("findings", "dataset", "tuning", "training", "machine", "steps", "evaluation", "cost", "versions", "reproduce"):
        assert "could not be made" not in section(html, ident)
    idents = (
        "balance",
        "parallel",
        "objective",
        "curve-loss",
        "curve-top1",
        "timeline-algo-1",
        "step-time",
        "confusion",
        "calibration",
    )
    for chart in idents:
        assert f'<script type="application/json" data-for="{chart}">' in html
    assert "no torch.profiler window" in section(html, "operators").lower()
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html", "report.json", "summary.json", "trials.csv", "per_class.csv"
    }  # fmt: skip
    profiler = tmp_path / "rules" / "ProfilerReport" / "profiler-output"
    assert len(list((profiler / "profiler-reports").glob("*.json"))) == 11
    assert 'data-for="timeline-algo-1"' in (profiler / "profiler-report.html").read_text()
    assert json.loads((tmp_path / "report" / "report.json").read_text())["run"] == "r"
    assert len(html.encode()) < 6_000_000
    assert facts["versions"]["code (hash)"] == "c0de"


def test_fired_rules_come_first_with_what_was_seen_where_and_what_to_change(tmp_path: Path):
    write_run(tmp_path / "run")
    quiet = Finding("Quiet", False, "nothing seen").to_json()
    fired = Finding("Loud", True, "loss 9.9", "a lower rate", [7, 9]).to_json() | {"Threshold": "above 9", "Source": "a paper"}
    facts, _ = report(tmp_path)
    facts["findings"], facts["profiler"] = [quiet, fired], {}
    html = report_sections.findings(facts)
    assert html.index("Loud") < html.index("Quiet")
    for part in ("1 of 2 rules fired", "loss 9.9", "7, 9", "a lower rate", "above 9", "a paper"):
        assert part in html


def test_rules_without_a_training_are_not_taken_for_passed(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert "nothing to judge" not in section(report(tmp_path)[1], "findings")
    remove("evaluation")(run)
    _, html = report(tmp_path)
    assert "most rules had nothing to judge" in section(html, "findings")
    assert "no training to judge" in html


def test_each_job_has_its_duration_and_an_estimated_cost(tmp_path: Path):
    write_run(tmp_path / "run")
    facts, html = report(tmp_path)
    kinds = [job["kind"] for job in facts["jobs"]]
    assert kinds == ["processing, prepare.py", "processing, evaluate.py", *["trial"] * 6, "training"]
    seconds = 90 + 90 + sum(60 + n for n in range(6)) + 360
    assert facts["seconds"] == seconds
    assert facts["cost_usd"] == pytest.approx(seconds * prices.USD_PER_HOUR["ml.m5.xlarge"] / 3600)
    assert facts["cost_complete"]
    assert "estimate" in section(html, "cost")
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["cost_usd"] == pytest.approx(facts["cost_usd"])


@pytest.mark.parametrize(("instance", "reason"), [("local", "one's own"), ("ml.zz9.huge", "no list price for ml.zz9.huge")])
def test_a_machine_without_a_list_price_has_no_cost_and_the_reason(
    tmp_path: Path, service: FakeSageMaker, instance: str, reason: str
):
    service.instance = instance
    write_run(tmp_path / "run")
    facts, html = report(tmp_path)
    assert facts["cost_usd"] is None
    assert not facts["cost_complete"]
    assert markup.escape(reason) in section(html, "cost")
    assert "–" in section(html, "cost")


def test_trials_that_stopped_early_are_marked(tmp_path: Path):
    write_run(tmp_path / "run")
    facts, html = report(tmp_path)
    assert [trial["name"] for trial in facts["trials"] if trial["stopped_early"]] == ["trial-2"]
    assert "1 stopped early, 1 failed" in section(html, "tuning")
    chart = charts.objective(facts["trials"], "top1")
    assert chart is not None
    symbols = [symbol for trace in chart.figure["data"] for symbol in trace["marker"]["symbol"]]
    assert sum(symbol.endswith("-open") for symbol in symbols) == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "trials.csv").read_text())))
    assert [row["trial"] for row in rows if row["stopped_early"] == "True"] == ["trial-2"]


def test_the_input_is_exact_where_it_was_kept_and_rebuilt_where_not(tmp_path: Path):
    write_run(tmp_path / "run")
    _, html = report(tmp_path)
    assert "put together from what the jobs were told" in section(html, "reproduce")
    assert "learning_rate" not in section(html, "reproduce")  # it was searched, not given
    write_json(tmp_path / "run" / "input.json", {"source": "</pre><script>alert(1)</script>", "recipe": "head"})
    _, html = report(tmp_path)
    assert "as it was given" in section(html, "reproduce")
    assert "<script>alert" not in html


def test_several_nodes_and_gpus_are_drawn_apart_on_the_clock_of_their_steps(tmp_path: Path):
    write_run(tmp_path / "run", nodes=("algo-1", "algo-2"), gpu=True)
    _, html = report(tmp_path)
    assert 'data-for="timeline-algo-1"' in html
    assert 'data-for="timeline-algo-2"' in html
    machine = reporting._machine(tmp_path / "run" / "profiler-output", [])
    chart = charts.timeline(machine["events"], machine["steps"], "algo-1", ("DataLoading", "Forward", "Backward", "Optimizer"))
    names = [trace["name"] for trace in chart.figure["data"]]
    assert names == ["CPU", "memory", "GPU", "GPU memory", "DataLoading", "Forward", "Backward", "Optimizer"]
    assert max(chart.figure["data"][0]["y"]) == 79  # waiting for disks is no use of the CPU
    assert {trace.get("yaxis") for trace in chart.figure["data"][4:]} == {"y2"}
    assert chart.figure["layout"]["xaxis"]["anchor"] == "y2"  # one time axis under both


# --- what may be missing -----------------------------------------------------------------------------------------------------


def remove(*names: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Half of the file: the job that wrote it was stopped."""

    def change(run: Path) -> None:
        for path in sorted(run.glob(name)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def replace(name: str, value: object) -> Callable[[Path], None]:
    return lambda run: write_json(run / name, value)


@pytest.mark.parametrize(
    ("change", "ident", "sentence"),
    [
        (remove("prepare"), "dataset", "left no report"),
        (cut("prepare/report.json"), "dataset", "Data set"),
        (cut("prepare/*.json"), "dataset", "left no report"),
        (remove("evaluation"), "evaluation", "was not read"),
        (cut("evaluation/evaluation.json"), "evaluation", "was not read"),
        (remove("evaluation/training.json"), "training", "left neither"),
        (cut("evaluation/training.json"), "training", "left neither"),
        (remove("evaluation/examples"), "evaluation", "Most confused"),
        (remove("profiler-output"), "machine", "No system metrics"),
        (remove("profiler-output/system"), "machine", "No system metrics of this node"),
        (remove("profiler-output/framework"), "steps", "No step was recorded"),
        (cut("profiler-output/system/incremental/*/*.json"), "machine", "timeline-algo-1"),
        (cut("profiler-output/framework/pevents/*/*.json"), "steps", "No step was recorded"),
        (replace("evaluation/evaluation.json", {"test": {"top1": 0.5}}), "evaluation", "could not be made"),
        (replace("evaluation/evaluation.json", {"test": None, "per_class": 7}), "evaluation", "could not be made"),
        (replace("evaluation/training.json", {"history": [{"epoch": 1}, {"train_loss": None}]}), "training", "2 epochs"),
        (replace("evaluation/training.json", {"history": [{"epoch": 1, "train_loss": float("nan")}]}), "training", "1 epochs"),
        (replace("evaluation/training.json", []), "training", "left neither"),
        (replace("prepare/report.json", {"classes": []}), "dataset", "No classes are listed"),
        (remove("prepare", "evaluation", "profiler-output"), "findings", "rules fired"),
    ],
)  # fmt: skip
def test_whatever_is_missing_the_report_says_so(tmp_path: Path, change: Callable[[Path], None], ident: str, sentence: str):
    run = write_run(tmp_path / "run")
    change(run)
    _, html = report(tmp_path, outcome="stopped by hand")
    assert sentence in section(html, ident)
    assert "stopped by hand" in html
    strict = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=strict)
    assert html.count("<h2 ") == 12
    assert (tmp_path / "rules" / "ProfilerReport" / "profiler-output" / "profiler-report.html").is_file()


def test_a_run_that_left_nothing_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporting, "_client", lambda: (_ for _ in ()).throw(ConnectionError("no service")))
    facts, html = report(tmp_path, outcome="PrepareData failed: no pictures")
    assert "PrepareData failed: no pictures" in html
    assert 'class="canvas"' not in html  # no empty charts
    assert len([note for note in facts["notes"] if "no service" in note]) == 4


def stored_run(tmp_path: Path) -> Path:
    stored = write_run(tmp_path / "stored")
    (tmp_path / "run").mkdir()
    return stored


def test_everything_is_fetched_from_the_runs_prefix(tmp_path: Path):
    stored = stored_run(tmp_path)
    write_json(stored / "rule-output" / "Overfit" / "Overfit.json", Finding("Overfit", True, "live", "stop", [3]).to_json())
    write_json(stored / "rule-output" / "StepOutlier" / "StepOutlier.json", Finding("StepOutlier", True, "early").to_json())
    facts, html = report(tmp_path, run_uri=stored.as_uri())
    assert facts["evaluation"]["test"]["top1"] == 0.8
    assert "StepOutlier" not in [part["RuleName"] for part in facts["findings"]]  # judged anew, and named once
    assert facts["profiler"]["StepOutlier"]["Detail"] != "early"
    assert "data:image/jpeg;base64," in section(html, "evaluation")
    assert 'data-for="timeline-algo-1"' in html
    assert any("debug-output/ is empty" in note for note in facts["notes"])
    overfit = next(part for part in facts["findings"] if part["RuleName"] == "Overfit")
    assert (overfit["RuleTriggered"], overfit["Detail"]) == (1, "live")  # no tensors: what was said while it ran counts


def test_a_second_report_fetches_what_has_grown(tmp_path: Path):
    stored = stored_run(tmp_path)
    report(tmp_path, run_uri=stored.as_uri())
    before = len(reporting._machine(tmp_path / "run" / "profiler-output", [])["steps"])
    write_profile(stored / "profiler-output", steps=80)
    facts, _ = report(tmp_path, run_uri=stored.as_uri())
    assert len(reporting._machine(tmp_path / "run" / "profiler-output", [])["steps"]) == 2 * before
    assert facts["history"]


def test_eight_files_are_fetched_at_once_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training leaves thousands of small ones, and S3 needs as long for each as for a large one."""
    stored, together, fetched = tmp_path / "stored" / "debug-output", threading.Barrier(8), []
    stored.mkdir(parents=True)
    for number in range(16):
        (stored / f"{number}.tfevents").write_bytes(b"x" * number)
    copy = storage.download

    def download(uri: str, target: Path) -> None:
        together.wait(timeout=30)  # one after the other they would wait in vain
        fetched.append(target.name)
        copy(uri, target)

    monkeypatch.setattr(storage, "download", download)
    for _ in range(2):
        assert reporting._fetch(stored.as_uri(), tmp_path / "run") == 16
    assert sorted(fetched) == sorted(path.name for path in stored.iterdir())


def test_without_an_evaluation_the_epochs_come_from_the_training_jobs_artifact(tmp_path: Path):
    stored = stored_run(tmp_path)
    shutil.rmtree(stored / "evaluation")
    record = tmp_path / "training.json"
    write_json(record, {"history": history(4)})
    (stored / "training" / "job" / "output").mkdir(parents=True)
    with tarfile.open(stored / "training" / "job" / "output" / "model.tar.gz", "w:gz") as tar:
        tar.add(record, arcname="./training.json")
    facts, html = report(tmp_path, run_uri=stored.as_uri())
    assert len(facts["history"]) == 4
    assert 'data-for="curve-loss"' in html


def test_an_object_outside_of_the_run_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = storage.Entry("../../escaped", (tmp_path / "x").as_uri(), 1, "t")
    monkeypatch.setattr(storage, "listing", lambda uri: iter([entry]))
    with pytest.raises(DataError, match="outside"):
        reporting._fetch("file:///x/prepare/", tmp_path / "run" / "prepare")


def test_a_stored_finding_cannot_choose_its_path(tmp_path: Path):
    write_run(tmp_path / "run")
    write_json(
        tmp_path / "run" / "rule-output" / "x" / "x.json", {"RuleName": "../../../escaped", "RuleTriggered": 1, "Detail": "d"}
    )
    report(tmp_path)
    assert not list(tmp_path.rglob("escaped*"))


def test_only_pictures_of_the_jobs_are_shown(tmp_path: Path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for name in ("../secret.jpg", "secret.jpg", "examples/1-1-1.jpg\n", None, 7):
        assert report_sections.image(tmp_path, name, "") == ""


@pytest.mark.parametrize("reused", [False, True])
def test_refused_pictures_are_shown_where_they_can_be_decoded(tmp_path: Path, reused: bool):
    pictures = write_folder(tmp_path / "pictures")
    known = next((pictures / "test").rglob("*.png"))
    shutil.copyfile(known, pictures / "train" / known.parent.name / "leak.png")
    (known.parent / "broken.png").write_bytes(b"no picture")
    for _ in range(1 + reused):
        shutil.rmtree(tmp_path / "result", ignore_errors=True)
        preparation.prepare(prepare_flags(pictures.as_uri(), tmp_path))
    assert json.loads((tmp_path / "result" / "result.json").read_text())["reused"] == reused
    shutil.copytree(tmp_path / "result", tmp_path / "run" / "prepare")
    _, html = report(tmp_path)
    rows = {row.split("</bdi>")[0].rsplit(">", 1)[-1]: row for row in section(html, "dataset").split("<tr>")}
    assert "data:image/jpeg;base64," in rows[f"train/{known.parent.name}/leak.png"]
    assert "not decodable" in rows[f"test/{known.parent.name}/broken.png"]


# --- names of others ---------------------------------------------------------------------------------------------------------


def test_hostile_names_are_inert_in_the_page(tmp_path: Path):
    write_run(tmp_path / "run", HOSTILE)
    _, html = report(tmp_path, run=HOSTILE[0], outcome=HOSTILE[1])
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert "\u202e" not in html
    assert "⟨U+202E⟩" in html
    scripts = html.count("<script")
    assert html.count("</script>") == scripts  # no name ended one of them
    figures = html.split('<script type="application/json"')[1:]
    for figure in figures:
        text = figure[figure.index(">") + 1 : figure.index("</script>")]
        assert not set("<>&") & set(text)
        labels = json.dumps(json.loads(text)["data"])
        assert "<b>" not in labels
        assert "%{x}" not in labels


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_no_formula_and_no_line_in_csv(name: str):
    rows = list(csv.reader(io.StringIO(markup.in_csv(["name", "n"], [[name, 1], [f" {name}", -2.5]]))))
    assert len(rows) == 3
    for row, number in zip(rows[1:], ("1", "-2.5"), strict=True):
        assert not row[0].lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))
        assert row[1] == number
        assert "\u202e" not in row[0]


@pytest.mark.parametrize(
    ("value", "cell"), [("-1.5e-3", "-1.5e-3"), ("-1+cmd", "'-1+cmd"), (float("nan"), ""), (None, ""), ("+", "'+")]
)
def test_numbers_in_csv_stay_numbers(value: object, cell: str):
    assert markup.in_csv(["x"], [[value]]).splitlines()[1].strip('"') == cell


def test_what_is_hidden_in_a_text_is_shown():
    assert markup.plain("a\u202eb\u2066c\u200bd\ne\x00") == "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200B⟩d⟨U+000A⟩e⟨U+0000⟩"
    assert markup.plain("x" * 1000) == "x" * markup.MAX_TEXT + "…"
    assert markup.plain("Grüße 犬 é") == "Grüße 犬 é"
    assert len(markup.in_plot("\u202e" * 100)) == 28


def test_the_policy_lets_only_the_pages_own_scripts_run_and_nothing_be_fetched():
    still, live = (page("t", "", [Section("a", "A", "")], live=flag) for flag in (False, True))
    policy = still.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none'")
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe" not in scripts
    assert "connect-src" not in policy
    assert "connect-src 'self'" in live
    assert 'id="pause"' in live
    assert 'id="pause"' not in still


def test_numbers_that_json_cannot_say_are_null():
    assert (
        markup.in_json({"x": [float("nan"), float("inf"), 1.5], "s": "</script>"})
        == '{"x":[null,null,1.5],"s":"\\u003c/script\\u003e"}'
    )


# --- plots -------------------------------------------------------------------------------------------------------------------


def test_plots_of_large_runs_stay_small():
    classes = [{"folder": f"class {n}", "train": n, "valid": 1, "test": 1} for n in range(500)]
    chart = charts.balance(classes)
    assert len(chart.figure["data"][0]["x"]) == charts.MAX_BARS
    assert "30 smallest and the 30 largest" in chart.summary
    assert len(chart.rows) == 500
    losses = charts.losses([(n, 1 / (n + 1)) for n in range(50_000)])
    assert len(losses.figure["data"][0]["x"]) == charts.MAX_POINTS
    assert losses.figure["data"][0]["x"][-1] == 49_999
    table = [[int(i == j) for j in range(120)] for i in range(120)]
    confusion = charts.confusion(table, [str(n) for n in range(120)])
    assert len(confusion.figure["data"][0]["z"]) == charts.MAX_CONFUSION


def test_the_steps_of_one_process_stand_for_the_node():
    steps = [{"node": "algo-1", "rank": rank, "phase": "Forward", "start": 1.0, "duration": 0.01, "step": 0} for rank in (0, 1)]
    chart = charts.timeline([], steps, "algo-1", ("Forward",))
    assert chart.figure["data"][0]["y"] == [10.0]


def test_logarithmic_axes_name_their_ticks_in_full():
    axis = charts._log_axis([0.012, 0.09])
    assert axis["ticktext"] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    narrow = charts._log_axis([0.021, 0.047])
    assert sum(0.021 <= tick <= 0.047 for tick in narrow["tickvals"]) >= 2
    assert charts._log_axis([1e-6, 1.0])["ticktext"] == ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]


def test_lines_differ_without_colour():
    chart = charts.curves(history(), "loss")
    styles = {(trace["line"]["dash"], trace["marker"]["symbol"]) for trace in chart.figure["data"]}
    assert len(styles) == 2
    patterns = [trace["marker"]["pattern"]["shape"] for trace in charts.balance(prepared(HOSTILE)["classes"]).figure["data"]]
    assert len(set(patterns)) == 3


def test_parallel_coordinates_place_words_and_numbers():
    values: list[str | None] = ["1e-4", "1e-2", "1e-3", None]
    places, ticks = charts._axis(values)
    assert places == [0.0, 1.0, pytest.approx(0.5), None]  # two decades: by logarithm
    assert [label for _, label in ticks] == ["0.0001", "0.01"]
    assert charts._axis(["sgd", "adamw", "sgd"])[0] == [1.0, 0.0, 1.0]
    assert charts._axis(["3", "3"])[0] == [0.5, 0.5]
    assert charts._axis(["nan", None])[0] == [None, None]


def test_operators_are_ranked_by_device_time_where_there_is_one():
    rows = [
        {"node": "algo-1", "name": "aten::conv2d", "calls": 9, "cpu_ms": 90.0, "device_ms": 1.0, "share": 0.1},
        {"node": "algo-1", "name": "<b>kernel</b>", "calls": 9, "cpu_ms": 1.0, "device_ms": 80.0, "share": 0.9},
    ]
    chart = charts.operators(rows)
    assert chart.figure["data"][0]["x"] == [80.0, 1.0]
    assert "‹b›kernel" in chart.figure["data"][0]["y"][0]
    on_cpu = charts.operators([{**row, "device_ms": 0.0} for row in rows])
    assert on_cpu.figure["data"][0]["x"] == [90.0, 1.0]


def test_the_cost_of_watching_is_shown_in_percent():
    machine = {"events": [], "steps": [], "operators": [], "overhead": {"hook_share": 0.012, "sampler_share": 0.003}}
    html = report_sections.overhead(machine)
    assert "1.50 %" in html
    assert "hook" in html


# --- runs compared -----------------------------------------------------------------------------------------------------------


def write_bucket(root: Path, count: int) -> str:
    (root / "runs").mkdir(parents=True)
    for number in range(count):
        summary = {
            "run": f"run-{number:03}", "top1": 0.5 + number / 1000, "cost_usd": 0.1 * number, "seconds": 60.0,
            "dataset_hash": "d00d", "hyperparameters": {"recipe": "head", "learning_rate": "0.05"},
            "rules_fired": ["Overfit"],
        }  # fmt: skip
        write_json(root / "runs" / f"run-{number:03}" / "report" / "summary.json", summary)
    return root.as_uri()


@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_runs_is_compared(tmp_path: Path, count: int):
    uri = write_bucket(tmp_path / "bucket", count)
    write_json(tmp_path / "bucket" / "champion.json", {"run": "run-000"})
    rows = comparing.compare(comparing.CompareFlags(uri, str(tmp_path / "out")))
    assert len(rows) == count
    assert [row["run"] for row in rows if row["champion"]] == ["run-000"][:count]
    tops = [row["top1"] for row in rows]
    assert tops == sorted(tops, reverse=True)
    html = (tmp_path / "out" / "runs.html").read_text()
    assert ("The bucket holds no runs" in html) == (count == 0)
    assert ('data-for="runs-cost_usd"' in html) == (count > 0)
    assert len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == count + 1


def test_runs_without_a_readable_summary_are_listed_with_the_reason(tmp_path: Path):
    uri = write_bucket(tmp_path / "bucket", 1)
    runs = tmp_path / "bucket" / "runs"
    (runs / "going-on" / "debug-output").mkdir(parents=True)
    for name, text in (("cut", '{"top1": 0.'), ("list", "[]"), ("large", json.dumps({"x": "y" * comparing.SUMMARY_BYTES}))):
        (runs / name / "report").mkdir(parents=True)
        (runs / name / "report" / "summary.json").write_text(text)
    hostile = {"run": "spoofed", "top1": "<script>", "hyperparameters": [], "rules_fired": "x", "outcome": HOSTILE[0]}
    write_json(runs / "=hostile" / "report" / "summary.json", hostile)
    rows = {row["run"]: row for row in comparing.compare(comparing.CompareFlags(uri, str(tmp_path / "out")))}
    assert rows["going-on"]["problem"] == "no report yet"
    assert "JSONDecodeError" in rows["cut"]["problem"]
    assert "larger than" in rows["large"]["problem"]
    assert rows["list"]["problem"]
    assert (rows["=hostile"]["top1"], rows["=hostile"]["hyperparameters"]) == (None, {})
    assert "<script>alert" not in (tmp_path / "out" / "runs.html").read_text()
    assert "'=hostile" in (tmp_path / "out" / "runs.csv").read_text()


def test_of_a_run_only_its_summary_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = write_bucket(tmp_path / "bucket", 3)
    read: list[str] = []
    real = storage.read_optional
    monkeypatch.setattr(storage, "read_optional", lambda found: read.append(found) or real(found))
    comparing.read_runs(uri)
    assert sorted(found.rsplit("/", 1)[-1] for found in read) == ["champion.json", *["summary.json"] * 3]


def test_the_summary_of_any_run_fits_what_the_comparison_reads(tmp_path: Path, service: FakeSageMaker):
    write_run(tmp_path / "run", HOSTILE)
    report(tmp_path, outcome="x" * 100_000)
    assert (tmp_path / "report" / "summary.json").stat().st_size < comparing.SUMMARY_BYTES
