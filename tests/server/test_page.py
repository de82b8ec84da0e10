"""The page in a real browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.conftest import alone
from tests.server.test_clients import listening

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with listening() as (address, _), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda line: (
                problems.append(line.text)
                if line.type == "error" and "status of 400" not in line.text
                else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((address, "data:")) else problems.append(request.url)
            ),
        )
        page.goto(address)
        yield page
        browser.close()
        assert problems == []


def test_a_chat_by_the_keyboard_alone(page: Any) -> None:
    prompt = "abcabcabcabc"
    page.locator("#model").get_by_text("tiny").wait_for()
    page.locator("summary").click()
    page.locator("#max").fill("100")
    page.locator("#message").focus()
    page.keyboard.type(prompt)
    page.keyboard.press("Enter")
    page.locator("#figures", has_text="accepted").wait_for()

    answer = page.locator("article.assistant").first
    assert answer.evaluate("each => each.textContent") == alone(prompt, 100).text
    assert answer.locator("span.skip, span.ngram, span.store").count() > 0
    assert answer.locator("span.model").count() > 0
    assert "tokens/s" in page.locator("#figures").inner_text()
    drafted = answer.locator("span.skip, span.ngram, span.store").first
    assert drafted.evaluate("each => getComputedStyle(each).backgroundColor") != "rgba(0, 0, 0, 0)"


def test_it_is_dark_where_that_is_wanted(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(22, 23, 26)"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


def test_what_the_server_refuses_is_shown(page: Any) -> None:
    page.locator("#temperature").fill("3")
    page.locator("#message").fill("Why?")
    page.keyboard.press("Enter")
    failed = page.locator("article.failed")
    failed.wait_for()
    assert "temperature" in failed.inner_text()
    page.locator("#clear").click()
    assert page.locator("article").count() == 0
