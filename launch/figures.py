"""A report's figures as PNG files, the same bytes whenever they are made; and the colour of every leg, in any format.

Drawn without pyplot, whose figures live in one place for the whole process.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch.report_parts import Figure, HeatMap, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito, "Color Universal Design" (2008): told apart with any kind of colour vision. Without their yellow, which
# is too pale for a line on white. Legs beyond these colours take them again, with other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot")  # as plotly calls them
LINE_STYLES = {"solid": "-", "dash": "--", "dot": ":"}  # as matplotlib calls them

# Load of an expert over the mean: blue for too little, white for an even share, red for too much (ColorBrewer's RdBu).
# One scale for every heat map, so that two of them may be compared by eye; from EVEN_LOAD * 2 on nothing gets redder.
HEAT_COLOURS = ("#2166AC", "#92C5DE", "#F7F7F7", "#F4A582", "#B2182B")
HEAT_MAX = 2.0
HEAT_TICKS = {0.0: "0", 0.5: "0.5", 1.0: "1", 1.5: "1.5", 2.0: "2 or more"}
LOAD_LABEL = "load / mean load"

FEW_POINTS = 30  # a curve of so few gets a mark at each: a lone point has no line to be seen by
MANY_POINTS = 1000  # a curve of so many is drawn thinner
LONGEST_LABEL = 60  # letters in a legend


class LegStyle(NamedTuple):
    colour: str
    dash: str


def leg_styles(legs: list[str]) -> dict[str, LegStyle]:
    """Colour and dashes of each leg, by its place in the report."""
    return {
        leg: LegStyle(COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)])
        for place, leg in enumerate(legs)
    }


def line_width(points: int) -> float:
    return 0.9 if points > MANY_POINTS else 1.6


def shortened(name: str) -> str:
    """A name for a legend: both its ends, since legs of one suite tend to share one of them."""
    half = (LONGEST_LABEL - 1) // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[:half]}…{name[-half:]}"


def write_figures(report: Report, folder: Path) -> None:
    """Write one PNG for every figure and heat map, folder/NAME.png, each atomically.

    In matplotlib's own style: it reads a matplotlibrc from the current directory, and one from the home directory.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    styles = leg_styles(report.legs())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for figure in report.figures:
            write_png(draw_curves(figure, styles), folder / f"{figure.name}.png")
        for heat_map in report.heat_maps:
            write_png(draw_heat_map(heat_map), folder / f"{heat_map.name}.png")


def write_png(canvas: Canvas, path: Path) -> None:
    """Without matplotlib's version in the file: what is drawn decides the bytes."""
    content = io.BytesIO()
    canvas.savefig(content, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # only a failure leaves it


def new_canvas(title: str, x_label: str, y_label: str, height: float) -> tuple[Canvas, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.set_title(as_text(title), loc="left", fontsize=12, wrap=True)
    axes.set_xlabel(as_text(x_label))
    axes.set_ylabel(as_text(y_label))
    return canvas, axes


def draw_curves(figure: Figure, styles: dict[str, LegStyle]) -> Canvas:
    curves = figure.measured_curves()
    legs = [leg for leg in styles if any(curve.leg == leg for curve in curves)]
    labels = [as_text(shortened(leg)) for leg in legs]
    columns = legend_columns(labels)
    canvas, axes = new_canvas(figure.title, figure.x_label, figure.y_label, 4.5 + 0.22 * math.ceil(len(legs) / columns))
    if not curves:
        say_not_measured(axes)
        return canvas
    lines = {}
    for curve in curves:
        [lines[curve.leg]] = axes.plot(
            curve.x,
            curve.y,
            color=styles[curve.leg].colour,
            linestyle=LINE_STYLES[styles[curve.leg].dash],
            linewidth=line_width(len(curve.x)),
            marker="o" if len(curve.x) <= FEW_POINTS else "",
            markersize=3,
        )
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.ticklabel_format(useOffset=False)
    entries = [lines[leg] for leg in legs]
    canvas.legend(entries, labels, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
    return canvas


def draw_heat_map(heat_map: HeatMap) -> Canvas:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    canvas, axes = new_canvas(heat_map.title, "step", "expert", 4.5)
    if not heat_map.steps:
        say_not_measured(axes)
        return canvas
    colours = LinearSegmentedColormap.from_list("load", HEAT_COLOURS, N=257)  # odd: one is the middle
    mesh = axes.pcolormesh(
        edges(heat_map.steps), edges(range(len(heat_map.load))), heat_map.load, cmap=colours, vmin=0, vmax=HEAT_MAX
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bar = canvas.colorbar(mesh, ax=axes, label=LOAD_LABEL, extend="max")
    bar.set_ticks(list(HEAT_TICKS), labels=list(HEAT_TICKS.values()))
    return canvas


def edges(centres: list[int] | range) -> list[float]:
    """Where the cells around these points begin and end: halfway to the next; a lone one is 1 wide."""
    between = [(left + right) / 2 for left, right in itertools.pairwise(centres)]
    if not between:
        return [centres[0] - 0.5, centres[0] + 0.5]
    return [2 * centres[0] - between[0], *between, 2 * centres[-1] - between[-1]]


def say_not_measured(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(
        0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=16, color="#666666"
    )


def legend_columns(labels: list[str]) -> int:
    """As many as fit below the axes, given the longest label."""
    return max(1, min(4, 110 // (max(map(len, labels), default=0) + 8)))


def as_text(text: str) -> str:
    """Matplotlib reads what is between dollars as mathematics."""
    return text.replace("$", r"\$")
