"""From run folders to a report: CSV files, figures, report.md, report.html. Made twice, it is the same.

summary.csv    a row a run: status and every figure of its summary.json
steps.csv      a row a logged step: what metrics.jsonl holds
verdicts.csv   a row a leg and gate
"""

from __future__ import annotations

import statistics
from typing import Any

from launch.comparison import Comparison, completed, has_no_ratio
from launch.csv_files import write_rows_csv, write_steps_csv
from launch.experiment import Experiment
from launch.figures import write_figures
from launch.metrics import METRICS, metric_named
from launch.noise import CONFIDENCE
from launch.reference import parse_reference, reference_table
from launch.report_html import to_html
from launch.report_markdown import to_markdown
from launch.report_parts import Cell, Column, Curve, Figure, HeatMap, Report, Table
from launch.results import RunResult
from launch.run_dir import write_text
from launch.run_tables import CURVES
from launch.suite import shown
from launch.verdicts import Verdict, noise_floor

FIGURES = {**CURVES, "val/bpb": ("val_bpb", "Validation", "bits per byte")}
SPEED_FIGURES = ("tok_per_sec", "mfu", "dt_ms")


def write_report(experiment: Experiment) -> str:
    """Write all files of the report into the experiment's folder; returns the verdicts, to be printed."""
    comparison = Comparison(experiment)
    verdicts = comparison.verdicts()
    report = build_report(comparison, verdicts)
    folder = experiment.folder
    write_rows_csv(folder / "summary.csv", summary_rows(comparison))
    write_steps_csv(folder / "steps.csv", step_rows(comparison))
    write_rows_csv(folder / "verdicts.csv", [verdict_row(verdict) for verdict in verdicts])
    (folder / "figures").mkdir(exist_ok=True)
    write_figures(report, folder / "figures")
    write_text(folder / "report.md", to_markdown(report))
    write_text(folder / "report.html", to_html(report))
    return "\n".join([*decisions(comparison, verdicts), *report.warnings])


def build_report(comparison: Comparison, verdicts: list[Verdict]) -> Report:
    suite = comparison.suite
    runs = len(comparison.entries)
    done = sum(completed(entry) for entry in comparison.entries)
    paragraphs = [
        f"{done} of {runs} runs completed. Suite {suite['hash']}, begun {suite['begun'][:16].replace('T', ' ')} UTC; "
        f"baseline {comparison.baseline}; {suite['repeats']} repeats, {suite['order']}, "
        f"{'each run alone on the machine' if comparison.timed else 'runs side by side, one rank each'}. The gates "
        "were fixed before the first run.",
        *decisions(comparison, verdicts),
    ]
    tables = [verdict_table(verdicts), legs_table(comparison)]
    if comparison.timed:
        tables.append(speed_table(comparison))
    tables += [quality_table(comparison), matched_table(comparison), noise_table(comparison), runs_table(comparison)]
    if suite.get("reference"):
        tables.append(reference_table(parse_reference(suite["reference"], "suite.json")))
    return Report(
        title=f"{suite['name']}: {suite['question']}",
        paragraphs=paragraphs,
        warnings=comparison.warnings(),
        tables=tables,
        figures=figures_of(comparison),
        heat_maps=heat_maps_of(comparison),
    )


def decisions(comparison: Comparison, verdicts: list[Verdict]) -> list[str]:
    """One line a leg: what the gates decide."""
    lines = []
    for leg in comparison.legs:
        own = [verdict for verdict in verdicts if verdict.leg == leg]
        if leg == comparison.baseline or not own:
            continue
        if any(verdict.outcome == "invalid" for verdict in own):
            reasons = dict.fromkeys(verdict.reason for verdict in own if verdict.outcome == "invalid")
            lines.append(f"{leg}: invalid, and cannot win ({'; '.join(reasons)}).")
        elif any(verdict.outcome is None for verdict in own):
            lines.append(f"{leg}: not finished ({own[0].reason}).")
        else:
            told = "; ".join(f"{verdict.gate.metric.name} {verdict.outcome}, gate {verdict.state}" for verdict in own)
            passed = all(verdict.state == "passed" for verdict in own)
            lines.append(f"{leg}: {'passes every gate' if passed else 'does not pass every gate'} ({told}).")
    return lines


# --- tables ---------------------------------------------------------------------------------------------------------


