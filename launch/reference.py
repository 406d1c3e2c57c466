"""Figures that somebody published, as a table beside our own: a JSON file in benchmarks/, checked like a run file.

What was not published is absent. The hardware, tokens per step, FLOPs per token and peak behind the figures are stated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from launch.report_parts import Column, Table
from launch.run_config import parse_section, read_json
from model.config import CompileMode, ConfigError, Section


class ReferenceRow(Section):
    """One leg, with what was published of it."""

    leg: str = Field(min_length=1)
    fp8: Literal["none", "without experts", "with experts"]
    compile: CompileMode
    coalesce_guard: bool = False  # inductor's coalesce_tiling_analysis off
    capacity_factor: float | None = Field(None, ge=0)  # 0: dropless
    steps: int | None = Field(None, ge=1)  # that it was to take
    status: str | None = None
    tok_per_sec: float | None = Field(None, gt=0)  # of all GPUs
    dt_ms: float | None = Field(None, gt=0)
    mfu: float | None = Field(None, gt=0)  # percent of peak_flops
    peak_mem_mib: float | None = Field(None, gt=0)
    total_time_min: float | None = Field(None, gt=0)


class Reference(Section):
    title: str
    source: str
    note: str
    hardware: str
    num_gpus: int = Field(ge=1)
    tokens_per_step: int = Field(ge=1)
    flops_per_token: float = Field(gt=0)
    peak_flops: float = Field(gt=0)  # of one GPU, which MFU was computed with
    rows: list[ReferenceRow] = Field(min_length=1)


def read_reference(path: Path) -> Reference:
    """Raises ConfigError, which names the key, for a file that is not one of published figures."""
    if not path.is_file():
        raise ConfigError(f"--reference {path}: no such file. benchmarks/seed_h800.json ships.")
    return parse_reference(read_json(path), path.name)


def parse_reference(tree: dict[str, Any], where: str) -> Reference:
    """As read_reference, of what its file holds; `where` is the file's name."""
    rows = tree.get("rows")
    if isinstance(rows, list):  # one by one, so that a refusal names the row
        tree["rows"] = [parse_section(ReferenceRow, row, f"{where}: rows[{index}]") for index, row in enumerate(rows)]
    reference = parse_section(Reference, tree, f"{where}: reference")
    legs = [row.leg for row in reference.rows]
    for leg in legs:
        if legs.count(leg) > 1:
            raise ConfigError(f"{where}: leg={leg!r} stands in two rows. Give each a name of its own.")
    return reference


def reference_table(reference: Reference) -> Table:
    """What was published, and tok/s per GPU from it: the figure to compare first across machines."""
    mfu = (
        f"percent of {reference.peak_flops / 1e12:g} TFLOP/s a GPU, {reference.flops_per_token / 1e6:g} MFLOP per token"
    )
    columns = [
        Column("leg"),
        Column("status"),
        Column("steps"),
        Column("tok/s", 0, f"all {reference.num_gpus} GPUs, mean over the last 50 steps"),
        Column("tok/s per GPU", 0, f"tok/s over {reference.num_gpus}"),
        Column("dt ms", 1),
        Column("MFU %", 2, mfu),
        Column("peak MiB", 0),
        Column("minutes", 2),
    ]
    rows = [
        [
            row.leg,
            row.status,
            row.steps,
            row.tok_per_sec,
            row.tok_per_sec / reference.num_gpus if row.tok_per_sec else None,
            row.dt_ms,
            row.mfu,
            row.peak_mem_mib,
            row.total_time_min,
        ]
        for row in reference.rows
    ]
    note = (
        f"{reference.hardware}, {reference.tokens_per_step:,} tokens a step. Source: {reference.source}. "
        f"MFU: {mfu}. {reference.note}"
    )
    return Table(reference.title, columns, rows, note)
