"""Some runs side by side: a report of their figures of merit and curves, and the files that it consists of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from launch.csv_files import write_rows_csv, write_steps_csv
from launch.experiment import Experiment
from launch.nanochat_logs import read_nanochat_log
from launch.reference import Reference, reference_table
from launch.report_parts import Column, Curve, Figure, Report, Table
from launch.results import RunResult, read_run
from launch.run_dir import write_text
from model.config import ConfigError, DataError

FIGURES_OF_MERIT = {  # name in summary.json: its column
    "step": Column("steps", explanation="optimizer steps done"),
    "tail50_tok_per_sec": Column("tok/s", 0, "of all ranks, over the last 50 steps measured"),
    "tail50_tok_per_sec_per_gpu": Column("tok/s per GPU", 0, "what to compare first across machines"),
    "tail50_dt_ms": Column("dt ms", 1, "mean time of a step over the last 50 measured"),
    "tail50_mfu": Column("MFU %", 2, "of the peak stated below, over the last 50 steps measured"),
    "peak_mem_mib": Column("peak MiB", 0, "most memory that torch held, on any rank"),
    "time/compile_s": Column("compile s", 1, "seconds of torch.compile"),
    "total_time_min": Column("minutes", 2, "from start to end, over all attempts"),
    "train/loss": Column("train loss", 4, "cross-entropy at the last step logged"),
    "val/bpb": Column("val/bpb", 4, "bits per byte at the last validation"),
}
CURVES = {  # metric: name of its figure, title, label
    "train/loss": ("loss", "Training loss", "cross-entropy, nats per token"),
    "train/tok_per_sec": ("tok_per_sec", "Throughput", "tokens per second, all ranks"),
    "train/mfu": ("mfu", "Model FLOPs utilisation", "percent of the stated peak"),
    "train/dt_ms": ("dt_ms", "Time of a step", "ms, mean since the line before"),
}


def read_runs(paths: list[Path]) -> list[RunResult]:
    """Run folders and nanochat logs, each under its own name, or its path where two would have the same; of the folder
    of a suite all runs that began.

    Raises ConfigError for a path that is neither or stands twice, DataError for a damaged one.
    """
    ends = Counter(end_of(path) for path in paths)
    for path in paths:
        if sum(path.resolve() == other.resolve() for other in paths) > 1:
            raise ConfigError(f"{path} stands twice. Name every run once.")
    named = [(path, end_of(path) if ends[end_of(path)] == 1 else str(path)) for path in paths]
    return [run for path, name in named for run in read_any(path, name)]


def end_of(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def read_any(path: Path, name: str) -> list[RunResult]:
    if path.is_file():
        return [read_nanochat_log(path, name)]
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder. Name the folder of a run, or a log of nanochat.")
    if (path / "suite.json").is_file():
        states = Experiment(path).states()
        began = [
            (state.folder, state.run.name) for state in states if state.folder is not None and state.folder.is_dir()
        ]
        return [read_run(folder, f"{name}/{run}") for folder, run in began]
    if not (path / "env.json").is_file():
        raise ConfigError(f"{path}: is not a run folder (no env.json). Name one, such as runs/demo.")
    try:
        return [read_run(path, name)]
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise DataError(f"{path}: a line of its metrics cannot be read ({fault}). Leave the run out.") from None


def runs_report(runs: list[RunResult], reference: Reference | None = None) -> Report:
    """What each run measured, below it what was published elsewhere, and curves over the steps."""
    return Report(
        title="Runs side by side",
        paragraphs=[],
        warnings=[f"{', '.join(names)}: {warning}" for warning, names in by_text(runs, warnings_on).items()],
        tables=[runs_table(runs), *([reference_table(reference)] if reference else [])],
        figures=[
            Figure(name, title, "step", label, [curve for run in runs if (curve := curve_of(run, metric)).x])
            for metric, (name, title, label) in CURVES.items()
        ],
    )


def runs_table(runs: list[RunResult]) -> Table:
    columns = [Column("run"), Column("status"), *FIGURES_OF_MERIT.values()]
    rows = [[run.name, run.status, *(run.figure(name) for name in FIGURES_OF_MERIT)] for run in runs]
    notes = [f"{', '.join(names)}: {note}." for note, names in by_text(runs, notes_on).items()]
    return Table("Figures of merit", columns, rows, " ".join(notes))


def curve_of(run: RunResult, metric: str) -> Curve:
    steps, values = run.series(metric)
    return Curve(run.name, run.name, [float(step) for step in steps], values)


def warnings_on(run: RunResult) -> list[str]:
    """What a reader must know before believing a figure."""
    warnings = []
    if run.summary.get("moe/force_balanced"):
        warnings.append("the load of the experts was forced: a benchmark of speed, which says nothing of a model")
    if run.summary.get("data") == "synthetic":
        warnings.append("trained on synthetic data")
    return warnings


def notes_on(run: RunResult) -> list[str]:
    """What the run's own record says of its figures, and what MFU is of."""
    notes = list(run.summary.get("notes", []))
    peak, flops = run.figure("peak_flops"), run.figure("flops_per_token")
    if run.figure("tail50_mfu") is not None and peak and flops:
        notes.append(f"MFU is percent of {peak / 1e12:g} TFLOP/s a GPU, by {flops / 1e6:,.1f} MFLOP per token")
    return notes


def by_text(runs: list[RunResult], sentences_on: Callable[[RunResult], list[str]]) -> dict[str, list[str]]:
    """Which runs each sentence is of, so that it is said once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for sentence in sentences_on(run):
            found.setdefault(sentence, []).append(run.name)
    return found


def write_report(report: Report, runs: list[RunResult], out: Path) -> None:
    """report.md, report.html, figures/*.png, runs.csv and steps.csv. `out` exists."""
    from launch.figures import write_figures  # these draw: a second that a table on the screen does not need
    from launch.report_html import to_html
    from launch.report_markdown import to_markdown

    write_figures(report, out / "figures")
    write_rows_csv(out / "runs.csv", [{"run": run.name, **run.summary} for run in runs])
    write_steps_csv(out / "steps.csv", [({"run": run.name}, line) for run in runs for line in run.steps])
    write_text(out / "report.md", to_markdown(report))
    write_text(out / "report.html", to_html(report))
