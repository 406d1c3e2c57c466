"""A report as one HTML page that needs nothing else: plotly.js is in it, and it fetches nothing.

report.html.template holds the page's style and its script; this file, what goes into it. The same report gives the same
bytes: ids are counted, and no date is named.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launch.figures import (
    FEW_POINTS,
    HEAT_COLOURS,
    HEAT_MAX,
    HEAT_TICKS,
    LOAD_LABEL,
    LegStyle,
    leg_styles,
    line_width,
    shortened,
)
from launch.report_parts import Cell, Column, Curve, Figure, HeatMap, Report, Table

TEMPLATE = Path(__file__).with_name("report.html.template")
DASH_ARRAYS = {"solid": "none", "dash": "6 3", "dot": "2 3"}  # as SVG calls them, beside the check boxes

PLOT_HEIGHT = 400  # pixels; a legend is added below
LEGEND_ROW = 22
SIGNIFICANT_DIGITS = 6  # of what is drawn; steps.csv has them all

Plot = dict[str, Any]  # "id" of its element, plotly's "data" and "layout"


def to_html(report: Report) -> str:
    """The whole page. Only what a person may see is in it: no path, no host, no date."""
    from plotly.offline import get_plotlyjs

    styles = leg_styles(report.legs())
    plots = [curves_plot(f"figure-{i}", figure, styles) for i, figure in enumerate(report.figures) if shows(figure)]
    plots += [heat_plot(f"heat-map-{i}", heat_map) for i, heat_map in enumerate(report.heat_maps) if shows(heat_map)]
    parts = {
        "title": escape(report.title),
        "plotly_js": get_plotlyjs(),
        "body": "\n".join(body(report, styles)),
        "plots": in_script(plots),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: what is filled in is not read


def shows(part: Figure | HeatMap) -> bool:
    return bool(part.measured_curves() if isinstance(part, Figure) else part.steps)


def body(report: Report, styles: dict[str, LegStyle]) -> Iterator[str]:
    yield f"<h1>{escape(report.title)}</h1>"
    yield from (f"<p>{escape(paragraph)}</p>" for paragraph in report.paragraphs)
    if report.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
        yield f'<section class="warnings" role="note"><strong>Warnings</strong><ul>{items}</ul></section>'
    if any(map(shows, report.figures)):
        boxes = "\n".join(check_box(leg, style) for leg, style in styles.items())
        yield f'<div class="legs" role="group" aria-label="Legs shown in all figures">\n{boxes}\n</div>'
    yield from map(table_section, report.tables)
    if report.figures:
        yield figures_section("Figures", (figure_box(f"figure-{i}", part) for i, part in enumerate(report.figures)))
    if report.heat_maps:
        boxes_of_load = (figure_box(f"heat-map-{i}", part) for i, part in enumerate(report.heat_maps))
        yield figures_section("Load of the experts", boxes_of_load)


def check_box(leg: str, style: LegStyle) -> str:
    stroke = f'stroke="{style.colour}" stroke-width="3" stroke-dasharray="{DASH_ARRAYS[style.dash]}"'
    sample = f'<svg width="22" height="10" aria-hidden="true"><line x1="0" x2="22" y1="5" y2="5" {stroke}/></svg>'
    box = f'<input type="checkbox" checked autocomplete="off" data-leg="{escape(leg)}">'
    return f'<label title="{escape(leg)}">{box}{sample}<span class="name">{escape(leg)}</span></label>'


def table_section(table: Table) -> str:
    numeric = [table.holds_numbers(index) for index in range(len(table.columns))]
    head = "".join(header_cell(column, is_number) for column, is_number in zip(table.columns, numeric, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(body_cell(*each) for each in zip(row, table.columns, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    grid = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"
    return f'<section><h2>{escape(table.title)}</h2>\n<div class="scroll">{grid}</div>{note}</section>'


def header_cell(column: Column, is_number: bool) -> str:
    explanation = f' title="{escape(column.explanation)}"' if column.explanation else ""
    button = f'<button type="button"><span class="name">{escape(column.name)}</span></button>'
    return f'<th scope="col" aria-sort="none"{class_of(is_number)}{explanation}>{button}</th>'


def body_cell(cell: Cell, column: Column, is_number: bool) -> str:
    """A number carries its raw value, by which the page sorts."""
    key = ""
    if cell is None:
        key = " data-missing"
    elif not isinstance(cell, str) and math.isfinite(cell):
        key = f' data-value="{cell!r}"'
    return f"<td{class_of(is_number)}{key}>{breakable(column.shown(cell))}</td>"


def class_of(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def figures_section(title: str, boxes: Iterable[str]) -> str:
    return f'<section><h2>{title}</h2>\n<div class="figures">\n' + "\n".join(boxes) + "\n</div></section>"


def figure_box(plot_id: str, part: Figure | HeatMap) -> str:
    """The frame that the page's script draws a plot into, with buttons for the axes of curves."""
    title = f"<h3>{escape(part.title)}</h3>"
    if not shows(part):
        return f'<figure><figcaption>{title}</figcaption><p class="missing">not measured</p></figure>'
    buttons = "".join(axis_button(plot_id, axis) for axis in "xy") if isinstance(part, Figure) else ""
    caption = f'<figcaption>{title}<span class="axes">{buttons}</span></figcaption>'
    return f'<figure>{caption}<div id="{plot_id}"></div></figure>'


