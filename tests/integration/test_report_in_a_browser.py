"""The page of a report in Chromium: what is drawn, what a click does, and that nothing is fetched."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from launch.figures import COLOURS
from launch.report_html import to_html
from launch.report_parts import Column, Curve, Figure, HeatMap, Report, Table

PATIENCE = 30  # seconds until the page has done what it was asked
INSTALL_TIMEOUT = 300

# Without these Chromium itself asks Google for updates, field trials and models, and the log below would show it.
QUIET = (
    "--headless=new",
    "--no-sandbox",  # it refuses to run as root with one
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--no-first-run",
    "--window-size=1400,1000",
)
HOSTILE = "<b></script>%{x}"
REPORT = Report(
    "A <report>",
    ["What does it cost?"],
    ["One leg failed."],
    [
        Table(
            "Result",
            [Column("leg"), Column("value", 1, "What was measured")],
            [["b_10", 2.0], ["b_9", None], [HOSTILE, "not reached"], ["a", -12345.5], ["c", 10.0]],
        )
    ],
    [
        Figure(
            name,
            name,
            "step",
            "value",
            [
                Curve(leg, f"{leg}-{run}", list(range(1, 51)), [50.0 * run + level + step for step in range(50)])
                for level, leg in enumerate(["base", HOSTILE, "third"])
                for run in (1, 2)
            ],
        )
        for name in ("loss", "tok_per_sec")
    ]
    + [Figure("mfu", "mfu", "step", "percent", [])],
    [HeatMap("load", "Load", [1, 2, 3], [[0.5, 1.0, 1.5], [1.5, 1.0, 0.5]])],
)


def installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


@pytest.fixture(scope="module")
def chromium() -> None:
    """Chromium and its driver from the distribution; installed where that takes no password."""
    if not installed() and os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium", "chromium-driver"]):
            try:
                subprocess.run(command, capture_output=True, timeout=INSTALL_TIMEOUT)
            except subprocess.TimeoutExpired:
                break
    if not installed():
        pytest.skip("chromium or chromedriver is missing, and apt-get did not install them (Debian: chromium-driver)")


@pytest.fixture(scope="module")
def started(chromium: None) -> Iterator[webdriver.Chrome]:
    os.environ.update(
        SE_OFFLINE="true", SE_AVOID_STATS="true"
    )  # selenium neither downloads a driver nor counts its users
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(to_html(REPORT), encoding="utf-8")
    return path


@pytest.fixture
def browser(started: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    """The page, just opened, with empty logs before it."""
    started.get("about:blank")
    for kind in ("browser", "performance"):
        started.get_log(kind)
    started.get(page.as_uri())
    wait_until(lambda: len(started.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .main-svg")) > 0)
    return started


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def drawn(browser: webdriver.Chrome, plot: str) -> list[str]:
    """Colours of the lines in a figure, in drawing order."""
    script = (
        "return [...document.querySelectorAll(`#${arguments[0]} .scatterlayer .js-line`)].map((e) => e.style.stroke)"
    )
    return browser.execute_script(script, plot)


def visible(browser: webdriver.Chrome, plot: str) -> list[Any]:
    return browser.execute_script(
        "return document.getElementById(arguments[0]).data.map((t) => t.visible ?? true)", plot
    )


def rgb(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


BASE, OTHER, THIRD = ([rgb(colour)] * 2 for colour in COLOURS[:3])


def test_nothing_is_complained_of_and_nothing_but_the_file_is_fetched(browser: webdriver.Chrome, page: Path) -> None:
    assert drawn(browser, "figure-0") == drawn(browser, "figure-1") == BASE + OTHER + THIRD
    assert browser.find_elements(By.CSS_SELECTOR, "#heat-map-0 .heatmaplayer image")
    assert browser.find_element(By.CSS_SELECTOR, ".missing").text == "not measured"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert [url for url in asked if url != page.as_uri() and not url.startswith(("data:", "blob:"))] == []


def test_a_request_would_be_refused_and_seen(browser: webdriver.Chrome) -> None:
    browser.execute_script("fetch('http://127.0.0.1:9/').catch(() => {})")
    found: list[str] = []

    def complained() -> bool:
        found.extend(entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE")
        return bool(found)

    wait_until(complained)
    assert "Content Security Policy" in found[0]


def test_no_button_sends_the_data_away(browser: webdriver.Chrome) -> None:
    titles = {e.get_attribute("data-title") for e in browser.find_elements(By.CSS_SELECTOR, ".modebar-btn")}
    assert titles == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def test_a_point_tells_its_step_value_leg_and_run(browser: webdriver.Chrome) -> None:
    browser.execute_script("Plotly.Fx.hover('figure-0', [{curveNumber: 3, pointNumber: 9}])")
    wait_until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#figure-0 .hovertext text.nums tspan")) > 0)
    lines = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#figure-0 .hovertext text.nums tspan.line")]
    assert lines == ["step 10", "value 110", f"leg {HOSTILE}", f"run {HOSTILE}-2"]


def legend_names(browser: webdriver.Chrome, plot: str) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, f"#{plot} .legendtext")]


def test_a_click_in_a_legend_hides_all_runs_of_a_leg_in_that_figure_and_another_shows_them(
    browser: webdriver.Chrome,
) -> None:
    assert legend_names(browser, "figure-0") == ["base", HOSTILE, "third"]

    def click() -> None:
        entry = browser.find_elements(By.CSS_SELECTOR, "#figure-0 .legendtoggle")[1]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", entry)
        webdriver.ActionChains(browser).move_to_element(entry).click().perform()

    click()
    wait_until(lambda: drawn(browser, "figure-0") == BASE + THIRD)
    assert visible(browser, "figure-0") == [True, True, "legendonly", "legendonly", True, True]
    assert drawn(browser, "figure-1") == BASE + OTHER + THIRD
    time.sleep(0.5)  # two clicks in a shorter time are a double click, which isolates
    click()
    wait_until(lambda: drawn(browser, "figure-0") == BASE + OTHER + THIRD)


def test_a_check_box_hides_a_leg_in_every_figure_and_shows_it_again(browser: webdriver.Chrome) -> None:
    boxes = browser.find_elements(By.CSS_SELECTOR, ".legs input")
    assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".legs label")] == ["base", HOSTILE, "third"]
    boxes[1].click()
    for plot in ("figure-0", "figure-1"):
        wait_until(lambda plot=plot: drawn(browser, plot) == BASE + THIRD)
        assert visible(browser, plot) == [True, True, "legendonly", "legendonly", True, True]
    boxes[1].click()
    for plot in ("figure-0", "figure-1"):
        wait_until(lambda plot=plot: drawn(browser, plot) == BASE + OTHER + THIRD)


@pytest.mark.parametrize("axis", ["xaxis", "yaxis"])
def test_a_button_turns_an_axis_of_its_figure_logarithmic_and_back(browser: webdriver.Chrome, axis: str) -> None:
    button = browser.find_element(By.CSS_SELECTOR, f'button[data-plot="figure-1"][data-axis="{axis}"]')
    other = "yaxis" if axis == "xaxis" else "xaxis"

    def kind(plot: str, axis: str) -> str:
        return browser.execute_script(f"return document.getElementById('{plot}')._fullLayout.{axis}.type")

    for expected in ("log", "linear"):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        wait_until(lambda expected=expected: kind("figure-1", axis) == expected)
        assert button.get_attribute("aria-pressed") == str(expected == "log").lower()
        assert (kind("figure-1", other), kind("figure-0", axis)) == ("linear", "linear")


def column(browser: webdriver.Chrome, place: int) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, f"tbody td:nth-child({place})")]


def headers(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "th button")


def test_a_click_on_a_header_sorts_by_value_and_what_was_not_measured_stays_last(browser: webdriver.Chrome) -> None:
    sorted_by = [e.get_attribute("aria-sort") for e in browser.find_elements(By.TAG_NAME, "th")]
    assert sorted_by == ["none", "none"]
    headers(browser)[1].click()
    assert column(browser, 2) == ["-12,345.5", "2.0", "10.0", "not reached", "–"]
    assert column(browser, 1) == ["a", "b_10", "c", HOSTILE, "b_9"]
    assert browser.find_elements(By.TAG_NAME, "th")[1].get_attribute("aria-sort") == "ascending"
    headers(browser)[1].click()
    assert column(browser, 2) == ["10.0", "2.0", "-12,345.5", "not reached", "–"]
    assert browser.find_elements(By.TAG_NAME, "th")[1].get_attribute("aria-sort") == "descending"


def test_texts_sort_as_a_person_would_sort_them(browser: webdriver.Chrome) -> None:
    headers(browser)[0].click()
    assert column(browser, 1) == [HOSTILE, "a", "b_9", "b_10", "c"]
    headers(browser)[0].click()
    assert column(browser, 1) == ["c", "b_10", "b_9", "a", HOSTILE]
    assert [e.get_attribute("aria-sort") for e in browser.find_elements(By.TAG_NAME, "th")] == ["descending", "none"]
    headers(browser)[1].click()
    assert [e.get_attribute("aria-sort") for e in browser.find_elements(By.TAG_NAME, "th")] == ["none", "ascending"]


def test_a_column_explains_itself(browser: webdriver.Chrome) -> None:
    assert browser.find_elements(By.TAG_NAME, "th")[1].get_attribute("title") == "What was measured"
