"""A report as one HTML file that asks for nothing from the network: plotly.js, styles and data are in it.

report_page.html is the page; here its texts, tables and plots are made. The same report gives the same bytes.
"""

from __future__ import annotations

import html
import json
import re
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
from launch.report_parts import Cell, Column, Figure, HeatMap, Report, Table

PAGE = Path(__file__).with_name("report_page.html")
WIDE_TEXT = 40  # letters from which a cell keeps some width, lest it become a column of single words


def to_html(report: Report) -> str:
    from plotly.offline import get_plotlyjs

    styles = leg_styles(report.legs())
    plots = [plot_of(figure, styles) for figure in report.figures if figure.measured_curves()]
    plots += [heat_plot(heat_map) for heat_map in report.heat_maps if heat_map.steps]
    parts = {
        "title": html.escape(report.title),
        "plotly": get_plotlyjs(),
        "introduction": introduction(report),
        "tables": "\n".join(table_html(table) for table in report.tables),
        "figures": figures_html(report, styles),
        "plots": in_script(plots),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], PAGE.read_text(encoding="utf-8"))


def in_script(content: Any) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def introduction(report: Report) -> str:
    lines = [f"<p>{html.escape(paragraph)}</p>" for paragraph in report.paragraphs]
    if report.warnings:
        items = "".join(f"<li>{html.escape(warning)}</li>" for warning in report.warnings)
        lines.append(f'<div class="warnings" role="alert"><b>Before you believe a number</b><ul>{items}</ul></div>')
    return "\n".join(lines)


# --- tables ---------------------------------------------------------------------------------------------------------


def table_html(table: Table) -> str:
    numeric = [table.holds_numbers(index) for index in range(len(table.columns))]
    head = "".join(header_html(column, number) for column, number in zip(table.columns, numeric, strict=True))
    rows = []
    for row in table.rows:
        cells = zip(table.columns, row, numeric, strict=True)
        rows.append("<tr>" + "".join(cell_html(column, cell, number) for column, cell, number in cells) + "</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n{note}"
    )


def header_html(column: Column, number: bool) -> str:
    kind = ' class="number"' if number else ""
    title = f' title="{html.escape(column.explanation)}"' if column.explanation else ""
    return f'<th scope="col"{kind}{title}>{html.escape(column.name)}</th>'


def cell_html(column: Column, cell: Cell, number: bool) -> str:
    kinds = ["number"] if number else []
    if cell is None:
        kinds.append("missing")
    if isinstance(cell, str) and len(cell) > WIDE_TEXT:
        kinds = ["wide"]
    value = f' data-value="{cell!r}"' if isinstance(cell, int | float) else ""
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}{value}>{html.escape(column.shown(cell))}</td>"


# --- figures --------------------------------------------------------------------------------------------------------


def figures_html(report: Report, styles: dict[str, LegStyle]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{html.escape(leg)}">'
        f'<span class="swatch" style="border-color: {style.colour}; border-top-style: {css_dash(style)}"></span>'
        f"{html.escape(leg)}</label>"
        for leg, style in styles.items()
    )
    figures = "\n".join(figure_html(figure) for figure in report.figures)
    parts = [f'<h2>Figures</h2>\n<div class="legs">{boxes}</div>\n<div class="figures">\n{figures}\n</div>']
    if report.heat_maps:
        maps = "\n".join(heat_map_html(heat_map) for heat_map in report.heat_maps)
        parts.append(f'<h2>Load of the experts</h2>\n<div class="figures">\n{maps}\n</div>')
    return "\n".join(parts)


def css_dash(style: LegStyle) -> str:
    return {"solid": "solid", "dash": "dashed", "dot": "dotted"}[style.dash]


def figure_html(figure: Figure) -> str:
    if not figure.measured_curves():
        return in_frame(figure, '<div class="unmeasured">not measured</div>')
    where = plot_id(figure)
    buttons = "".join(
        f'<button type="button" data-plot="{where}" data-axis="{axis}axis" aria-pressed="false">log {axis}</button>'
        for axis in "xy"
    )
    return in_frame(figure, f'<div class="axes">{buttons}</div><div class="plot" id="{where}"></div>')


def heat_map_html(heat_map: HeatMap) -> str:
    if not heat_map.steps:
        return in_frame(heat_map, '<div class="unmeasured">not measured</div>')
    return in_frame(heat_map, f'<div class="plot" id="{plot_id(heat_map)}"></div>')


def in_frame(part: Figure | HeatMap, content: str) -> str:
    return f'<div class="figure"><h3>{html.escape(part.title)}</h3>{content}</div>'


def plot_id(part: Figure | HeatMap) -> str:
    return "plot-" + re.sub(r"[^A-Za-z0-9_.-]", "_", part.name)


def plot_of(figure: Figure, styles: dict[str, LegStyle]) -> dict[str, Any]:
    """What Plotly.newPlot takes. Runs of a leg are one group of the legend, which shows the first of them."""
    traces: list[dict[str, Any]] = []
    for curve in figure.measured_curves():
        style, few = styles[curve.leg], len(curve.x) <= FEW_POINTS
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if few else "lines",
                "name": html.escape(shortened(curve.leg)),  # plotly reads names as HTML
                "legendgroup": curve.leg,
                "showlegend": all(trace["legendgroup"] != curve.leg for trace in traces),
                "line": {"color": style.colour, "dash": style.dash, "width": line_width(len(curve.x))},
                "marker": {"size": 4},
                "x": curve.x,
                "y": curve.y,
                "hovertemplate": f"%{{y:.6~g}}, step %{{x}}<br>{html.escape(curve.run)}<extra></extra>",
            }
        )
    layout = {
        **frame(figure.x_label, figure.y_label),
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "groupclick": "togglegroup"},
        "hovermode": "closest",
    }
    return {"id": plot_id(figure), "data": traces, "layout": layout}


def heat_plot(heat_map: HeatMap) -> dict[str, Any]:
    places = [place / (len(HEAT_COLOURS) - 1) for place in range(len(HEAT_COLOURS))]
    trace = {
        "type": "heatmap",
        "x": heat_map.steps,
        "y": list(range(len(heat_map.load))),
        "z": heat_map.load,
        "zmin": 0,
        "zmax": HEAT_MAX,
        "colorscale": [list(pair) for pair in zip(places, HEAT_COLOURS, strict=True)],
        "colorbar": {
            "title": {"text": LOAD_LABEL, "side": "right"},
            "tickvals": list(HEAT_TICKS),
            "ticktext": list(HEAT_TICKS.values()),
        },
        "hovertemplate": "expert %{y}, step %{x}: %{z:.3f} of the mean<extra></extra>",
    }
    return {"id": plot_id(heat_map), "data": [trace], "layout": frame("step", "expert")}


def frame(x_label: str, y_label: str) -> dict[str, Any]:
    grid = {"gridcolor": "#DDDDDD", "zeroline": False, "automargin": True}
    return {
        "xaxis": {"title": {"text": html.escape(x_label)}, **grid},
        "yaxis": {"title": {"text": html.escape(y_label)}, **grid},
        "margin": {"l": 60, "r": 20, "t": 34, "b": 50},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1d2126"},
    }