def axis_button(plot_id: str, axis: str) -> str:
    return (
        f'<button type="button" data-plot="{plot_id}" data-axis="{axis}axis" aria-pressed="false">log {axis}</button>'
    )


def curves_plot(plot_id: str, figure: Figure, styles: dict[str, LegStyle]) -> Plot:
    curves = figure.measured_curves()
    legs = [leg for leg in styles if any(curve.leg == leg for curve in curves)]
    in_order = [curve for leg in legs for curve in curves if curve.leg == leg]
    first_of_leg = {id(next(curve for curve in curves if curve.leg == leg)) for leg in legs}
    data = [curve_trace(curve, styles[curve.leg], id(curve) in first_of_leg) for curve in in_order]
    legend_height = LEGEND_ROW * len(legs) + 10
    layout = {
        **base_layout(PLOT_HEIGHT + legend_height, bottom=55 + legend_height),
        "xaxis": axis_layout(figure.x_label),
        "yaxis": axis_layout(figure.y_label),
        "hovermode": "closest",
        "legend": legend_layout(legend_height),
    }
    return {"id": plot_id, "data": data, "layout": layout}


def legend_layout(height: int) -> dict[str, Any]:
    """Below the axes, a row for each leg however long its name. A vertical legend would take the width of the axes."""
    return {
        "orientation": "h",
        "entrywidth": 1,
        "entrywidthmode": "fraction",
        "tracegroupgap": 0,
        "maxheight": height,
        **{"xref": "container", "x": 0, "xanchor": "left"},
        **{"yref": "container", "y": 0, "yanchor": "bottom"},
    }


def curve_trace(curve: Curve, style: LegStyle, in_legend: bool) -> dict[str, Any]:
    """plotly reads tags, and %{...}, in names: so names are escaped, and reach its texts through `meta` alone."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(curve.x) <= FEW_POINTS else "lines",
        "x": numbers(curve.x),
        "y": [rounded(value) for value in curve.y],
        "line": {"color": style.colour, "dash": style.dash, "width": line_width(len(curve.x))},
        "marker": {"size": 5},
        "meta": [escape(shortened(curve.leg)), escape(curve.leg), escape(curve.run)],
        "name": "%{meta[0]}",
        "legendgroup": curve.leg,
        "showlegend": in_legend,
        "hovertemplate": "step %{x:,}<br>value %{y:,}<br>leg %{meta[1]}<br>run %{meta[2]}<extra></extra>",
    }


def heat_plot(plot_id: str, heat_map: HeatMap) -> Plot:
    places = [place / (len(HEAT_COLOURS) - 1) for place in range(len(HEAT_COLOURS))]
    trace = {
        "type": "heatmap",
        "x": heat_map.steps,
        "y": list(range(len(heat_map.load))),
        "z": [[rounded(value) for value in row] for row in heat_map.load],
        "zmin": 0,
        "zmax": HEAT_MAX,
        "colorscale": list(zip(places, HEAT_COLOURS, strict=True)),
        "colorbar": {
            "title": {"text": LOAD_LABEL, "side": "right"},
            "tickvals": list(HEAT_TICKS),
            "ticktext": list(HEAT_TICKS.values()),
        },
        "hovertemplate": "step %{x:,}<br>expert %{y}<br>load / mean %{z}<extra></extra>",
    }
    layout = {
        **base_layout(PLOT_HEIGHT, bottom=55),
        "xaxis": axis_layout("step"),
        "yaxis": {**axis_layout("expert"), "tickformat": "d"},
    }
    return {"id": plot_id, "data": [trace], "layout": layout}


def base_layout(height: int, bottom: int) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 70, "r": 15, "t": 30, "b": bottom},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1b1b1b"},
        "hoverlabel": {"align": "left"},
    }


def axis_layout(label: str) -> dict[str, Any]:
    return {
        "title": {"text": escape(label)},
        "automargin": True,
        "gridcolor": "#dddddd",
        "linecolor": "#888888",
        "mirror": True,
        "zeroline": False,
        "exponentformat": "none",
        "separatethousands": True,
    }


def numbers(values: list[float]) -> list[float | None]:
    """JSON has no nan and no infinity: a gap in the line."""
    return [value if math.isfinite(value) else None for value in values]


def rounded(value: float) -> float | None:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def breakable(text: str) -> str:
    """Where a long name may go on in the next line, a browser would not know."""
    return re.sub(r"(?<=[_/=])(?=\w)", "<wbr>", escape(text))


def in_script(value: Any) -> str:
    """JSON that no text in it can end the script element of: every "<" is spelt as an escape."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def escape(text: str) -> str:
    return html.escape(text, quote=True)
