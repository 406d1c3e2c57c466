"""report.html in real headless Chromium: what a reader clicks works, and nothing leaves the file."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.report_html import to_html
from launch.report_parts import Column, Curve, Figure, HeatMap, Report, Table

PROGRAMS = ("chromium", "chromedriver")
INSTALL_SECONDS = 240


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the distribution, installed if we may; else skipped with the reason."""
    if missing_programs():
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip(f"no {' and no '.join(missing_programs())}, and only root with apt-get can install them")
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium", "chromium-driver"]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if missing_programs():
            pytest.skip(
                f"apt-get cannot install chromium: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
            )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which root cannot have
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--window-size=1400,1200",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


HOSTILE = 'b</script><img src="http://example.com/x.png" onerror="throw 1">'


def report() -> Report:
    steps = [float(step) for step in range(1, 41)]
    curves = [
        Curve(leg, f"{leg}/repeat{repeat}", steps, [place + 10 / (step + repeat) for step in steps])
        for place, leg in enumerate(("a", HOSTILE))
        for repeat in (1, 2)
    ]
    rows: list[list[Any]] = [["a", 9.5, "x"], [HOSTILE, 10.25, "y"], ["c", None, "z"], ["d", 0.125, "not reached"]]
    return Report(
        title="A question?",
        paragraphs=["One paragraph."],
        warnings=["commit differs"],
        tables=[Table("Speed", [Column("leg"), Column("tok/s", 3, "Of all ranks."), Column("note")], rows)],
        figures=[
            Figure("loss", "Training loss", "step", "nats", curves),
            Figure("tok_per_sec", "Throughput", "step", "tok/s", curves),
            Figure("mfu", "MFU", "step", "percent", []),
        ],
        heat_maps=[HeatMap("load_a", "Load", [1, 10, 20], [[1.0, 0.5, 0.0], [1.0, 1.5, 2.0]])],
    )


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(to_html(report()), encoding="utf-8")
    browser.get(f"file://{path}")
    return browser


def visible(page: Any, plot: str) -> list[Any]:
    return page.execute_script(f"return document.getElementById('{plot}').data.map((trace) => trace.visible ?? true)")


def drawn_lines(page: Any, plot: str) -> int:
    return page.execute_script(f"return document.querySelectorAll('#{plot} .scatterlayer .trace').length")


def wait_until(page: Any, condition: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 10).until(lambda _: condition())


def test_the_page_asks_for_nothing_outside_itself_and_says_no_error(page: Any) -> None:
    """First, while the logs hold all that loading has caused."""
    requested = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert len([url for url in requested if url.startswith("file:///") and url.endswith("report.html")]) == 1
    assert [url for url in requested if not url.startswith(("file:///", "data:", "blob:"))] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_every_figure_is_drawn_and_what_was_not_measured_says_so(page: Any) -> None:
    assert drawn_lines(page, "plot-loss") == drawn_lines(page, "plot-tok_per_sec") == 4
    assert page.execute_script("return document.querySelectorAll('#plot-load_a .hm').length") == 1
    assert [each.text for each in page.find_elements("class name", "unmeasured")] == ["not measured"]


def test_a_click_on_a_leg_in_the_legend_toggles_its_lines_in_that_figure(page: Any) -> None:
    entries = page.find_elements("css selector", "#plot-loss .legendtoggle")
    assert len(entries) == 2  # one a leg, not one a run
    entries[0].click()
    wait_until(page, lambda: drawn_lines(page, "plot-loss") == 2)
    assert visible(page, "plot-loss") == ["legendonly", "legendonly", True, True]
    assert drawn_lines(page, "plot-tok_per_sec") == 4
    page.find_elements("css selector", "#plot-loss .legendtoggle")[0].click()
    wait_until(page, lambda: drawn_lines(page, "plot-loss") == 4)


def test_the_check_box_of_a_leg_toggles_it_in_every_figure(page: Any) -> None:
    boxes = page.find_elements("css selector", ".legs input")
    assert [box.get_attribute("value") for box in boxes] == ["a", HOSTILE]
    boxes[1].click()
    wait_until(page, lambda: drawn_lines(page, "plot-loss") == drawn_lines(page, "plot-tok_per_sec") == 2)
    assert visible(page, "plot-tok_per_sec") == [True, True, "legendonly", "legendonly"]
    boxes[1].click()
    wait_until(page, lambda: drawn_lines(page, "plot-loss") == drawn_lines(page, "plot-tok_per_sec") == 4)


@pytest.mark.parametrize(("button", "axis"), [(0, "xaxis"), (1, "yaxis")])
def test_a_button_makes_an_axis_logarithmic_and_linear_again(page: Any, button: int, axis: str) -> None:
    def kind() -> str:
        return page.execute_script(f"return document.getElementById('plot-loss')._fullLayout.{axis}.type")

    pressed = page.find_elements("css selector", "[data-plot=plot-loss]")[button]
    assert kind() == "linear"
    pressed.click()
    wait_until(page, lambda: kind() == "log")
    pressed.click()
    wait_until(page, lambda: kind() == "linear")


def test_a_click_on_a_header_sorts_by_value_both_ways_with_what_is_missing_last(page: Any) -> None:
    def legs() -> list[str]:
        return [cell.text for cell in page.find_elements("css selector", "tbody tr td:first-child")]

    header = page.find_elements("css selector", "thead th")[1]
    assert header.get_attribute("title") == "Of all ranks."
    header.click()
    assert legs() == ["d", "a", HOSTILE, "c"]  # 0.125, 9.5, 10.25: as numbers, not as texts
    assert header.get_attribute("aria-sort") == "ascending"
    header.click()
    assert legs() == [HOSTILE, "a", "d", "c"]
    page.find_elements("css selector", "thead th")[2].click()
    assert legs() == ["d", "a", HOSTILE, "c"]  # "not reached", x, y, z


def test_hovering_shows_the_value_and_the_run(page: Any) -> None:
    page.execute_script(
        "document.getElementById('plot-loss').scrollIntoView();"
        "Plotly.Fx.hover('plot-loss', [{curveNumber: 1, pointNumber: 39}])"
    )
    wait_until(page, lambda: page.find_elements("css selector", "#plot-loss .hovertext"))
    text = page.find_element("css selector", "#plot-loss .hovertext").text
    assert "a/repeat2" in text
    assert "step 40" in text


def test_no_text_of_the_report_became_markup_and_no_click_made_an_error(page: Any) -> None:
    assert page.find_elements("css selector", "img[src^='http']") == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    assert to_html(report()) == to_html(report())
