"""CSV of logged steps and of summaries, whose numbers are spelt as in metrics.jsonl: read back, they are the same.

A cell is empty where a row has no such value; `null` is a value that was not finite. Texts stand as they are.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launch.run_dir import write_text

Row = dict[str, Any]


def write_steps_csv(path: Path, rows: Iterable[tuple[Row, Row]]) -> None:
    """One row per logged step, from (what identifies the run, line of metrics.jsonl).

    Columns: what identifies, step, every metric of any line by name. Raises ValueError if a metric has the name of an
    identifying column.
    """
    steps = [(flat(identity), flat(line)) for identity, line in rows]
    identifying = in_order(identity for identity, _ in steps)
    metrics = sorted({name for _, line in steps for name in line} - {"step"})
    if twice := sorted({"step", *metrics} & set(identifying)):
        raise ValueError(f"both a column that identifies a run and one of its steps: {', '.join(twice)}")
    write_csv(path, [*identifying, "step", *metrics], [identity | line for identity, line in steps])


def write_rows_csv(path: Path, rows: Iterable[Row]) -> None:
    """One row per dict, columns in order of appearance. {"a": {"b": 1}} is column a.b; lists are left out."""
    flattened = [flat(row) for row in rows]
    write_csv(path, in_order(flattened), flattened)


def write_csv(path: Path, columns: list[str], rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([spelt(row[column]) if column in row else "" for column in columns] for row in rows)
    write_text(path, text.getvalue())


def spelt(value: Any) -> str:
    """As json.dumps spells it, but a text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


def flat(row: Row) -> Row:
    return dict(leaves("", row))


def leaves(prefix: str, row: Row) -> Iterator[tuple[str, Any]]:
    """Values that are neither dicts nor lists, under their names with dots."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from leaves(f"{prefix}{name}.", value)
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def in_order(rows: Iterable[Row]) -> list[str]:
    """Names of all rows, each once, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
