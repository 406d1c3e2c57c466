"""What a report is made of, however it is shown: tables, figures, heat maps. No text of a format, no drawing."""

from __future__ import annotations

from dataclasses import dataclass, field

Cell = str | float | None  # None: not measured, and shown as such, never as 0


@dataclass(frozen=True)
class Column:
    """A column of a table. `digits` are those of a number after the point; None: a text, or an integer."""

    name: str
    digits: int | None = None
    explanation: str = ""  # one sentence for the reader who asks


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column. A column of numbers may hold texts too ("not reached")."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    note: str = ""  # shown below


@dataclass(frozen=True)
class Curve:
    """One run's line in a figure. Runs of one leg share its colour and its place in the legend."""

    leg: str
    run: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Figure:
    """Curves over steps. `name` is that of its file: figures/NAME.png. Without a curve it says "not measured"."""

    name: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]


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
