"""The page in a browser: an answer streams, sliders send their gates, text stays text, and a phone shows all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from badit.analysis.tables import TidyTable
from badit.runs import RunFolder
from badit.studio.session import Session
from browsers import chromium, emulate, until
from studio.conftest import BADIT, served

# No slash in it, which the name of a task may not have.
MARKUP = "<img src=x onerror='window.ran = true'><b>bold"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(session: Session) -> Iterator[str]:
    with served(session) as port:
        yield f"http://127.0.0.1:{port}/"


def opened(browser: Chrome, page: str, *, width: int = 1200, theme: str = "light") -> Chrome:
    emulate(browser, width=width, theme=theme)
    browser.get(page)
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"), "the page is ready")
    return browser


def text(browser: Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def answered(browser: Chrome) -> None:
    until(lambda: text(browser, "#status") == "Done.", "the answer is there")


def ask(browser: Chrome) -> None:
    browser.find_element(By.ID, "answer").click()
    answered(browser)


def requests(browser: Chrome) -> list[dict[str, Any]]:
    """What the page has requested since the last look."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]


def sent(browser: Chrome) -> list[dict[str, Any]]:
    """The questions that the page has sent since the last look."""
    return [json.loads(request["postData"]) for request in requests(browser) if "postData" in request]


def values(browser: Chrome) -> list[float]:
    script = "return [...document.querySelectorAll('.slider input[type=number]')].map((one) => Number(one.value))"
    return browser.execute_script(script)


def test_an_answer_streams_next_to_the_base_models(browser: Chrome, page: str) -> None:
    opened(browser, page)
    browser.execute_script("""
        window.seen = new Set();
        const side = document.querySelector("#side-router .text");
        new MutationObserver(() => seen.add(side.textContent)).observe(side, {childList: true});
    """)
    ask(browser)
    assert len(browser.execute_script("return [...window.seen]")) >= 3, "it has grown"
    assert text(browser, "#side-base .facts").startswith("8 tokens, cut at the limit")
    assert text(browser, "#side-router .text") != text(browser, "#side-base .text")
    assert text(browser, "#reference") == "The data’s own answer: capital 12"
    browser.find_element(By.CSS_SELECTOR, "#read summary").click()
    assert "Name the capital.\n\nNow complete the following example -\nInput: land 12" in text(browser, "#read pre")
    assert browser.get_log("browser") == []
    requested = {request["url"] for request in requests(browser)}
    assert page in requested
    assert all(url.startswith((page, "data:,")) for url in requested), "nothing is requested of another machine"


def test_the_heat_map_has_every_gate_and_is_walked_by_keys(browser: Chrome, page: str, session: Session) -> None:
    opened(browser, page)
    ask(browser)
    cells = browser.find_elements(By.CSS_SELECTOR, "#heat-map td")
    assert len(cells) == session.number_of_experts * len(session.experts)
    colours = {cell.value_of_css_property("background-color") for cell in cells}
    assert len(colours) > 2
    (first,) = browser.find_elements(By.CSS_SELECTOR, "#heat-map td[tabindex='0']")
    first.send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    cell = browser.switch_to.active_element
    gate = cell.get_attribute("textContent")
    assert text(browser, "#readout") == f"Expert 1, layer 1: gate {gate}"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#nearest li")) == 2


def test_the_heat_map_is_of_a_module_or_of_their_mean(browser: Chrome, trained: Callable[..., RunFolder]) -> None:
    session = Session(trained({**BADIT, "target_modules": ["gate_proj", "o_proj"]}).path)
    with served(session) as port:
        opened(browser, f"http://127.0.0.1:{port}/")
        ask(browser)
        choice = Select(browser.find_element(By.ID, "module"))
        names = [option.text for option in choice.options]
        assert names == ["mean over modules", "self_attn.o_proj", "mlp.gate_proj"]
        shown = []
        for name in names:
            choice.select_by_visible_text(name)
            cells = browser.find_elements(By.CSS_SELECTOR, "#heat-map td")
            shown.append([float(cell.get_attribute("textContent")) for cell in cells])
    mean, first, second = shown
    assert first != second
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)], abs=0.0011)


def test_sliders_send_their_gates_and_the_router_comes_back(browser: Chrome, page: str) -> None:
    opened(browser, page)
    ask(browser)
    (first,) = sent(browser)
    assert (first["sides"], first["gates"]) == (["router", "base"], None)
    router, answer = values(browser), text(browser, "#side-router .text")
    assert len(set(router)) > 1, "the sliders show the router's gates"
    slider = browser.find_element(By.ID, "gate-2")
    slider.send_keys(Keys.HOME)
    answered(browser)
    question = until(lambda: sent(browser), "the page has asked")[-1]
    assert question["sides"] == ["hand"], "the other answers are there already"
    assert question["gates"] == values(browser) == [*router[:2], 0, router[3]]
    assert browser.find_element(By.ID, "side-hand").is_displayed()
    assert text(browser, "#side-router h3") == "The router’s own mixture"
    assert text(browser, "#side-router .text") == answer

    browser.find_elements(By.CSS_SELECTOR, ".slider button")[3].click()
    until(lambda: text(browser, "#status") == "Done.", "the answer is there")
    assert until(lambda: sent(browser), "the page has asked")[-1]["gates"] == values(browser) == [0, 0, 0, 1]
    script = "return [...document.querySelectorAll('#heat-map td')].map((cell) => cell.textContent)"
    until(lambda: set(browser.execute_script(script)) == {"0.000", "1.000"}, "the map shows the mixture by hand")

    browser.find_element(By.ID, "own").click()
    assert values(browser) == router
    assert not browser.find_element(By.ID, "side-hand").is_displayed()
    assert sent(browser) == [], "its answer is there"
    number = browser.find_elements(By.CSS_SELECTOR, ".slider input[type=number]")[0]
    number.clear()
    number.send_keys("99", Keys.TAB)
    question = until(lambda: sent(browser), "the page has asked")[-1]
    answered(browser)
    assert question["gates"] == values(browser)
    assert values(browser)[0] <= 4, "what is beyond bounds is put back"
    assert browser.get_log("browser") == []


