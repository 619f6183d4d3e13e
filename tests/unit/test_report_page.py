"""The report in a real browser: drawn, inert, accessible, within its place, and without a network."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from classifier import comparing, reporting
from playwright import sync_api
from report_fakes import HOSTILE, FakeSageMaker, evaluated, flags, history, write_json, write_run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # smdebug, which reads profiles, is unmaintained

AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"
PHONE = {"viewport": {"width": 360, "height": 780}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
GETS_FRAMES = "new Promise(done => { requestAnimationFrame(() => done(true)); setTimeout(() => done(false), 5000); })"
CANVASES = "[...document.querySelectorAll('.canvas')]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The reports of a run whose names are hostile and whose training failed, and of several runs."""
    base = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "_client", FakeSageMaker)
        patch.setattr(reporting.profiling, "read_operators", lambda _: [{"name": n, "cpu_ms": 5.0, "calls": 2} for n in HOSTILE])
        write_run(base / "run", HOSTILE, nodes=("algo-1", "algo-2"), gpu=True)
        write_json(base / "run" / "profiler-output" / "overhead.json", {"hook_share": 0.01})
        reporting.write(flags(base, run=HOSTILE[0], outcome=f"Train failed: {HOSTILE[1]}"))
    for number, name in enumerate(("one", "two", "=three")):
        summary = {
            "run": name,
            "top1": 0.5 + number / 10,
            "cost_usd": 1.0 + number,
            "seconds": 60.0,
            "hyperparameters": {"a": HOSTILE[2]},
        }
        write_json(base / "bucket" / "runs" / name / "report" / "summary.json", summary)
    write_json(base / "bucket" / "champion.json", {"run": "two"})
    comparing.compare(comparing.CompareFlags((base / "bucket").as_uri(), str(base / "report")))
    return base


class Opened:
    """A page with everything it asked for and complained of."""

    def __init__(self, browser: Any, url: str, options: dict[str, Any]) -> None:
        self.page = browser.new_context(**options).new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.goto(url)

    def draw_all(self) -> None:
        """Scroll through the page as a reader does, until every plot is drawn."""
        try:
            self._scroll()
        except sync_api.TimeoutError:
            # Rarely (1 of 466 pages, on a busy machine) Chromium gives a page no more frames until it is loaded anew. A page cannot
            # do that to itself: what blocks its frames blocks its timers, and this question would not be answered.
            if self.page.evaluate(GETS_FRAMES):
                raise
            self.requests.clear()
            self.page.reload()
            self._scroll()

    def _scroll(self) -> None:
        for canvas in self.page.query_selector_all(".canvas"):
            canvas.scroll_into_view_if_needed()
            self.page.wait_for_function("c => c.querySelector('.main-svg')", arg=canvas)


PAGES = ("report/report.html", "rules/ProfilerReport/profiler-output/profiler-report.html", "report/runs.html")


