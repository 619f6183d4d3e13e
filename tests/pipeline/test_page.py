"""The page, in a real browser: a dropped picture is answered with its class; a wrong token with what to do."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from deployment import typical

pytestmark = pytest.mark.pipeline

SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
DROP = """([content, type, name]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  for (const kind of ["dragover", "drop"]) {
    document.querySelector("#drop").dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
  }
}"""


def open_page(browser: Any, deployed: Any, **options: Any) -> tuple[Any, list[str]]:
    page = browser.new_context(**options).new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security Policy" in message.text else None)
    page.goto(deployed.outputs["ApiUrl"])
    return page, faults


def drop(page: Any, path: Path) -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), "image/png", path.name])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("desktop", {"viewport": {"width": 1100, "height": 800}}),
        ("phone-dark", {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}),
    ],
)
def test_a_dropped_picture_shows_its_class(finished, deployed, digits, browser, name, options):
    page, faults = open_page(browser, deployed, **options)
    page.fill("#token", deployed.token)
    path = typical(digits, "3")
    drop(page, path)
    page.wait_for_selector("#bars li")
    rows = page.locator("#bars li").all_inner_texts()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SCREENSHOTS / f"page-{name}.png"), full_page=True)
    assert rows[0].split()[0] == "3"
    assert page.locator("#message").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing overflows sideways
    assert faults == []
    page.context.close()


def test_a_wrong_token_and_a_file_that_is_no_picture_say_what_to_do(finished, deployed, digits, browser, tmp_path):
    page, _ = open_page(browser, deployed)
    page.fill("#token", "wrong")
    drop(page, typical(digits, "3"))
    page.wait_for_selector("#message:not([hidden])")
    assert "token" in page.inner_text("#message").lower()
    page.fill("#token", deployed.token)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    drop(page, broken)
    page.locator("#message", has_text=re.compile("picture", re.IGNORECASE)).wait_for()  # the page's CSP forbids eval
    assert page.locator("#answer").is_hidden()
    page.context.close()