def verdict_table(verdicts: list[Verdict]) -> Table:
    rows: list[list[Cell]] = []
    for verdict in verdicts:
        compared = verdict.comparison
        rows.append(
            [
                verdict.leg,
                str(verdict.gate),
                verdict.outcome,
                verdict.state,
                significant(compared.mean) if compared else None,
                significant(compared.baseline_mean) if compared else None,
                compared.percent if compared else None,
                interval_text(verdict),
                verdict.reason,
            ]
        )
    return Table(
        "Verdicts",
        [
            Column("leg"),
            Column("gate", explanation="Written before the first run."),
            Column("verdict", explanation="Against the baseline: better or worse only if the interval excludes 0."),
            Column(
                "gate is", explanation="at_least and at_most hold for the whole interval, no_worse_than for the mean."
            ),
            Column("mean", explanation="Of the leg's repeats: geometric for speed and memory."),
            Column("baseline"),
            Column("difference, %", 2, "To the baseline's mean."),
            Column("interval, %", explanation="Of the difference, from the noise between repeats."),
            Column("why"),
        ],
        rows,
        f"Intervals hold with {CONFIDENCE:.0%} for all legs of a gate together.",
    )


def interval_text(verdict: Verdict) -> str | None:
    compared = verdict.comparison
    if compared is None or compared.low is None or compared.high is None:
        return None
    scale = 100.0 if compared.metric.is_ratio else 100 / compared.baseline_mean if compared.baseline_mean else None
    return None if scale is None else f"{scale * compared.low:+.2f} to {scale * compared.high:+.2f}"


def significant(value: float) -> float:
    """Five digits, so that a column may hold tokens per second and bits per byte."""
    return float(f"{value:.5g}")


