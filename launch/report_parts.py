"""What a report is made of, however it is shown: tables, figures, heat maps. No text of a format, no drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Cell = str | float | None  # None: not measured, and shown as such, never as 0
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table. `digits` are those of a number after the point; None: a text, or an integer."""

    name: str
    digits: int | None = None
    explanation: str = ""  # one sentence for the reader who asks

    def shown(self, cell: Cell) -> str:
        """How a cell reads, in every format. Thousands are set apart from 10,000 on, as it reads when rounded."""
        if cell is None:
            return NOT_MEASURED
        if isinstance(cell, str):
            return cell
        digits = "" if self.digits is None and cell % 1 else f".{self.digits or 0}f"
        plain = format(cell, digits)
        return format(cell, f",{digits}") if math.isfinite(cell) and abs(float(plain)) >= 10_000 else plain


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column. A column of numbers may hold texts too ("not reached")."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    note: str = ""  # shown below

    def holds_numbers(self, column: int) -> bool:
        """Whether a column has numbers, whatever else: it is aligned, and sorted, by them."""
        return any(isinstance(row[column], int | float) for row in self.rows)


@dataclass(frozen=True)
class Curve:
    """One run's line in a figure. Runs of one leg share its colour and its place in the legend."""

    leg: str
    run: str
    x: list[float]
    y: list[float]

    @property
    def measured(self) -> bool:
        return any(math.isfinite(value) for value in self.y)


@dataclass(frozen=True)
class Figure:
    """Curves over steps. `name` is that of its file: figures/NAME.png. Without a curve it says "not measured"."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]

    def measured_curves(self) -> list[Curve]:
        return [curve for curve in self.curves if curve.measured]


@dataclass(frozen=True)
class HeatMap:
    """Load of every expert over the mean, by step: 1.0 is an even share. `load[expert][i]` belongs to `steps[i]`."""

    name: str  # load_LEG_layer_3
    title: str
    steps: list[int]
    load: list[list[float]]


@dataclass(frozen=True)
class Report:
    """A whole report, in reading order: title, what was asked, warnings, tables, figures, heat maps."""

    title: str
    paragraphs: list[str]  # plain text
    warnings: list[str]
    tables: list[Table]
    figures: list[Figure]
    heat_maps: list[HeatMap] = field(default_factory=list)

    def legs(self) -> list[str]:
        """Every leg that a figure tries to show, by first appearance: its place decides its colour in all of them."""
        return list(dict.fromkeys(curve.leg for figure in self.figures for curve in figure.curves))
