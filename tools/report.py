"""Runs side by side, as a table on the screen and as files.

    python -m tools.report runs/demo                                                 one run's figures of merit
    python -m tools.report runs/a runs/b nanochat.log --out DIR                      DIR/report.md, .html, CSV, figures
    python -m tools.report runs/moe_d12 --reference benchmarks/seed_h800.json        published figures below them

RUN is the folder of a run, at whatever point it is, or a file with what nanochat's base_train printed. What was not
measured is shown as a dash. Exit codes: 0, and 2 for what cannot be read (one line says what).
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.command_line import OneLineParser
from launch.reference import read_reference
from launch.report_parts import Report, Table
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED
from launch.run_tables import read_runs, runs_report, write_report
from model.config import ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="python -m tools.report",
        description="Show runs side by side: their figures of merit on the screen, and with --out a report in files.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a log of nanochat")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="published figures: benchmarks/seed_h800.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report, CSV files and figures")
    args = parser.parse_args(argv)
    try:
        reference = read_reference(args.reference) if args.reference else None
        runs = read_runs(args.runs)
        if args.out:
            make_folder(args.out)
    except (ConfigError, DataError) as refusal:
        print(f"{type(refusal).__name__}: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    report = runs_report(runs, reference)
    print(printed(report))
    if args.out:
        write_report(report, runs, args.out)
        print(f"\n{args.out / 'report.md'}, report.html, runs.csv, steps.csv, figures/")
    return EXIT_COMPLETED


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"--out {out}: cannot be made a folder ({fault.strerror}). Name another.") from None


def printed(report: Report) -> str:
    """Warnings and tables as Markdown whose columns line up on a screen."""
    warnings = [f"WARNING: {warning}" for warning in report.warnings]
    tables = [part for table in report.tables for part in (table.title, lined_up(table), table.note) if part]
    return "\n\n".join([*warnings, *tables])


def lined_up(table: Table) -> str:
    heads = [column.name for column in table.columns]
    cells = [
        [column.shown(cell).replace("|", "\\|") for column, cell in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    columns = []
    for index, (head, texts) in enumerate(zip(heads, zip(*cells, strict=True), strict=True)):
        numeric = table.holds_numbers(index)
        width = max(len(head), *map(len, texts))
        rule = "-" * (width - 1) + (":" if numeric else "-")
        columns.append([text.rjust(width) if numeric else text.ljust(width) for text in (head, rule, *texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


if __name__ == "__main__":
    sys.exit(main())
