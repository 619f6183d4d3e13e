"""The page in a real browser, served by the real Lambda in front of the real serving application."""

from __future__ import annotations

import base64
import io
import json
import socketserver
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import api_fakes
import handler
import numpy as np
import pytest
from api_fakes import TOKEN, Endpoint, connected, missing_endpoint, set_environment
from PIL import Image
from serving_fakes import COLOURS, colour, serving, write_model

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS = ROOT / "build" / "screenshots"
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
DROP = """([files, kind]) => {
  const transfer = new DataTransfer();
  for (const [name, type, content] of files) {
    transfer.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, {type}));
  }
  if (kind === "paste") dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}));
  else for (const step of ["dragenter", "dragover", "drop"]) {
    document.querySelector("#drop").dispatchEvent(new DragEvent(step, {dataTransfer: transfer, bubbles: true, cancelable: true}));
  }
}"""


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class _Silent(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Endpoint]]:
    """Where the page is, and the endpoint behind it."""
    with pytest.MonkeyPatch.context() as patch, serving(write_model(tmp_path_factory.mktemp("served"))) as model:
        set_environment(patch)
        endpoint = Endpoint(model)
        with connected(endpoint, list(COLOURS)):
            server = wsgiref.simple_server.make_server("127.0.0.1", 0, api_fakes.application, _Server, _Silent)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/", endpoint
            server.shutdown()
            server.server_close()
        endpoint.close()


@pytest.fixture
def endpoint(address: tuple[str, Endpoint]) -> Endpoint:
    address[1].problems.clear()
    address[1].calls.clear()
    return address[1]


