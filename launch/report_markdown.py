"""A report as GitHub markdown, beside its folder of figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from launch.report_parts import Column, Figure, HeatMap, Report, Table

# What would turn a plain text into markup: code, emphasis, strikethrough, tags; underscores only at the edge of a word.
MARKUP = re.compile(r"[\\`*]|~~|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])")


def to_markdown(report: Report) -> str:
    """The whole report. Images are links to figures/NAME.png, which launch.figures writes."""
    return "\n\n".join(blocks(report)) + "\n"


def blocks(report: Report) -> Iterator[str]:
    yield f"# {plain(report.title)}"
    yield from map(plain, report.paragraphs)
    if report.warnings:
        yield "## Warnings"
        yield "\n".join(f"* {plain(warning)}" for warning in report.warnings)
    for table in report.tables:
        yield f"## {plain(table.title)}"
        yield table_lines(table)
        if table.note:
            yield plain(table.note)
        if explanations := [column for column in table.columns if column.explanation]:
            yield explained(explanations)
    if report.figures:
        yield "## Figures"
        yield from map(image, report.figures)
    if report.heat_maps:
        yield "## Load of the experts"
        yield from map(image, report.heat_maps)


def table_lines(table: Table) -> str:
    head = [in_cell(column.name) for column in table.columns]
    rule = ["---:" if table.holds_numbers(index) else "---" for index in range(len(table.columns))]
    body = [
        [in_cell(column.shown(cell)) for column, cell in zip(table.columns, row, strict=True)] for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def explained(columns: list[Column]) -> str:
    lines = "\n".join(f"* {plain(column.name)}: {plain(column.explanation)}" for column in columns)
    return f"<details><summary>What the columns mean</summary>\n\n{lines}\n\n</details>"


def image(part: Figure | HeatMap) -> str:
    alternative = re.sub(r"([\[\]])", r"\\\1", plain(part.title))
    return f"![{alternative}](figures/{quote(part.name, safe='')}.png)"


def plain(text: str) -> str:
    """A text on one line that markdown shows as it is."""
    return MARKUP.sub(lambda match: "".join(f"\\{letter}" for letter in match[0]), " ".join(text.split()))


def in_cell(text: str) -> str:
    return plain(text).replace("|", "\\|")