def test_an_answer_can_be_stopped(browser: Chrome, page: str) -> None:
    opened(browser, page)
    limit = browser.find_element(By.ID, "limit")
    limit.clear()
    limit.send_keys("512")
    browser.find_element(By.ID, "answer").click()
    until(lambda: text(browser, "#side-router .text"), "it has begun")
    browser.find_element(By.ID, "stop").click()
    until(lambda: text(browser, "#status") == "Stopped.", "it has stopped")
    assert not browser.find_element(By.ID, "stop").is_enabled()
    limit.clear()
    limit.send_keys("4")
    ask(browser)
    assert text(browser, "#side-base .facts").startswith("4 tokens")


def test_a_prompt_of_ones_own_and_what_is_refused(browser: Chrome, page: str) -> None:
    opened(browser, page)
    Select(browser.find_element(By.ID, "task")).select_by_value("")
    box = browser.find_element(By.ID, "text")
    box.clear()
    box.send_keys("Hello there", Keys.CONTROL, Keys.ENTER)
    answered(browser)
    assert sent(browser)[-1]["task"] is None
    box.clear()
    box.send_keys("   ")
    browser.find_element(By.ID, "answer").click()
    until(lambda: text(browser, "#status") == "text: the prompt is empty", "the server's word")


def test_a_method_without_gates_says_so_and_the_page_tells_that_the_studio_has_ended(
    browser: Chrome, plain_session: Session
) -> None:
    with served(plain_session) as port:
        opened(browser, f"http://127.0.0.1:{port}/")
        ask(browser)
        assert "mixes no experts" in text(browser, "#no-gates")
        assert not browser.find_element(By.ID, "gates").is_displayed()
        assert browser.find_elements(By.CSS_SELECTOR, ".slider") == []
        assert text(browser, "#side-router .facts")
        assert browser.get_log("browser") == []
    browser.find_element(By.ID, "answer").click()
    until(lambda: text(browser, "#status") == "The studio does not answer; is it still running?", "the page says so")


def test_markup_in_names_data_and_tables_stays_text(
    browser: Chrome, trained: Callable[..., RunFolder], tmp_path: Path
) -> None:
    source = tmp_path / "tasks.jsonl"
    lines = [
        {"task": MARKUP, "instruction": MARKUP, "input": f"{MARKUP} {i}", "output": MARKUP, "split": split}
        for i, split in enumerate(["train"] * 8 + ["test"] * 2)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = trained(BADIT, source, MARKUP)
    about = {"expert": "", "summary": ""}
    TidyTable("abilities", "", about, [[expert, MARKUP] for expert in range(4)]).save(run.analysis)
    session = Session(run.path)
    with served(session) as port:
        opened(browser, f"http://127.0.0.1:{port}/")
        ask(browser)
        assert text(browser, "#unmeasured").startswith("The tasks’ own mixtures are still being measured")
        session.measure()
        ask(browser)
        assert not browser.find_element(By.ID, "unmeasured").is_displayed()
        shown = ("#run", "#instruction", "#task option:checked", "#nearest li", ".slider .said", "#reference")
        for selector in shown:
            assert MARKUP in text(browser, selector), selector
        assert MARKUP in browser.title
        assert browser.find_elements(By.CSS_SELECTOR, "img, b") == []
        assert browser.execute_script("return window.ran") is None
        assert browser.get_log("browser") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(browser: Chrome, page: str, theme: str) -> None:
    opened(browser, page, width=390, theme=theme)
    ask(browser)
    browser.find_elements(By.CSS_SELECTOR, ".slider button")[0].click()
    answered(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    channels = browser.execute_script("return getComputedStyle(document.body).backgroundColor")[4:-1].split(",")
    assert (sum(map(int, channels)) > 700) == (theme == "light")


def test_every_control_has_a_name_and_the_theme_can_be_chosen(browser: Chrome, page: str) -> None:
    opened(browser, page)
    for control in browser.find_elements(By.CSS_SELECTOR, "button, input, select, textarea, table"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    ask(browser)
    script = "return getComputedStyle(document.querySelector('#heat-map td')).backgroundColor"
    light = browser.execute_script(script)
    button = browser.find_element(By.ID, "theme")
    button.click()
    assert (button.text, button.get_attribute("aria-pressed")) == ("Light", "true")
    assert browser.execute_script(script) != light
