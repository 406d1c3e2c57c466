"""Whole training steps of run files, each started by launch.run in processes of its own, in interleaved rounds.

A run is RUNFILE, or RUNFILE@CHECKOUT for the run file and the code of another checkout of this repository. It stops
after some steps without changing its schedule; what is reported is what it recorded of itself. Its folder is temporary.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from launch.environment import describe_checkout
from launch.run_config import REPO_ROOT, load_run
from launch.run_dir import read_summary
from model.config import ConfigError
from tools.bench_moe.rounds import interquartile_range, order_of_round

FEWEST_STEPS = 4  # train.py times no step before
MEDIANS = {  # in a row, with their spread over the rounds: what summary.json calls them
    "tok_per_sec": "tail50_tok_per_sec",
    "dt_ms": "tail50_dt_ms",
    "mfu": "tail50_mfu",
    "peak_mem_mib": "peak_mem_mib",
    "compile_s": "time/compile_s",
}
FACTS = ("device", "world_size", "ep_size", "tail_steps", "flops_per_token", "peak_flops", "moe/force_balanced")


class Trial(NamedTuple):
    """A run file and the checkout whose code runs it."""

    path: Path
    checkout: Path

    @property
    def name(self) -> str:
        inside = self.path.is_relative_to(self.checkout)
        return str(self.path.relative_to(self.checkout)) if inside else self.path.name


class RunFailed(RuntimeError):
    """A run did not get to its last step. The message says why, in one line."""


def parse_trial(text: str, assignments: list[str]) -> Trial:
    """RUNFILE or RUNFILE@CHECKOUT. Raises ConfigError; a run file of another checkout is read by that one's code."""
    path, at, checkout = text.rpartition("@")
    if not at or Path(text).is_file():
        load_run(Path(text), assignments)
        return Trial(Path(text).resolve(), REPO_ROOT)
    folder = Path(checkout).resolve()
    if not (folder / "launch" / "run.py").is_file():
        raise ConfigError(f"--step {text}: {folder} has no launch/run.py. Name a checkout of this repository.")
    if not (folder / path).is_file():
        raise ConfigError(f"--step {text}: {folder} has no {path}. Name a run file of that checkout.")
    return Trial(folder / path, folder)


def measure_trials(trials: list[Trial], steps: int, rounds: int, assignments: list[str]) -> list[dict[str, Any]]:
    """A row for every trial; one that fails is left out of the later rounds, and its row says why."""
    measured: list[list[dict[str, Any]]] = [[] for _ in trials]
    errors: dict[int, str] = {}
    for number in range(rounds):
        for place in order_of_round(number, len(trials)):
            if place in errors:
                continue
            try:
                measured[place].append(run_once(trials[place], steps, assignments))
            except RunFailed as failure:
                errors[place] = str(failure)
    return [
        {
            "run": trial.name,
            **{name: fact for name, fact in describe_checkout(trial.checkout).items() if name != "dirty_hash"},
            "steps": steps,
            "set": assignments,
            **({"error": errors[place]} if place in errors else row_of(measured[place])),
        }
        for place, trial in enumerate(trials)
    ]


def row_of(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and their spread if there are several. What a run did not measure is absent."""
    row: dict[str, Any] = {"rounds": len(figures)}
    for name in (*MEDIANS, "launch_to_first_step_s"):
        values = [each[name] for each in figures if name in each]
        if values:
            row[f"{name}_median"] = statistics.median(values)
        if len(values) > 1:
            row[f"{name}_iqr"] = interquartile_range(values)
    return {**row, **{name: figures[0][name] for name in FACTS if name in figures[0]}}


def run_once(trial: Trial, steps: int, assignments: list[str]) -> dict[str, Any]:
    """Run the first steps of a run file, and return what its summary says. Raises RunFailed.

    It compiles all anew: what earlier runs left in inductor's cache would make compile_s a matter of the order of runs.
    """
    with tempfile.TemporaryDirectory(prefix="bench_moe_") as folder:
        run_dir, printed = Path(folder) / "run", Path(folder) / "printed"
        command = [sys.executable, "-m", "launch.run", str(trial.path), "--run_dir", str(run_dir)]
        command += ["--set", f"run.train.stop_at_step={steps}", 'run.wandb.mode="disabled"', *assignments]
        launched = datetime.now(UTC)
        with open(printed, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                cwd=trial.checkout,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                process.wait()
            except BaseException:  # an interrupt of any kind: the run's ranks end with it
                process.terminate()
                process.wait()
                raise
        return read_figures(run_dir, launched, last_line(printed))


def last_line(path: Path) -> str:
    return (path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"])[-1]


def read_figures(run_dir: Path, launched: datetime, printed: str) -> dict[str, Any]:
    """The figures of one run from its folder; `printed` is the last line that it printed. Raises RunFailed."""
    summary = read_summary(run_dir)
    if summary is None:
        raise RunFailed(printed)
    if summary["status"] not in ("completed", "stopped"):
        raise RunFailed(f"{summary['status']}: {summary['reason'] or printed}")
    if "tail50_tok_per_sec" not in summary:
        raise RunFailed(f"ended after step {summary['step']}, before a step was timed")
    begun = (datetime.fromisoformat(summary["started"]) - launched).total_seconds()
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    first = next(line for line in lines if line["step"] == 1)  # train.py logs it, whatever log_every says
    figures = {name: summary[key] for name, key in MEDIANS.items() if key in summary}
    return {**{name: summary[name] for name in FACTS if name in summary}, **figures,
            "launch_to_first_step_s": begun + first["time/total_s"]}  # fmt: skip
