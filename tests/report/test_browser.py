"""The report page in a browser: charts, sorting, choices, themes, and nothing from outside."""

import pytest
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from badit.report import write_report
from badit.report.theme import chart_config
from browsers import emulate, requests, until
from report.samples import Shape, save_tables, write_run

pytestmark = pytest.mark.slow
MARKUP = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = [
        write_run(folder / "badit"),
        write_run(folder / "lora", Shape(seed=4), method="lora", analysed=False),
    ]
    return write_report(runs, folder / "report.html")


def open_page(browser, page, *, width=1200, theme="light"):
    """Opens the page with empty logs and waits until its charts are drawn."""
    emulate(browser, width=width, theme=theme)
    browser.get(page.as_uri())
    wait_until_drawn(browser, theme)


def wait_until_drawn(browser, theme):
    script = "return document.documentElement.dataset.drawn"
    until(
        lambda: browser.execute_script(script) == theme, f"the charts are drawn for a {theme} page"
    )


def map_elements(browser, selector, expression):
    """Returns the value of a JavaScript expression for each matching element ``one``."""
    script = f"return [...document.querySelectorAll(arguments[0])].map((one) => {expression})"
    return browser.execute_script(script, selector)


def fills(browser, figure):
    return map_elements(browser, f"#{figure} .mark-rect.role-mark path", "one.getAttribute('fill')")


def column(browser, table, number):
    return map_elements(browser, f"#{table} tbody tr > :nth-child({number})", "one.textContent")


def test_all_charts_are_drawn_without_network_requests(browser, page):
    open_page(browser, page)
    paths = "one.querySelectorAll('svg g[class*=mark-] path').length"
    charts = map_elements(
        browser, "figure:has(.specification)", f"[one.id, {paths}, one.offsetWidth]"
    )
    assert charts
    assert all(marks > 5 and width > 300 for _, marks, width in charts), charts
    assert browser.get_log("browser") == []
    assert (
        {"file"}
        <= {request["url"].partition(":")[0] for request in requests(browser)}
        <= {"file", "data", "blob"}
    )


def test_missing_values_of_a_matrix_have_no_colour_of_the_scale_or_of_a_series(browser, page):
    open_page(browser, page)
    background, *_ = fills(browser, "gradient-cosines-1-badit")
    assert background == chart_config("light")["style"]["matrix"]["color"]
    assert background not in chart_config("light")["range"]["category"]


def test_columns_of_words_are_aligned_with_their_titles(browser, page):
    open_page(browser, page)
    aligned = "getComputedStyle(one).textAlign"
    for number, side in ((2, "left"), (3, "right"), (8, "left")):
        cells = f"#gradient-pairs-1-badit tr > :nth-child({number})"
        assert set(map_elements(browser, cells, aligned)) == {side}, number


def test_tables_sort_by_click_and_keyboard(browser, page):
    open_page(browser, page)
    table = "gradient-pairs-1-badit"
    before = column(browser, table, 6)
    assert "–" in before, "one pair has no corrected cosine"
    header = browser.find_elements(By.CSS_SELECTOR, f"#{table} thead th")[5]
    button = header.find_element(By.TAG_NAME, "button")

    def numbers():
        shown = column(browser, table, 6)
        measured = [text for text in shown if text != "–"]
        assert shown[: len(measured)] == measured, "unknown values stay at the bottom"
        return [float(text.replace("−", "-")) for text in measured]

    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
    button.send_keys(Keys.ENTER)
    assert header.get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(numbers())
    directions = map_elements(browser, f"#{table} thead th", "one.getAttribute('aria-sort')")
    assert directions.count("none") == len(directions) - 1
    assert sorted(column(browser, table, 6)) == sorted(before)
    browser.find_element(By.CSS_SELECTOR, "#scores-table thead button").click()
    assert column(browser, "scores-table", 1)[0] == "002 quoref", (
        "the first click sorts text in ascending order"
    )
    assert (
        map_elements(browser, "#scores-table thead th", "one.getAttribute('aria-sort')")[0]
        == "ascending"
    )
    assert map_elements(browser, "#scores-table tfoot", "one.innerText")[0].startswith(
        "mean over tasks"
    )


def test_layer_and_module_choices_change_the_chart_and_survive_a_theme_switch(browser, page):
    open_page(browser, page)
    figure = "gradient-cosines-1-badit"
    layer = browser.find_element(By.CSS_SELECTOR, f"#{figure} select[name=layer]")
    assert [option.text for option in Select(layer).options] == [
        "all layers",
        "layer 0",
        "layer 1",
        "layer 2",
    ]
    everywhere = fills(browser, figure)
    Select(layer).select_by_visible_text("layer 1")
    one_layer = until(
        lambda: (now := fills(browser, figure)) != everywhere and now, "the colours change"
    )
    module = browser.find_element(By.CSS_SELECTOR, f"#{figure} select[name=module]")
    Select(module).select_by_visible_text("mlp.gate_proj.adapter")
    until(lambda: fills(browser, figure) not in (everywhere, one_layer), "the colours change again")
    browser.find_element(By.ID, "theme").click()
    wait_until_drawn(browser, "dark")
    chosen = map_elements(browser, f"#{figure} select", "one.selectedOptions[0].text")
    assert chosen == ["layer 1", "mlp.gate_proj.adapter"]
    assert browser.get_log("browser") == []


def test_phone_layout_fits_the_page_and_its_tables(browser, page):
    open_page(browser, page, width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert max(map_elements(browser, ".chart svg", "one.getBoundingClientRect().right")) <= 390
    widths = map_elements(
        browser, ".scroll", "[one.scrollWidth - one.clientWidth, one.innerText.slice(0, 60)]"
    )
    assert [text for width, text in widths if width > 0] == [], "tables fit"


def test_samples_open_by_task_and_figures_are_saved_as_svg(browser, page, tmp_path):
    open_page(browser, page)
    browser.find_element(By.XPATH, "//summary[text()='1290 xsum']").click()
    (seen,) = browser.find_elements(By.CSS_SELECTOR, ".samples details[open]")
    assert seen.get_attribute("title") == "task1290_xsum_answer_generation"
    assert any(mark in seen.text for mark in ("✓ right", "≈ partly right", "✗ wrong"))
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    browser.find_element(By.CSS_SELECTOR, "#clusters-1-badit .save").click()
    saved = tmp_path / "clusters-1-badit.svg"
    until(lambda: saved.is_file() and saved.stat().st_size, "the file is there")
    assert saved.read_text().startswith("<svg")


def test_markup_in_names_is_shown_as_text_on_the_page_and_in_charts(browser, tmp_path):
    tasks = (
        MARKUP,
        "<b>second</b>",
        "third",
        "javascript:window.ran = true",
        '" onmouseover="window.ran = true',
    )
    run = write_run(tmp_path / "run", Shape(("third",)), analysed=False)
    save_tables(run, Shape(tasks, modules=(MARKUP, "m")))
    open_page(browser, write_report([run], tmp_path / "report.html", title=MARKUP))
    cell = browser.find_element(By.CSS_SELECTOR, "#clusters .mark-rect.role-mark path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).perform()
    tooltip = until(
        lambda: browser.find_elements(By.CSS_SELECTOR, "#vg-tooltip-element.visible"), "a tooltip"
    )[0]
    assert "share" in tooltip.text
    assert MARKUP in map_elements(
        browser, "#clusters select[name=module] option", "one.textContent"
    )
    assert browser.find_elements(By.CSS_SELECTOR, "img, main b:not([aria-hidden])") == []
    assert browser.execute_script("return window.ran") is None
    assert browser.get_log("browser") == []