def legs_table(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    for name, leg in comparison.suite["legs"].items():
        changes = "; ".join(f"{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in leg["differences"].items())
        ended = f"{len(comparison.done(name))} of {len(comparison.legs[name])}"
        baseline = " (baseline)" if name == comparison.baseline else ""
        rows.append([name + baseline, leg["question"], changes or "the base itself", ended])
    return Table("Legs", [Column("leg"), Column("question"), Column("changes"), Column("completed")], rows)


def speed_table(comparison: Comparison) -> Table:
    base = comparison.mean(comparison.baseline, "tail50_tok_per_sec")
    rows: list[list[Cell]] = []
    for leg in comparison.legs:
        speed = comparison.mean(leg, "tail50_tok_per_sec")
        intervals = [comparison.interval_of_tail(run) for run in comparison.done(leg)]
        known = [each for each in intervals if each is not None]
        rows.append(
            [
                leg,
                speed,
                f"{min(low for low, _ in known):,.0f} to {max(high for _, high in known):,.0f}" if known else None,
                100 * (speed / base - 1) if speed and base else None,
                comparison.mean(leg, "tail50_tok_per_sec_per_gpu"),
                comparison.mean(leg, "tail50_dt_ms"),
                comparison.mean(leg, "tail50_mfu"),
                comparison.mean(leg, "peak_mem_mib"),
                comparison.mean(leg, "time/compile_s"),
                comparison.mean(leg, "total_time_min"),
            ]
        )
    return Table(
        "Speed",
        [
            Column("leg"),
            Column("tok/s", 0, "All ranks: tokens over the time of the last 50 steps of a run; mean over repeats."),
            Column(
                "within runs",
                explanation="From the lowest to the highest end of the runs' 95% block-bootstrap intervals.",
            ),
            Column("to baseline, %", 2),
            Column("tok/s per GPU", 0),
            Column("dt, ms", 1),
            Column("MFU, %", 2, "Of the peak that summary.json states; active parameters."),
            Column("peak MiB", 0, "Largest of all ranks."),
            Column("compile, s", 1),
            Column("total, min", 2, "Start-up and validation included."),
        ],
        rows,
    )


def quality_table(comparison: Comparison) -> Table:
    names = ("val/bpb", "val/loss", "train/loss", "train/aux_loss", "moe/dropped_frac", "moe/load_max_over_mean")
    base = comparison.mean(comparison.baseline, "val/bpb")
    rows: list[list[Cell]] = []
    for leg in comparison.legs:
        means = [comparison.mean(leg, name) for name in names]
        bits = means[0]
        to_base = 100 * (bits / base - 1) if bits is not None and base else None
        spread = comparison.values(leg, "val/bpb")
        lowest_to_highest = f"{min(spread):.4f} to {max(spread):.4f}" if len(spread) > 1 else None
        rows.append([leg, bits, lowest_to_highest, to_base, *means[1:], comparison.mean(leg, "tokens")])
    return Table(
        "Quality",
        [
            Column("leg"),
            Column(
                "val/bpb", 4, "Bits per byte on the whole validation split, after the last step; mean over repeats."
            ),
            Column("lowest to highest"),
            Column("to baseline, %", 2),
            Column("val/loss", 4),
            Column("train/loss", 4, "Of the last logged step."),
            Column("aux loss", 3, "1.0 is uniform load."),
            Column("dropped", 4, "Share of routes without a slot, in the last logged step."),
            Column("max/mean load", 3),
            Column("tokens"),
        ],
        rows,
    )


def matched_table(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    for leg in comparison.legs:
        pairs = comparison.matched(leg)
        matched, base = [own for own, _ in pairs], [its_base for _, its_base in pairs]
        reached = [each for each in matched if each.tokens is not None]
        tokens: Cell = None
        seconds: Cell = None
        if matched and len(reached) < len(matched):
            tokens = f"not reached in {len(matched) - len(reached)} of {len(matched)} runs"
        elif matched:
            tokens = statistics.fmean(each.tokens for each in reached if each.tokens is not None)
            times = [each.seconds for each in reached if each.seconds is not None]
            seconds = statistics.fmean(times) if len(times) == len(reached) else None
        base_tokens = [each.tokens for each in base if each.tokens is not None]
        base_seconds = [each.seconds for each in base if each.seconds is not None]
        fewer = statistics.fmean(base_tokens) / tokens if isinstance(tokens, float) and base_tokens else None
        faster = statistics.fmean(base_seconds) / seconds if isinstance(seconds, float) and base_seconds else None
        raw, base_raw = (comparison.mean(each, "tail50_tok_per_sec") for each in (leg, comparison.baseline))
        target = statistics.fmean(each.target for each in matched) if matched else None
        rows.append(
            [
                leg,
                target,
                tokens,
                fewer,
                seconds,
                faster,
                raw / base_raw if raw and base_raw and comparison.timed else None,
            ]
        )
    metric = comparison.curve_metric
    how = "" if metric == "val/bpb" else ", a trailing mean over a tenth of the logged points"
    return Table(
        "Loss-matched speed",
        [
            Column("leg"),
            Column("target", 4, "The loss that the baseline's run of the same repeat ends with."),
            Column("tokens to it", 0),
            Column("token ratio", 3, "The baseline's tokens over the leg's: above 1, the leg learns more per token."),
            Column("seconds to it", 1, "Those tokens at the run's tail-50 speed."),
            Column("loss-matched speed", 3, "The baseline's time over the leg's."),
            Column("raw speed", 3, "The leg's tok/s over the baseline's."),
        ],
        rows,
        f"By {metric}{how}. No verdict is made of this table.",
    )


def noise_table(comparison: Comparison) -> Table:
    """The noise floor: of the gates' metrics, and of speed and validation loss in any case."""
    names = dict.fromkeys([gate.metric.name for gate in comparison.gates] + ["tail50_tok_per_sec", "val/bpb"])
    rows: list[list[Cell]] = []
    for name in names:
        metric = metric_named(name) or METRICS[name]
        samples = {leg: found for leg, found in comparison.samples(metric).items() if found}
        if comparison.baseline not in samples or any(has_no_ratio(metric, found) for found in samples.values()):
            rows.append([name, None, None, None])
            continue
        noise = noise_floor(metric, samples)
        scale = 100.0 if metric.is_ratio else 1.0
        rows.append(
            [
                name,
                significant(scale * noise.sigma) if noise is not None else None,
                "% of the value" if metric.is_ratio else "in its own unit",
                noise.freedom if noise is not None else None,
            ]
        )
    return Table(
        "Noise floor",
        [
            Column("metric"),
            Column("sigma", explanation="Standard deviation of one run around its leg's mean, pooled over the legs."),
            Column("unit"),
            Column("degrees of freedom"),
        ],
        rows,
        "From repeats; of speed at least what the times of steps say. Of losses only repeats with other seeds count.",
    )


def runs_table(comparison: Comparison) -> Table:
    rows: list[list[Cell]] = []
    for entry in comparison.entries:
        state, result = entry.state, entry.result
        interval = comparison.interval_of_tail(result) if result is not None and completed(entry) else None
        rows.append(
            [
                state.run.leg,
                state.run.repeat,
                state.run.seed,
                state.status,
                state.step,
                state.attempts,
                result.figure("tail50_tok_per_sec") if result is not None and comparison.timed else None,
                f"{interval[0]:,.0f} to {interval[1]:,.0f}" if interval is not None else None,
                result.figure("peak_mem_mib") if result is not None else None,
                result.figure("val/bpb") if result is not None else None,
                "" if state.status == "completed" else state.reason,
            ]
        )
    return Table(
        "Runs",
        [
            Column("leg"),
            Column("repeat"),
            Column("seed"),
            Column("status"),
            Column("step"),
            Column("attempts"),
            Column("tok/s", 0),
            Column("95% within", explanation="Block bootstrap over the times of the last 50 steps."),
            Column("peak MiB", 0),
            Column("val/bpb", 4),
            Column("why"),
        ],
        rows,
    )


# --- figures --------------------------------------------------------------------------------------------------------


def figures_of(comparison: Comparison) -> list[Figure]:
    figures = []
    for metric, (name, title, y_label) in FIGURES.items():
        curves = []
        for entry in comparison.entries:
            if entry.result is None or (name in SPEED_FIGURES and not comparison.timed):
                continue
            steps, values = entry.result.series(metric)
            if values:
                curves.append(Curve(entry.state.run.leg, entry.state.run.name, [float(step) for step in steps], values))
        if curves or name != "val_bpb":
            figures.append(Figure(name, title, "step", y_label, curves))
    return figures


def heat_maps_of(comparison: Comparison) -> list[HeatMap]:
    """Of every leg's first run with experts, the layer whose load is the most uneven at the end."""
    maps = []
    for leg, entries in comparison.legs.items():
        run = next((entry.result for entry in entries if entry.result is not None and entry.result.expert_load), None)
        if run is not None:
            maps.append(heat_map_of(leg, run))
    return maps


def heat_map_of(leg: str, run: RunResult) -> HeatMap:
    layers = run.expert_load[-1]["layers"]
    last = run.expert_load[-1]["tokens_per_expert"]
    worst = max(range(len(layers)), key=lambda i: max(last[i]) / max(1e-9, statistics.fmean(last[i])))
    steps, columns = [], []
    for line in run.expert_load:
        tokens = line["tokens_per_expert"][worst]
        steps.append(line["step"])
        columns.append([each / max(1e-9, statistics.fmean(tokens)) for each in tokens])
    return HeatMap(
        name=f"load_{leg}",
        title=f"{leg}: load of the experts of layer {layers[worst]}, over the mean ({run.name})",
        steps=steps,
        load=[list(row) for row in zip(*columns, strict=True)],
    )


# --- files ----------------------------------------------------------------------------------------------------------


def identity(entry: Any) -> dict[str, Any]:
    run = entry.state.run
    return {"leg": run.leg, "repeat": run.repeat, "seed": run.seed, "attempt": entry.state.attempts}


def summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for entry in comparison.entries:
        summary = entry.result.summary if entry.result is not None else {}
        rows.append(
            {**identity(entry), "status": entry.state.status, **{k: v for k, v in summary.items() if k != "status"}}
        )
    return rows


def step_rows(comparison: Comparison) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(identity(entry), line) for entry in comparison.entries if entry.result for line in entry.result.steps]


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    row: dict[str, Any] = {
        "leg": verdict.leg,
        "metric": verdict.gate.metric.name,
        "rule": verdict.gate.rule,
        "bound": verdict.gate.text,
        "verdict": verdict.outcome or "",
        "gate": verdict.state or "",
    }
    if (compared := verdict.comparison) is not None:
        figures = {
            "mean": compared.mean,
            "baseline_mean": compared.baseline_mean,
            "difference": compared.difference,
            "difference_percent": compared.percent,
            "low": compared.low,
            "high": compared.high,
            "sigma": compared.sigma,
        }
        row |= {name: value for name, value in figures.items() if value is not None}
    return {**row, "reason": verdict.reason}


def log_report(experiment: Experiment) -> str:
    """Log the tables and figures of the report to W&B, as one run in the group of the suite's runs."""
    from launch.wandb_run import log_report as log_parts

    comparison = Comparison(experiment)
    report = build_report(comparison, comparison.verdicts())
    tables = {table.title: ([column.name for column in table.columns], table.rows) for table in report.tables}
    images = {path.stem: path for path in sorted((experiment.folder / "figures").glob("*.png"))}
    settings = experiment.runs[0].tree["run"]["wandb"]
    return log_parts(
        tables,
        images,
        project=settings["project"],
        entity=settings["entity"],
        group=settings["group"],
        name=f"{experiment.suite['name']} report",
        folder=experiment.folder,
        tags=["report"],
        mode=settings["mode"],
    )