@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["desktop", "phone-dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_accessible_and_in_its_place_without_a_network(
    browser: Any, made: Path, name: str, options: dict[str, Any]
):
    path = made / name
    assert path.stat().st_size < 6_000_000
    opened = Opened(browser, path.as_uri(), options)
    page = opened.page
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0") < 2000
    assert page.evaluate("typeof Plotly") == "undefined" or page.evaluate(f"{CANVASES}[0].getBoundingClientRect().top < 1300")
    opened.draw_all()
    figures = page.evaluate(
        f"{CANVASES}.map(c => [c.id, c.data.length, c.data.every(t => (t.x ?? t.z).length > 0), "
        "Object.keys(c.layout).filter(k => /^[xy]axis/.test(k)).map(k => c.layout[k].title?.text ?? ''), "
        "c.getBoundingClientRect().width > 200])"
    )
    assert len(figures) >= 2
    for ident, traces, filled, titles, wide in figures:
        assert traces, ident
        assert filled, ident
        assert len(titles) >= 2, ident
        assert all(titles), ident
        assert wide, ident
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for summary in page.query_selector_all("summary"):
        summary.evaluate("s => s.parentElement.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "an opened part overflows"
    page.evaluate(AXE.read_text(encoding="utf-8"))
    faults = page.evaluate("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]))")
    assert [fault for fault in faults if fault[0] in ("serious", "critical")] == []
    assert opened.requests == [path.as_uri()]
    assert opened.complaints == []  # no error, no dialog, nothing that the policy had to stop
    page.context.close()


def test_hostile_names_are_text_and_nothing_else(browser: Any, made: Path):
    opened = Opened(browser, (made / "report/report.html").as_uri(), DESKTOP)
    page = opened.page
    opened.draw_all()
    assert page.inner_text("h1") == f"Run {HOSTILE[0]}"
    assert HOSTILE[1] in page.inner_text(".outcome")
    assert (
        page.evaluate("document.querySelectorAll('main script:not([type=\"application/json\"]), [onerror], img[src=x]').length")
        == 0
    )
    assert page.evaluate("document.querySelectorAll('.canvas a, .canvas b, .canvas i, .canvas [style*=italic]').length") == 0
    assert "\u202e" not in page.content()
    labels = page.evaluate(f"{CANVASES}.flatMap(c => [...c.querySelectorAll('.ytick text, .legendtext')].map(t => t.textContent))")
    assert any("‹script›" in label for label in labels)
    assert not any("<" in label or "%{" in label for label in labels)
    assert page.inner_text("#per-class").count("⟨U+202E⟩") == 1
    assert opened.complaints == []
    page.context.close()


def test_the_keyboard_reaches_every_control_and_moves_the_plots(browser: Any, made: Path):
    opened = Opened(browser, (made / "report/runs.html").as_uri(), DESKTOP)
    page = opened.page
    opened.draw_all()
    controls = "a[href], button, summary, [tabindex='0']"
    total = page.evaluate(f"[...document.querySelectorAll(`{controls}`)].filter(e => e.checkVisibility()).length")
    page.evaluate("scrollTo(0, 0)")
    reached = []
    for _ in range(total):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    assert len(set(reached)) == total
    page.focus("#runs-cost_usd")
    whole = page.evaluate("document.activeElement._fullLayout.xaxis.range")
    page.keyboard.press("+")
    page.wait_for_function(
        "r => { const [a, b] = document.activeElement._fullLayout.xaxis.range; return b - a < r[1] - r[0]; }", arg=whole
    )
    page.keyboard.press("0")
    page.wait_for_function("r => Math.abs(document.activeElement._fullLayout.xaxis.range[1] - r[1]) < 1e-6", arg=whole)
    page.focus("#runs-table button >> nth=0")
    page.keyboard.press("Enter")
    assert page.get_attribute("#runs-table th >> nth=0", "aria-sort") == "ascending"
    assert page.inner_text("#runs-table tbody tr >> nth=0").startswith("=three")
    page.focus("#runs-table button >> nth=1")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.get_attribute("#runs-table th >> nth=1", "aria-sort") == "descending"
    assert page.inner_text("#runs-table tbody tr >> nth=0").startswith("=three")  # 0.7, the best
    page.context.close()


def test_in_print_the_plots_are_black_on_white(browser: Any, made: Path):
    opened = Opened(browser, (made / "report/runs.html").as_uri(), {**DESKTOP, "color_scheme": "dark"})
    opened.draw_all()
    background = f"{CANVASES}[0]._fullLayout.paper_bgcolor"
    assert opened.page.evaluate(background) != "#fff"
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.evaluate(background) == "#fff"
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.page.evaluate(background) != "#fff"
    opened.page.context.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The folder ``tmp_path`` over http, as the local cloud serves a run's report."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_live_page_takes_in_what_is_new_and_leaves_the_reader_in_peace(
    browser: Any, tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reporting, "_client", FakeSageMaker)
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "evaluation")
    write_json(run / "evaluation" / "training.json", {"history": history(2)})
    reporting.write(flags(tmp_path, live=True))
    opened = Opened(browser, f"{served}/report/report.html", DESKTOP)
    page = opened.page
    page.wait_for_load_state()
    opened.draw_all()
    page.click("#curve-loss-numbers-summary")
    page.focus("#curve-loss")
    page.evaluate("document.querySelector('#curve-loss').kept = true")
    top = page.evaluate("document.querySelector('#curve-loss').getBoundingClientRect().top")
    write_json(run / "evaluation" / "training.json", {"history": history(5)})
    write_json(run / "evaluation" / "evaluation.json", evaluated(("a", "b", "c")))
    reporting.write(flags(tmp_path, live=True))
    page.evaluate("refresh(document.getElementById('live-status'))")
    page.wait_for_function("document.querySelector('#curve-loss').data[0].x.length === 5")
    assert page.evaluate("document.activeElement.id") == "curve-loss"
    assert page.evaluate("document.querySelector('#curve-loss').kept")  # the same plot, brought up to date
    assert page.evaluate("document.querySelector('#curve-loss-numbers').open")
    assert abs(page.evaluate("document.querySelector('#curve-loss').getBoundingClientRect().top") - top) < 3
    assert page.query_selector("#confusion") is not None
    page.click("#pause")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    asked = len(opened.requests)
    page.wait_for_timeout(5500)
    assert len(opened.requests) == asked
    reporting.write(flags(tmp_path, outcome="Refused", live=False))  # the run has ended
    page.evaluate("refresh(document.getElementById('live-status'))")
    page.wait_for_selector(".outcome")
    assert page.locator("#pause").is_hidden()
    assert "ended" in page.inner_text("#live-status")
    assert all(url.startswith(served) for url in opened.requests)
    assert opened.complaints == []
    page.context.close()
