"""A report as a page, read as text. What a browser makes of it: tests/integration/test_report_in_a_browser.py."""

import json
import math
import re
from typing import Any

import pytest

from launch.figures import leg_styles
from launch.report_html import to_html
from launch.report_parts import Column, Curve, Figure, HeatMap, Report, Table

HOSTILE = """<b>&"'</script><!--{{plots}}%{x}"""
TABLE = Table(
    HOSTILE,
    [Column("leg"), Column("val/loss", 3, HOSTILE), Column("tok/s", 0), Column("verdict")],
    [["base_leg", 3.14159, 123456.7, "–"], [HOSTILE, None, math.nan, "not reached"]],
)
CURVES = [
    Curve("base_leg", "base_leg-1", [1, 20_000_001], [2.0, math.nan]),
    Curve(HOSTILE, f"{HOSTILE}-1", [1], [1.23456789]),
    Curve("base_leg", "base_leg-2", [1], [2.0]),
]
REPORT = Report(
    HOSTILE,
    [HOSTILE],
    [HOSTILE],
    [TABLE],
    [Figure("mfu", HOSTILE, "step", "percent", []), Figure("loss", HOSTILE, HOSTILE, HOSTILE, CURVES)],
    [HeatMap("load", HOSTILE, [1, 5], [[0.5, math.inf], [1.5, 1.0]]), HeatMap("none", "No load", [], [])],
)


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(REPORT)


def without_library(page: str) -> str:
    """The page but plotly.js, which is its longest line by far."""
    return re.sub(r"(?s)<script>/\*\*.*?</script>", "", page, count=1)


def plots(page: str) -> list[dict[str, Any]]:
    match = re.search(r'(?s)<script type="application/json" id="plots">(.*?)</script>', page)
    assert match
    return json.loads(match[1])


def test_the_same_report_gives_the_same_bytes(page: str) -> None:
    assert to_html(REPORT) == page


def test_plotly_is_in_the_page_once_and_the_page_names_no_other_file(page: str) -> None:
    icon = '<link rel="icon" href="data:,">'  # without one a browser asks the server for it
    assert page.count("* plotly.js v") == page.count(icon) == 1
    rest = without_library(page).replace(icon, "")
    assert not re.search(r"(?i)<link|<img|<iframe|\bsrc=|@import|url\(", rest)
    assert "default-src 'none'" in page


def test_names_neither_end_a_script_nor_become_elements(page: str) -> None:
    rest = without_library(page)
    assert "<b>" not in rest
    assert rest.count("</script>") == 2
    assert rest.count("<!--") == 1  # the template's own
    assert rest.count("&lt;b&gt;&amp;&quot;&#x27;") > 5


def test_names_reach_plotly_as_texts_that_it_neither_parses_nor_fills_in(page: str) -> None:
    [_, _, trace] = plots(page)[0]["data"]
    assert trace["name"] == "%{meta[0]}"
    assert all(text.startswith("&lt;b&gt;") for text in trace["meta"])
    assert "b>" not in trace["hovertemplate"].replace("<br>", "")


def test_numbers_are_shown_rounded_and_sorted_raw(page: str) -> None:
    assert '<td class="number" data-value="3.14159">3.142</td>' in page
    assert '<td class="number" data-value="123456.7">123,457</td>' in page
    assert '<td class="number" data-missing>–</td>' in page
    assert '<td class="number">nan</td>' in page
    assert "<td>–</td>" in page  # a text


def test_runs_of_a_leg_are_one_group_with_one_legend_entry_and_the_colour_of_the_png_files(page: str) -> None:
    traces = plots(page)[0]["data"]
    assert [(trace["legendgroup"], trace["showlegend"]) for trace in traces] == [
        ("base_leg", True),
        ("base_leg", False),
        (HOSTILE, True),
    ]
    styles = leg_styles(REPORT.legs())
    assert all(trace["line"]["color"] == styles[trace["legendgroup"]].colour for trace in traces)


def test_what_is_not_finite_is_a_gap_and_a_step_keeps_all_its_digits(page: str) -> None:
    curves, load = plots(page)
    assert curves["data"][0]["x"] == [1, 20_000_001]
    assert curves["data"][0]["y"] == [2.0, None]
    assert curves["data"][2]["y"] == [1.23457]
    assert load["data"][0]["z"] == [[0.5, None], [1.5, 1.0]]


def test_what_was_not_measured_says_so(page: str) -> None:
    assert [plot["id"] for plot in plots(page)] == ["figure-1", "heat-map-0"]
    assert page.count('<p class="missing">not measured</p>') == 2
    assert page.count("data-axis=") == page.count("data-plot=") == 2


def test_a_report_of_nothing_is_a_page() -> None:
    assert "<h1>Empty</h1>" in to_html(Report("Empty", [], [], [], []))
