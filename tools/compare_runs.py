"""Compares runs: which keys of their configurations differ, what they measured, and whether that may be compared.

python -m tools.compare_runs runs/a runs/b                     run folders
python -m tools.compare_runs runs/a other/wandb                offline W&B runs: a .wandb file, a folder with some
python -m tools.compare_runs runs/a team/moelab/04f682e2       W&B's server: [entity/]project/run_id
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.command_line import OneLineParser
from launch.results import RunResult, read_run
from launch.run_dir import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED
from launch.wandb_records import read_offline, read_online
from launch.wandb_run import WandbFailure, log_report
from model.config import ConfigError

# The figures that are shown without --all, in this order. A name that ends in / stands for all that begin with it.
FIGURES = (
    "status", "step", "num_steps",
    "tail50_tok_per_sec", "tail50_tok_per_sec_per_gpu", "tail50_dt_ms", "tail50_mfu", "peak_mem_mib",
    "time/compile_s", "total_time_min",
    "val/", "train/loss", "train/aux_loss",
    "moe/dropped_frac", "moe/load_max_over_mean", "moe/dead_experts", "moe/router_entropy",
)  # fmt: skip
WHOSE = "run.wandb."  # keys that say where and under whose name a run is shown
ACCEPTED = (
    "Name a run folder, an offline W&B run (its .wandb file, its offline-run-... folder, or a wandb/ folder), or a run "
    "on W&B's server as [entity/]project/run_id."
)
ABSENT = "-"

Figure = str | float | None  # None: not measured


@dataclass(frozen=True)
class Comparison:
    """What differs among runs and what they measured. Lists have one entry for each run, in the order of `sources`."""

    sources: dict[str, Path]  # of the runs, where they were read
    keys: dict[str, list[str | None]]  # of the configurations, where they differ, as JSON; None: the run lacks the key
    figures: dict[str, list[Figure]]
    facts: dict[str, list[str]]  # of the environments, where they differ
    doubts: list[str]  # about the files that were read

    @property
    def runs(self) -> list[str]:
        return list(self.sources)

    @property
    def first(self) -> str:
        return self.runs[0]

    @property
    def warnings(self) -> list[str]:
        differing = (
            f"{fact} differs: {'; '.join(f'{run}: {value}' for run, value in zip(self.runs, values, strict=True))}"
            for fact, values in self.facts.items()
        )
        return [*self.doubts, *differing]


def compare(runs: list[RunResult], doubts: list[str], everything: bool) -> Comparison:
    """Compare at least two runs; `everything` takes in run.wandb and all figures."""
    configs = [flatten(run.config) for run in runs]
    keys = {key: None for config in configs for key in config if everything or not key.startswith(WHOSE)}
    measured = [figures_of(run) for run in runs]
    names = in_order({name for figures in measured for name in figures}, everything)
    facts = [facts_of(run) for run in runs]
    return Comparison(
        sources=dict(zip(labels(runs), (run.folder for run in runs), strict=True)),
        keys={
            key: [json.dumps(config[key]) if key in config else None for config in configs]
            for key in keys
            if any(key not in config or not same(config[key], configs[0].get(key)) for config in configs)
        },
        figures={name: [figures.get(name) for figures in measured] for name in names},
        facts={
            fact: [each.get(fact, "not recorded") for each in facts]
            for fact in dict.fromkeys(fact for each in facts for fact in each)
            if len({each.get(fact) for each in facts}) > 1
        },
        doubts=doubts,
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}. Lists and empty objects are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1.0 is 1, which is how W&B's server returns it, but true is not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def labels(runs: list[RunResult]) -> list[str]:
    """The runs' names; with the folder above where several have the same, and numbered where that is the same too."""
    names = [run.name for run in runs]
    names = [
        name if names.count(name) == 1 or run.folder.name != name else f"{run.folder.parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]
    numbers = (names[: i + 1].count(name) for i, name in enumerate(names))
    return [name if names.count(name) == 1 else f"{name} #{n}" for name, n in zip(names, numbers, strict=True)]


def figures_of(run: RunResult) -> dict[str, Figure]:
    """The finite numbers of the summary, and the last ones logged where it has none; the status.

    A metric that was not finite when it was last logged is absent, whatever it was before.
    """
    last: dict[str, Any] = {}
    for step in run.steps:
        last |= step
    figures = {name: value for name, value in (last | flatten(run.summary)).items() if is_number(value)}
    steps = [each["step"] for each in (last, run.summary) if is_number(each.get("step"))]
    # a killed run's summary is that of its start
    return {"status": run.status, **figures, **({"step": max(steps)} if steps else {})}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def in_order(names: set[str], everything: bool) -> list[str]:
    """FIGURES, measured or not, and then the others, if asked for."""
    stated: list[str] = []
    for name in FIGURES:
        stated += sorted(each for each in names if each.startswith(name)) if name.endswith("/") else [name]
    return stated + (sorted(names - set(stated)) if everything else [])


def facts_of(run: RunResult) -> dict[str, str]:
    """What decides whether figures may be compared. A resumed run has several values if its attempts differ."""
    found: dict[str, dict[str, None]] = {}
    for env in (run.env, *run.env.get("attempts", [])):
        facts = {"world_size": env.get("world_size"), "torch": env.get("packages", {}).get("torch")}
        if "commit" in env:
            facts["commit"] = env["commit"][:10] + (f" with changes {env['dirty_hash']}" if "dirty_hash" in env else "")
        if env.get("devices"):
            devices = env["devices"] if env["devices"] != ["cpu"] else [env.get("cpu", "cpu")]
            facts["hardware"] = ", ".join(f"{count} x {name}" for name, count in Counter(devices).items())
        facts |= {name: json.dumps(value) for name, value in flatten({"data": env.get("data") or {}}).items()}
        for fact, value in facts.items():
            if value not in (None, "{}"):
                found.setdefault(fact, {})[str(value)] = None
    forced = flatten(run.config).get("run.model.moe.force_balanced", False)
    return {fact: " then ".join(values) for fact, values in found.items()} | {"force_balanced": json.dumps(forced)}


# --- reading --------------------------------------------------------------------------------------------------------


def read_all(arguments: list[str]) -> tuple[list[RunResult], list[str]]:
    """The runs that the arguments name, in their order, and warnings about what is not whole.

    Raises ConfigError for an argument that names no run, for less than two runs, and for a run that is named twice.
    """
    entries = [entry for argument in arguments for entry in find(argument)]
    offline, doubts = read_offline(dict.fromkeys(entry for entry in entries if isinstance(entry, Path)))
    runs = [offline.pop(entry, None) if isinstance(entry, Path) else entry for entry in entries]
    found = [run for run in runs if run is not None]  # None: a further file of a run that is there already
    if len(found) < 2:
        raise ConfigError(f"{' '.join(arguments)}: holds {len(found)} run, and it takes two to compare. {ACCEPTED}")
    twice = [folder for folder, count in Counter(run.folder.absolute() for run in found).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: is named twice. Name every run once.")
    return found, doubts


def find(argument: str) -> list[RunResult | Path]:
    """What an argument names: a run, or .wandb files that are still to be read."""
    path = Path(argument)
    if path.is_file() and path.suffix == ".wandb":
        return [path.resolve()]
    if path.is_dir() and (path / "env.json").is_file():
        try:
            return [read_run(path, path.resolve().name)]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: a line of its .jsonl files is damaged ({error}). Leave this run out.") from None
    if path.is_dir():
        places = ("*.wandb", "offline-run-*/*.wandb", "run-*/*.wandb")  # `latest-run` is a link to one of them
        if files := sorted(file.resolve() for place in places for file in path.glob(place)):
            return [*files]
    elif not path.exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+){1,2}", argument):
        try:
            return [read_online(argument)]
        except ConfigError as error:
            raise ConfigError(f"{error}. There is no such file or folder either. {ACCEPTED}") from None
    raise ConfigError(f"{argument}: {'is' if path.exists() else 'there is'} no run. {ACCEPTED}")


# --- showing --------------------------------------------------------------------------------------------------------


def as_text(comparison: Comparison) -> str:
    """Where the runs were read, both tables and the warnings, for a terminal."""
    configuration, figures = shown(comparison)
    parts = [f"{run}: {source}" for run, source in comparison.sources.items()]
    parts += ["", "Configuration", aligned(configuration) if comparison.keys else "nothing differs"]
    parts += ["", f"Figures (in brackets: difference to {comparison.first})", aligned(figures)]
    return "\n".join([*parts, *(f"\nwarning: {each}" for each in comparison.warnings)])


def as_markdown(comparison: Comparison) -> str:
    """The same as GitHub shows it."""
    configuration, figures = shown(comparison)
    parts = [f"* {run}: `{source}`" for run, source in comparison.sources.items()]
    parts += ["", "## Configuration", "", markdown_table(configuration) if comparison.keys else "Nothing differs."]
    parts += ["", "## Figures", "", f"In brackets: difference to {comparison.first}.", "", markdown_table(figures)]
    if comparison.warnings:
        parts += ["", "## Warnings", "", *(f"* {each}" for each in comparison.warnings)]
    return "\n".join(parts) + "\n"


def shown(comparison: Comparison) -> tuple[list[list[str]], list[list[str]]]:
    """Both tables as texts, each with its header."""
    configuration = [["key", *comparison.runs]]
    configuration += [[key, *(value or ABSENT for value in values)] for key, values in comparison.keys.items()]
    figures = [["figure", *comparison.runs]]
    for name, (first, *others) in comparison.figures.items():
        cells = [cell(first)]
        for value in others:
            difference = percent(first, value)
            cells.append(cell(value) if difference is None else f"{cell(value)} ({as_percent(difference)})")
        figures.append([name, *cells])
    return configuration, figures


def cell(value: Figure) -> str:
    if value is None:
        return ABSENT
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def percent(first: Figure, value: Figure) -> float | None:
    """The difference to the first run; None where one did not measure it, or the first is 0."""
    if isinstance(first, str) or isinstance(value, str) or first is None or value is None or first == 0:
        return None
    return 100 * (value - first) / abs(first)


def as_percent(difference: float) -> str:
    """+9.18%; 0% only for equal figures."""
    return "0%" if difference == 0 else f"{difference:+.2f}%" if abs(difference) >= 0.01 else f"{difference:+.0e}%"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown_table(rows: list[list[str]]) -> str:
    header, *rest = [[each.replace("|", "\\|") for each in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rest))


def write_csv(path: Path, comparison: Comparison) -> None:
    """One line for each cell: table, key, run, value. Configurations are JSON, numbers exact; empty: absent."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "key", "run", "value"])
        tables: dict[str, dict[str, list[Any]]] = {
            "source": {"path": [*comparison.sources.values()]},
            "configuration": {**comparison.keys},
            "figure": {**comparison.figures},
            "environment": {**comparison.facts},
        }
        for table, rows in tables.items():
            for key, values in rows.items():
                for run, value in zip(comparison.runs, values, strict=True):
                    writer.writerow([table, key, run, "" if value is None else value])


def log_to_wandb(comparison: Comparison, args: argparse.Namespace) -> str:
    """One W&B run with both tables; that of the figures has the differences as columns of their own."""
    others = comparison.runs[1:]
    figures = [
        [name, *values, *(percent(values[0], value) for value in values[1:])]
        for name, values in comparison.figures.items()
    ]
    return log_report(
        {
            "configuration": (["key", *comparison.runs], [[key, *values] for key, values in comparison.keys.items()]),
            "figures": (["figure", *comparison.runs, *(f"{run} to {comparison.first} (%)" for run in others)], figures),
        },
        {},
        project=args.project,
        entity=args.entity,
        group=args.group,
        name=args.name or f"{comparison.first} and {len(others)} more",
        job_type="comparison",
        folder=Path.cwd(),
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        for option in (args.csv, args.md):
            if option is not None and not option.absolute().parent.is_dir():
                raise ConfigError(f"{option}: there is no folder {option.parent}. Make it, or name another file.")
        runs, doubts = read_all(args.runs)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return EXIT_REFUSED
    comparison = compare(runs, doubts, args.all)
    print(as_text(comparison))
    if args.csv is not None:
        write_csv(args.csv, comparison)
    if args.md is not None:
        args.md.write_text(as_markdown(comparison), encoding="utf-8")
    if args.log_wandb:
        try:
            print(log_to_wandb(comparison, args))
        except WandbFailure as error:
            print(f"WandbFailure: {error}", file=sys.stderr)
            return EXIT_FAILED
    return EXIT_COMPLETED


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description = "Compare runs: which keys of their configurations differ, and what they measured."
    parser = OneLineParser(prog="python -m tools.compare_runs", description=description)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=ACCEPTED)
    parser.add_argument("--all", action="store_true", help="also the keys under run.wandb, and every figure")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write it as lines of table,key,run,value")
    parser.add_argument("--md", type=Path, metavar="FILE", help="write it as tables for GitHub")
    parser.add_argument("--log_wandb", action="store_true", help="log it as one W&B run, of job type comparison")
    parser.add_argument("--project", default="moelab", help="of that W&B run (default: %(default)s)")
    parser.add_argument("--entity", help="of that W&B run: the team or user")
    parser.add_argument("--group", help="of that W&B run")
    parser.add_argument("--name", help="of that W&B run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
