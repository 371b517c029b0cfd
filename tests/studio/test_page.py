"""The studio page in a browser: streamed answers, gates, escaped text, and the phone layout."""

import json

import pytest
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from badit.analysis.atlas import ABILITIES
from badit.analysis.tables import save_frame
from badit.integrations.studio.server import application
from badit.integrations.studio.session import Session
from browsers import emulate, requests, until
from data.examples import write_rows
from studio.conftest import BADIT, CLUSTERS, SINGLE, measured, served

# Without a slash, because task names must not contain one.
MARKUP = "<img src=x onerror='window.ran = true'><b>bold"
pytestmark = pytest.mark.slow
NUMBERS = ".slider input[type=number]"


class Page:
    """The studio's page in a browser, with helpers to operate and read it."""

    def __init__(self, browser, address, *, width=1200, theme="light"):
        self.browser, self.address = browser, address
        emulate(browser, width=width, theme=theme)
        browser.get(address)
        until(
            lambda: self.run("return document.documentElement.dataset.ready"), "the page is ready"
        )

    def run(self, script):
        return self.browser.execute_script(script)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def wait_for_status(self, status):
        until(lambda: self.text("#status") == status, f"the page says: {status}")

    def ask(self):
        self.one("#answer").click()
        self.wait_for_status("Done.")

    def sent(self):
        """Returns the questions that the page has sent since the last call."""
        return [
            json.loads(request["postData"])
            for request in requests(self.browser)
            if "postData" in request
        ]

    def next_question(self):
        question = until(self.sent, "the page has asked")[-1]
        self.wait_for_status("Done.")
        return question

    def values(self):
        return [float(number.get_property("value")) for number in self.all(NUMBERS)]

    def gates(self):
        return [float(cell.get_attribute("textContent")) for cell in self.all("#heat-map td")]


@pytest.fixture(scope="module")
def single(trained):
    return measured(trained(SINGLE))