@pytest.fixture
def opened(browser: Any, address: tuple[str, Endpoint], endpoint: Endpoint) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end no script failed and nothing broke the content security policy."""
    contexts, faults = [], []

    def open_page(token: str = TOKEN, **options: Any) -> Any:
        context = browser.new_context(**{**DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None)
        page.goto(address[0])
        page.fill("#token", token)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def give(page: Any, *files: tuple[str, str, bytes], kind: str = "drop") -> None:
    page.evaluate(DROP, [[[name, mime, base64.b64encode(content).decode()] for name, mime, content in files], kind])


def red(name: str = "red.png") -> tuple[str, str, bytes]:
    return name, "image/png", colour("red")


def names(page: Any) -> list[str]:
    page.wait_for_selector("#bars li")
    return [text.split("\n")[0] for text in page.locator("#bars li").all_inner_texts()]


def picture(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SCREENSHOTS / f"{name}.png"), full_page=True)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(opened: Callable[..., Any], kind: str):
    page = opened()
    give(page, red(), kind=kind)
    assert names(page)[0] == "red"
    assert page.locator("#message").is_hidden()
    assert "run colours" in page.inner_text("#model")


def test_a_picture_is_chosen(opened: Callable[..., Any], tmp_path: Path):
    page = opened()
    (tmp_path / "b.png").write_bytes(colour("blue <&>"))
    page.set_input_files("#file", str(tmp_path / "b.png"))
    assert names(page)[0] == "blue <&>"


def test_several_pictures_make_a_history_that_can_be_gone_back_to(opened: Callable[..., Any], endpoint: Endpoint):
    page = opened()
    give(page, red(), ("g.jpg", "image/jpeg", colour("green", "JPEG")), ("b.png", "image/png", colour("blue <&>")))
    page.wait_for_function("document.querySelectorAll('#history li').length === 3")
    page.locator("#history li", has_text="blue").wait_for()
    page.locator("#history li", has_text="green").wait_for()
    assert names(page)[0] == "red"  # the first one given is shown
    page.locator("#history button", has_text="green").click()
    assert names(page)[0] == "green"
    assert page.locator("#history button[aria-current=true]").inner_text().startswith("green")
    assert len(endpoint.calls) == 3
    picture(page, "page-several")


def test_a_heat_map_is_shown_on_demand_and_taken_away(opened: Callable[..., Any], endpoint: Endpoint):
    page = opened()
    give(page, red())
    names(page)
    before = page.get_attribute("#preview", "src")
    page.locator("#bars button").first.click()
    page.wait_for_selector("#back:not([hidden])")
    assert page.get_attribute("#preview", "src") != before
    assert "red" in page.get_attribute("#preview", "alt")
    picture(page, "page-heat-map")
    page.click("#back")
    assert page.get_attribute("#preview", "src") == before
    page.locator("#bars button").first.click()  # asked once, kept
    page.wait_for_selector("#back:not([hidden])")
    assert len([call for call in endpoint.calls if "explain" in call["CustomAttributes"]]) == 1


def test_what_is_wrong_is_said(opened: Callable[..., Any]):
    page = opened()
    give(page, ("broken.png", "image/png", b"no picture"))
    page.locator("#message", has_text="could not be read as a picture").wait_for()
    give(page, ("notes.txt", "text/plain", b"hello"))
    page.locator("#message", has_text="not supported").wait_for()
    picture(page, "page-error")
    give(page, red())
    assert names(page)[0] == "red"
    assert page.locator("#message").is_hidden()


def test_a_wrong_token_is_said_and_the_right_one_goes_on(opened: Callable[..., Any]):
    page = opened(token="wrong")
    give(page, red())
    page.locator("#message", has_text="token is missing or wrong").wait_for()
    page.fill("#token", TOKEN)
    page.press("#token", "Tab")
    assert names(page)[0] == "red"


def test_a_picture_waits_for_the_token(opened: Callable[..., Any]):
    page = opened(token="")
    give(page, red())
    page.locator("#message", has_text="Enter the token first").wait_for()
    page.fill("#token", TOKEN)
    page.press("#token", "Tab")
    assert names(page)[0] == "red"


def _starting() -> Any:
    problem = missing_endpoint()
    problem.response["Error"] = {"Code": "ModelNotReadyException", "Message": "x"}
    return problem


def test_a_model_that_is_starting_is_waited_for(opened: Callable[..., Any], endpoint: Endpoint):
    page = opened()
    endpoint.problems = [_starting()]
    give(page, red())
    page.locator("#status", has_text="Trying again in").wait_for()
    picture(page, "page-waiting")
    page.click("#now")
    assert names(page)[0] == "red"


def test_the_countdown_tries_again_by_itself(opened: Callable[..., Any], endpoint: Endpoint):
    page = opened()
    endpoint.problems = [_starting()]
    page.clock.install()
    give(page, red())
    page.locator("#status", has_text="Trying again in").wait_for()
    page.clock.run_for(6000)
    assert names(page)[0] == "red"


def test_waiting_can_be_stopped(opened: Callable[..., Any], endpoint: Endpoint):
    page = opened()
    endpoint.problems = [_starting()] * 5
    give(page, red())
    page.click("#cancel")
    page.locator("#message", has_text="not ready").wait_for()
    assert page.locator("#history", has_text="not classified").is_visible()


def test_a_picture_over_the_limit_is_scaled_down_here(opened: Callable[..., Any], endpoint: Endpoint):
    noise = np.random.default_rng(0).integers(0, 60, (1500, 2000, 3), dtype=np.uint8)
    noise[..., 1] += 150
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    assert out.tell() > 4_000_000
    page = opened()
    give(page, ("large.png", "image/png", out.getvalue()))
    assert names(page)[0] == "green"
    sent = endpoint.calls[-1]
    assert (sent["ContentType"], Image.open(io.BytesIO(sent["Body"])).size) == ("image/jpeg", (1600, 1200))
    assert len(sent["Body"]) < 4_000_000


def test_a_strange_picture_gets_a_hint(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    page = opened()
    model = handler.model()
    true = model.predict
    monkeypatch.setattr(model, "predict", lambda *given: {**true(*given), "novelty": 0.995})
    give(page, red())
    names(page)
    assert page.locator("#novelty").is_visible()


def test_it_works_by_keyboard(opened: Callable[..., Any]):
    page = opened()
    page.focus("#token")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "choose"  # its answer also says that the chooser is listened for
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "r.png", "mimeType": "image/png", "buffer": colour("red")})
    names(page)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#bars') !== null"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#back:not([hidden])")
    assert page.evaluate("document.activeElement.closest('#bars') !== null")  # the focus stays where it was


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "options"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_it_fits_and_is_accessible(opened: Callable[..., Any], device: str, options: dict[str, Any], scheme: str):
    page = opened(**options, color_scheme=scheme, bypass_csp=True)
    give(page, red("a-long-name-of-a-picture-" * 8 + ".png"), ("b.png", "image/png", colour("blue <&>")))
    page.wait_for_function("document.querySelectorAll('#history li').length === 2")
    names(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#photo").is_visible() == (device == "phone")
    picture(page, f"page-{device}-{scheme}")
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run().then((result) => result.violations.map((fault) => [fault.impact, fault.id]))")
    assert [fault for fault in found if fault[0] in ("serious", "critical")] == [], json.dumps(found)
