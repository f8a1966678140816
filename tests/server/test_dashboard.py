"""The page in a real browser: Debian's chromium, without a window."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from batchwright.server.dashboard import PAGE
from tests.job.fakes import chat_row
from tests.server.running import PacedEngine, RunningServer, begin, ended, until

Start = Callable[..., RunningServer]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
KEY = "k" * 24
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,900",
)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
)


class Page:
    """The page as a user sees it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, server: RunningServer) -> None:
        self.driver.get("about:blank")  # the last test's page asks a server that is gone
        self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        self.driver.get(f"http://127.0.0.1:{server.port}/")

    def text(self, id: str) -> str:
        return self.driver.find_element(By.ID, id).text

    def row(self, batch_id: str) -> str:
        """What the table says about a batch; "" if it does not."""
        script = "return document.querySelector(`tr[data-id='${arguments[0]}']`)?.innerText || ''"
        return str(self.driver.execute_script(script, batch_id))

    def problems(self) -> list[Any]:
        """What the browser complained about, refusals of the key apart."""
        log = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry for entry in log if "401" not in entry["message"]]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield Page(driver)
    driver.quit()


@needs_browser
def test_the_page_shows_batches_as_they_run(page: Page, start: Start) -> None:
    engine = PacedEngine(max_running=4)
    engine.pace_s = 0.02
    server = start(engine)
    client = server.client()
    page.open(server)
    until(lambda: page.text("none") == "None yet.")
    rows = [chat_row(str(i), max_tokens=5) for i in range(2000)]
    running = begin(client, [*rows, chat_row("bad", temperature="hot"), b"nonsense"])
    waiting = begin(client, [chat_row("a")])
    failed = begin(client, [b"nonsense"])
    until(lambda: "in_progress (waiting)" in page.row(waiting.id))
    until(lambda: "invalid_json_line: 1" in page.row(running.id))
    until(lambda: int(page.text("generated_rate").replace(",", "").replace("–", "0")) > 0)
    until(lambda: page.text("running") == "4")
    assert "failed" in page.row(failed.id) and "1 / 1" in page.row(failed.id)
    assert (page.text("model"), page.text("health")) == ("fake", "ok")
    curve: WebElement = page.driver.find_element(By.ID, "curve")
    until(lambda: len(str(curve.get_attribute("points")).split()) > 1)
    client.batches.cancel(running.id)
    ended(client, waiting)
    until(lambda: "cancelled" in page.row(running.id))
    until(lambda: "completed" in page.row(waiting.id) and "1 / 1" in page.row(waiting.id))
    assert page.problems() == []  # nothing was blocked, nothing is missing


@needs_browser
def test_a_batch_leads_to_its_report(page: Page, start: Start) -> None:
    server = start()
    batch = ended(server.client(), begin(server.client(), [chat_row("SECRET-ID", "SECRET words")]))
    page.open(server)
    until(lambda: "report" in page.row(batch.id))
    page.driver.find_element(By.LINK_TEXT, "report").click()
    until(lambda: page.driver.current_url.endswith(f"/batches/{batch.id}/report"))
    assert page.driver.find_elements(By.TAG_NAME, "svg")
    assert "SECRET" not in page.driver.page_source
    assert page.problems() == []  # the page's policy forbids nothing that the report needs


@needs_browser
def test_nothing_that_clients_say_becomes_markup(
    page: Page, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    batch = ended(server.client(), begin(server.client(), [chat_row("a")]))
    attack = "<img src=x onerror=\"document.title='hit'\">"
    live = server.parts.batches.live

    def numbers(_: object) -> dict[str, Any]:
        from batchwright.server.numbers import dashboard_numbers

        found = dashboard_numbers(server.parts)
        found["model"] = found["health"] = attack
        found["batches"][0] |= {"status": attack, "error_codes": {attack: 1}, "endpoint": attack}
        return found

    assert live == {}
    monkeypatch.setattr("batchwright.server.routes_pages.dashboard_numbers", numbers)
    page.open(server)
    until(lambda: attack in page.row(batch.id))
    assert page.text("model") == attack
    assert page.driver.title == "Batchwright"
    assert not page.driver.find_elements(By.TAG_NAME, "img")
    run_inline = "const s = document.createElement('script'); s.textContent = 'document.title = 1';"
    page.driver.execute_script(run_inline + "document.body.append(s)")
    assert page.driver.title == "Batchwright"  # the policy would stop it too
    assert len(page.problems()) == 1


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it_nowhere(page: Page, start: Start) -> None:
    server = start(api_key=KEY)
    page.open(server)
    field = page.driver.find_element(By.ID, "key")
    until(field.is_displayed)
    assert not page.driver.find_element(By.ID, "main").is_displayed()
    field.send_keys("wrong")
    field.submit()
    until(lambda: "not accepted" in page.text("refused"))
    field.clear()
    field.send_keys(KEY)
    field.submit()
    until(lambda: page.text("model") == "fake")
    assert not field.is_displayed() and field.get_attribute("value") == ""
    stored = page.driver.execute_script(
        "return JSON.stringify([localStorage, sessionStorage]) + document.cookie"
    )
    assert stored == "[{},{}]"
    page.driver.refresh()
    until(lambda: page.text("model") == "fake")  # with the cookie
    assert page.problems() == []


@needs_browser
def test_another_page_cannot_use_the_server(
    page: Page, server: RunningServer, tmp_path: Path
) -> None:
    """A page from elsewhere, here a file, posts a call as pages can without asking."""
    other = tmp_path / "other.html"
    other.write_text("<title>other</title>")
    page.driver.get(other.as_uri())
    script = """
        const done = arguments[1], body = '{"messages": [{"role": "user", "content": "x"}]}';
        fetch(arguments[0], {method: "POST", body, mode: "no-cors"}).then(
            (r) => done(`sent ${r.type}`), () => done("refused"));
    """
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    assert page.driver.execute_async_script(script, url) in ("sent opaque", "refused")
    assert server.engine.stats.num_computed_tokens == 0
    page.problems()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert "http:" not in PAGE and "https:" not in PAGE and "//" not in PAGE.replace("</", "")
    assert " src=" not in PAGE and "innerHTML" not in PAGE and " style=" not in PAGE
