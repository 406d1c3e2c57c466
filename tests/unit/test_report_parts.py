"""How cells read, and a report as markdown."""

import math

import pytest

from launch.report_markdown import to_markdown
from launch.report_parts import Cell, Column, Curve, Figure, HeatMap, Report, Table


@pytest.mark.parametrize(
    ("cell", "digits", "text"),
    [
        (None, 3, "–"),
        ("not reached", 3, "not reached"),
        (0.0, 1, "0.0"),
        (3.14159, 3, "3.142"),
        (9999.0, 0, "9999"),
        (10_000, None, "10,000"),
        (-12_345.678, 1, "-12,345.7"),
        (9999.96, 1, "10,000.0"),  # as it reads, not as it is
        (1200, None, "1200"),
        (1200.0, None, "1200"),
        (0.1875, None, "0.1875"),  # no digits were named: nothing is dropped
        (12345.678, None, "12,345.678"),
        (math.nan, 2, "nan"),
        (math.inf, None, "inf"),
    ],
)
def test_a_cell_reads_the_same_in_every_format(cell: Cell, digits: int | None, text: str) -> None:
    assert Column("any", digits).shown(cell) == text


def test_a_leg_keeps_its_place_through_all_figures() -> None:
    first = Figure("a", "A", "step", "y", [Curve("late", "late-1", [1], [1.0]), Curve("b", "b-1", [], [])])
    second = Figure("b", "B", "step", "y", [Curve("b", "b-1", [1], [1.0]), Curve("new", "new-1", [1], [1.0])])
    assert Report("t", [], [], [], [first, second]).legs() == ["late", "b", "new"]


def test_a_curve_of_nothing_finite_is_not_measured() -> None:
    curves = [Curve("a", "a-1", [], []), Curve("a", "a-2", [1], [math.nan]), Curve("a", "a-3", [1, 2], [math.nan, 1.0])]
    assert [curve.run for curve in Figure("a", "A", "step", "y", curves).measured_curves()] == ["a-3"]


REPORT = Report(
    title="Capacity <1.0> or `1.25`?",
    paragraphs=["Two legs, _one_ question:\nwhat does leg_name|x cost?", "Second *paragraph*."],
    warnings=["Leg a has 1 repeat."],
    tables=[
        Table(
            "Result",
            [Column("leg"), Column("val/loss", 3, "mean over repeats"), Column("tok/s", 0), Column("reached")],
            [["base", 3.14159, 123456.7, 900], ["a|<b>_", None, 9999.4, "not | reached"]],
            "n = 2",
        ),
        Table("Nothing", [Column("leg"), Column("verdict")], []),
    ],
    figures=[Figure("loss", "Loss [nats]", "step", "loss", [])],
    heat_maps=[HeatMap("load a(1)", "Load", [1], [[1.0]])],
)

MARKDOWN = r"""# Capacity <1.0> or \`1.25\`?

Two legs, \_one\_ question: what does leg_name|x cost?

Second \*paragraph\*.

## Warnings

* Leg a has 1 repeat.

## Result

| leg | val/loss | tok/s | reached |
| --- | ---: | ---: | ---: |
| base | 3.142 | 123,457 | 900 |
| a\|\<b>\_ | – | 9999 | not \| reached |

n = 2

<details><summary>What the columns mean</summary>

* val/loss: mean over repeats

</details>

## Nothing

| leg | verdict |
| --- | --- |

## Figures

![Loss \[nats\]](figures/loss.png)

## Load of the experts

![Load](figures/load%20a%281%29.png)
"""


def test_a_report_as_markdown() -> None:
    assert to_markdown(REPORT) == MARKDOWN


def test_a_report_of_nothing_is_its_title() -> None:
    assert to_markdown(Report("Empty", [], [], [], [])) == "# Empty\n"