@pytest.fixture(scope="module")
def address(single):
    with served(application(single)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def test_answer_streams_next_to_the_base_models_answer(browser, session):
    with served(application(session)) as port:
        _assert_streamed(Page(browser, f"http://127.0.0.1:{port}/"))


def _assert_streamed(page):
    page.run("""
        window.seen = new Set();
        const side = document.querySelector("#side-router .text");
        new MutationObserver(() => seen.add(side.textContent)).observe(side, {childList: true});
    """)
    page.ask()
    assert len(page.run("return [...window.seen]")) >= 3, "the text arrives in several parts"
    assert page.text("#side-base .facts").startswith("8 tokens, cut at the limit")
    assert page.text("#side-router .text") != page.text("#side-base .text")
    assert page.text("#reference") == "Reference answer: capital 12"
    page.one("#read summary").click()
    assert "Name the capital.\n\nNow complete the following example -\nInput: land 12" in page.text(
        "#read pre"
    )
    assert page.browser.get_log("browser") == []
    requested = {request["url"] for request in requests(page.browser)}
    assert page.address in requested
    assert all(
        url.startswith((page.address, "data:", "chrome:", "chrome-untrusted:")) for url in requested
    ), requested


def test_heat_map_keyboard_navigation_accessible_names_and_theme_switch(page, single):
    tasks = single.mixtures()["tasks"]
    assert page.gates() == pytest.approx([*tasks["cities"][0], *tasks["rivers"][0]], abs=0.006)
    page.ask()
    cells = page.all("#heat-map td")
    assert len(cells) == single.number_of_experts * 3, "the prompt, and two tasks"
    assert len({cell.value_of_css_property("background-color") for cell in cells}) > 2
    page.one("#heat-map td[tabindex='0']").send_keys(Keys.ARROW_DOWN)
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    gate = page.browser.switch_to.active_element.get_attribute("textContent")
    readout = page.text("#readout")
    assert readout.startswith("cities, expert 1: gate ")
    assert float(readout.rpartition(" ")[2]) == pytest.approx(float(gate), abs=0.006)
    assert len(page.all("#nearest li")) == 2
    for control in page.all("button, input, select, textarea, table"):
        assert control.accessible_name or not control.is_displayed(), control.get_attribute(
            "outerHTML"
        )
    light = page.one("#heat-map td").value_of_css_property("background-color")
    button = page.one("#theme")
    button.click()
    assert (button.text, button.get_attribute("aria-pressed")) == ("Light", "true")
    assert page.one("#heat-map td").value_of_css_property("background-color") != light


def test_heat_map_shows_the_chosen_module_and_gates_of_a_task_can_be_used(browser, trained):
    session = measured(trained({**BADIT, "target_modules": ["gate_proj", "o_proj"]}))
    with served(application(session)) as port:
        page = Page(browser, f"http://127.0.0.1:{port}/")
        layer, module = Select(page.one("#layer")), Select(page.one("#module"))
        assert page.all(NUMBERS) == [], "experts of different modules have no common sliders"
        for index, (number, name) in enumerate(session.about()["places"]):
            layer.select_by_value(str(number))
            module.select_by_visible_text(name)
            of_tasks = session.mixtures()["tasks"].values()
            expected = [gate for modules in of_tasks for gate in modules[index]]
            assert page.gates() == pytest.approx(expected, abs=0.006)
        Select(page.one("#gates-of")).select_by_value("rivers")
        question = page.next_question()
        assert (question["sides"], question["gates_of"]) == (["hand", "router", "base"], "rivers")
        assert page.text("#side-hand h3") == "With the gates of rivers"
        assert page.gates()[:4] == page.gates()[-4:], "those of the task"
        page.one("#own").click()
        assert Select(page.one("#gates-of")).first_selected_option.text == "choose"
        assert not page.one("#side-hand").is_displayed()
        assert browser.get_log("browser") == []


@pytest.mark.parametrize("key", ["layer", "embedding"])
def test_heat_map_shows_which_clusters_the_prompts_of_each_task_use(browser, trained, key):
    session = Session(trained({**CLUSTERS, "key": key}))
    with served(application(session)) as port:
        page = Page(browser, f"http://127.0.0.1:{port}/")
        assert not page.one("#heat-map").is_displayed()
        session.measure()
        until(lambda: page.one("#heat-map").is_displayed(), "the measured tasks are shown")
        assert page.one("#layer").is_displayed() == (key == "layer")
        shares = session.mixtures()["tasks"].values()
        cells = [cell.text for cell in page.all("#heat-map td")]
        assert cells == [f"{100 * share:.0f}%" for of_task in shares for share in of_task[0]]
        page.ask()
        (prompt, *_) = [row.text.split() for row in page.all("#heat-map tbody tr")]
        assert sorted(prompt) == sorted(["This", "prompt", "100%", "0%", "0%"])
        assert page.all(NUMBERS) == []
        page.one("#neutral").click()
        assert page.next_question()["gates"] == [1] * 4
        assert len(page.all("#heat-map tbody tr")) == 2, "other gates are of no cluster"
        assert browser.get_log("browser") == []


def test_sliders_send_their_gates_and_can_be_reset_to_the_router(page):
    page.ask()
    (first,) = page.sent()
    assert first["sides"] == ["router", "base"]
    assert "gates" not in first
    router, answer = page.values(), page.text("#side-router .text")
    assert len(set(router)) > 1, "the sliders show the router's gates"
    page.one("#gate-2").send_keys(Keys.HOME)
    question = page.next_question()
    assert question["sides"] == ["hand"], "the other sides are already answered"
    assert question["gates"] == page.values() == [*router[:2], 0, router[3]]
    assert page.one("#side-hand").is_displayed()
    assert page.text("#side-router h3") == "With the prompt’s gates"
    assert page.text("#side-router .text") == answer

    page.all(".slider button")[3].click()
    assert page.next_question()["gates"] == page.values() == [0, 0, 0, 1]
    assert page.gates()[:4] == [0, 0, 0, 1], "the heat map shows the gates set by hand"

    number = page.all(NUMBERS)[0]
    number.clear()
    number.send_keys("99", Keys.TAB)
    assert page.next_question()["gates"] == page.values()
    assert page.values()[0] <= 4, "values out of bounds are reset"

    page.one("#own").click()
    assert page.values() == router
    assert not page.one("#side-hand").is_displayed()
    assert page.sent() == [], "the router's answer is not requested again"
    assert page.browser.get_log("browser") == []


def test_answer_can_be_stopped_and_custom_prompts_are_answered(page):
    limit, box = page.one("#limit"), page.one("#text")
    limit.clear()
    limit.send_keys("512")
    page.one("#answer").click()
    until(lambda: page.text("#side-router .text"), "it has begun")
    page.one("#stop").click()
    page.wait_for_status("Stopped.")
    assert not page.one("#stop").is_enabled()
    limit.clear()
    limit.send_keys("4")
    Select(page.one("#task")).select_by_value("")
    box.clear()
    box.send_keys("Hello there", Keys.CONTROL, Keys.ENTER)
    page.wait_for_status("Done.")
    assert page.text("#side-base .facts").startswith("4 tokens")
    assert page.sent()[-1]["task"] is None
    box.clear()
    box.send_keys("   ")
    page.one("#answer").click()
    page.wait_for_status("text: the prompt is empty")


def test_page_reports_a_method_without_gates_and_a_stopped_server(browser, plain_session):
    with served(application(plain_session)) as port:
        page = Page(browser, f"http://127.0.0.1:{port}/")
        page.ask()
        assert "mixes no experts" in page.text("#no-gates")
        assert not page.one("#gates").is_displayed()
        assert page.all(".slider") == []
        assert page.text("#side-router .facts")
        assert browser.get_log("browser") == []
    page.one("#answer").click()
    page.wait_for_status("The studio does not answer; is it still running?")


def test_markup_in_names_data_and_tables_is_shown_as_text(browser, trained, tmp_path):
    line = dict.fromkeys(["task", "instruction", "output"], MARKUP)
    lines = [
        {**line, "input": f"{MARKUP} {i}", "split": split}
        for i, split in enumerate(["train"] * 8 + ["test"] * 2)
    ]
    run = trained(SINGLE, write_rows(tmp_path / "tasks.jsonl", *lines), MARKUP)
    save_frame(
        ABILITIES.frame([[expert, MARKUP, "", 1.0, 0.0, 0.0] for expert in range(4)], ""),
        run.analysis_path,
    )
    session = Session(run)
    with served(application(session)) as port:
        page = Page(browser, f"http://127.0.0.1:{port}/")
        page.ask()
        assert page.text("#unmeasured").startswith(
            "The gates of the tasks are still being measured"
        )
        session.measure()
        page.ask()
        assert not page.one("#unmeasured").is_displayed()
        until(lambda: len(page.all("#heat-map tbody tr")) == 2, "the measured task is shown")
        for selector in (
            "#run",
            "#instruction",
            "#task option:checked",
            "#nearest li",
            "#heat-map tbody tr:last-child th",
            "#gates-of option:last-child",
            ".slider .said",
            "#reference",
        ):
            assert MARKUP in page.text(selector), selector
        assert MARKUP in browser.title
        assert page.all("img, b") == []
        assert page.run("return window.ran") is None
        assert browser.get_log("browser") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_layout_does_not_scroll_sideways(browser, address, theme):
    page = Page(browser, address, width=390, theme=theme)
    page.ask()
    assert page.sent()
    page.all(".slider button")[0].click()
    page.next_question()
    assert page.run("return document.documentElement.scrollWidth") == 390
    channels = page.run("return getComputedStyle(document.body).backgroundColor")[4:-1].split(",")
    assert (sum(map(int, channels)) > 700) == (theme == "light")
