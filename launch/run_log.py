"""What rank 0 records of a run: config.json, env.json, metrics.jsonl, log.txt, summary.json, the bar, and W&B.

metrics.jsonl is the truth: W&B may fail, be off, or ignore the steps that a resumed run takes a second time.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.environment import utc_now
from launch.run_config import Run
from launch.run_dir import EXIT_CODES, EXIT_FAILED, Status, read_json_object, read_summary, write_json, write_text
from launch.screen import show
from launch.wandb_run import WandbRun
from model.flops import mfu_percent

TAIL_STEPS = 50

# Metrics that a line on the screen shows, in this order; the others are in metrics.jsonl.
SHOWN: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("moe/force_balanced", lambda value: "load forced"),
    ("train/loss", lambda value: f"loss {value:.3f}"),
    ("train/skipped_steps", lambda value: f"skipped {value:.0f}"),
    ("train/aux_loss", lambda value: f"aux {value:.2f}"),
    ("train/lr", lambda value: f"lr {value:.1e}"),
    ("train/grad_norm", lambda value: f"grad {value:.2f}"),
    ("train/dt_ms", lambda value: f"dt {value:.0f} ms"),
    ("train/tok_per_sec", lambda value: f"{thousands(value)} tok/s"),
    ("train/mfu", lambda value: f"mfu {value:.1f}%"),
    ("moe/dropped_frac", lambda value: f"dropped {100 * value:.1f}%"),
    ("val/loss", lambda value: f"val loss {value:.3f}"),
    ("val/bpb", lambda value: f"val bpb {value:.4f}"),
)


class RunLog:
    """The record of one attempt at a run. `enabled` is for rank 0; elsewhere every method returns at once.

    resumed_step is the checkpoint that this attempt continues, 0 for none: the steps logged after it are dropped, since
    they are about to be taken again.
    """

    def __init__(
        self,
        run_dir: Path,
        run: Run,
        *,
        resumed_step: int,
        total_steps: int,
        enabled: bool,
        environment: dict[str, Any],
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.run_dir, self.run, self.total_steps = run_dir, run, total_steps
        self.step, self.started = resumed_step, utc_now()
        run_dir.mkdir(parents=True, exist_ok=True)
        wandb_id = record_environment(run_dir, {**environment, "config_hash": run.config_hash})
        write_json(run_dir / "config.json", run.resolved)
        previous = read_summary(run_dir) or {}
        self.minutes_before = minutes_spent(run_dir, previous) if resumed_step else 0.0
        self.tail_before = {name: value for name, value in previous.items() if resumed_step and name.startswith("tail")}
        so_far = {"total_time_min": self.minutes_before, **self.tail_before} if self.minutes_before else {}
        self._write_summary("running", {**so_far, "pid": os.getpid(), "hostname": socket.gethostname()})

        self.metrics = StepLines(run_dir / "metrics.jsonl", resumed_step)
        self.expert_load = StepLines(run_dir / "expert_load.jsonl", resumed_step) if run.model.moe is not None else None
        self.text = open(run_dir / "log.txt", "a", encoding="utf-8")
        self.bar = (
            tqdm(total=total_steps, initial=resumed_step, unit="step", file=sys.stdout, dynamic_ncols=True)
            if sys.stdout.isatty()
            else None
        )
        self.wandb = WandbRun(run_dir, run, wandb_id, environment, self.say)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one, and append it to log.txt."""
        if not self.enabled:
            return
        self._write_text(text)
        self._print(text)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step. A number that is not finite becomes null in metrics.jsonl: JSON has no NaN.

        Logging a step twice adds to its line. Raises ValueError for a step before the last one logged.
        """
        if not self.enabled:
            return
        self.metrics.append(step, metrics)
        self.wandb.log(step, metrics)
        line = readable_line(step, self.total_steps, metrics)
        self._write_text(line)
        if self.bar is None or any(name.startswith("val/") for name in metrics):
            self._print(line)
        if self.bar is not None and "train/loss" in metrics:
            speed = {"tok/s": thousands(metrics["train/tok_per_sec"])} if "train/tok_per_sec" in metrics else {}
            self.bar.set_postfix({"loss": f"{metrics['train/loss']:.3f}", **speed}, refresh=False)
        self.progress(step)

    def lacks(self, step: int, name: str) -> bool:
        """Whether this metric of the step that is continued was never recorded. Where nothing is recorded: False."""
        return self.enabled and not (self.metrics.last["step"] == step and name in self.metrics.last)

    def log_expert_load(self, step: int, detail: dict[str, Any]) -> None:
        """Record what every expert got in a step: one line of expert_load.jsonl, data for a heat map over the steps."""
        if self.enabled and self.expert_load is not None:
            self.expert_load.append(step, detail)

    def progress(self, step: int) -> None:
        """Advance the bar to `step`, for steps that are not logged."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(step - self.step)
        self.step = step

    def finish(self, status: Status, reason: str, figures: dict[str, Any]) -> None:
        """Write the final summary.json, then close the bar, log.txt and W&B.

        A figure that is None or not finite was not measured, and is left out. total_time_min adds up over the attempts
        of a resumed run; the tail figures are those of its last stretch of TAIL_STEPS without a break, else of the
        longest. The summary comes first: W&B may take its time with a dead network.
        """
        if not self.enabled:
            return
        ended = utc_now()
        spent = datetime.fromisoformat(ended) - datetime.fromisoformat(self.started)
        measured = {name: value for name, value in figures.items() if is_measured(value)}
        if self.tail_before.get("tail_steps", 0) > measured.get("tail_steps", 0):
            measured |= self.tail_before
        measured["total_time_min"] = self.minutes_before + spent.total_seconds() / 60
        self._write_summary(status, {"reason": reason, "ended": ended, **measured})
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.say(f"{status}: {reason}")
        self.wandb.finish(EXIT_CODES.get(status, EXIT_FAILED), {"status": status, "step": self.step, **measured})
        self.text.close()
        self.enabled = False

    def _write_summary(self, status: Status, rest: dict[str, Any]) -> None:
        summary = {
            "status": status,
            "reason": "",
            "step": self.step,
            "started": self.started,
            "config_hash": self.run.config_hash,
        }
        write_json(self.run_dir / "summary.json", {**summary, **rest})

    def _write_text(self, text: str) -> None:
        self.text.write(text + "\n")
        self.text.flush()

    def _print(self, text: str) -> None:
        if self.bar is not None:
            with tqdm.external_write_mode(file=sys.stdout):
                show(text)
        else:
            show(text)


class StepLines:
    """metrics.jsonl, expert_load.jsonl: one object per logged step, in order, each written whole and at once."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep what was logged up to the checkpoint that is continued; without one nothing is kept."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        kept = [line for line in whole if json.loads(line)["step"] <= resumed_step] if resumed_step else []
        write_text(path, "".join(kept))
        self.file = open(path, "r+b")
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": -1}
        self.last_at = self.file.seek(0, os.SEEK_END) - (len(kept[-1].encode()) if kept else 0)

    def append(self, step: int, values: dict[str, Any]) -> None:
        if step < self.last["step"]:
            raise ValueError(f"step {step} logged after step {self.last['step']}: steps are logged in order")
        if step == self.last["step"]:
            self.file.seek(self.last_at)
            self.file.truncate()
        else:
            self.last, self.last_at = {"step": step}, self.file.seek(0, os.SEEK_END)
        self.last |= {name: value if is_measured(value) else None for name, value in values.items()}
        self.file.write(json.dumps(self.last, allow_nan=False).encode() + b"\n")
        self.file.flush()


def record_environment(run_dir: Path, environment: dict[str, Any]) -> str:
    """Write env.json; a later attempt is added to the list "attempts" of the first. Returns the folder's W&B id.

    It is the first file of a run folder, and says whose the folder is.
    """
    first = read_json_object(run_dir / "env.json")
    if first is None:
        first = {**environment, "wandb_id": secrets.token_hex(4), "attempts": []}
    else:
        first["attempts"].append(environment)
    write_json(run_dir / "env.json", first)
    return first["wandb_id"]


def minutes_spent(run_dir: Path, summary: dict[str, Any]) -> float:
    """Minutes of the attempts before this one. One that nobody saw end lasted at least until it wrote its last line."""
    minutes: float = summary.get("total_time_min", 0.0)
    if summary.get("status") != "running":
        return minutes
    written = [path.stat().st_mtime for name in ("metrics.jsonl", "log.txt") if (path := run_dir / name).exists()]
    started = datetime.fromisoformat(summary["started"]).timestamp()
    return minutes + max(0.0, max(written, default=started) - started) / 60


def is_measured(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def readable_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """step 20/200 | loss 5.123 | aux 1.01 | lr 4.0e-03 | ... with what is in `metrics`."""
    return " | ".join([f"step {step}/{total_steps}", *(show(metrics[name]) for name, show in SHOWN if name in metrics)])


def thousands(value: float) -> str:
    """Three or four digits: 870, 16.0k, 1.31M."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"


def tail_figures(
    step_seconds: list[float], tokens_per_step: int, ranks: int, flops_per_token: int, peak: float | None
) -> dict[str, Any]:
    """Throughput over the last 50 measured steps: tokens over the sum of their times. Without a step, nothing.

    `peak` is the FLOP/s of one device; tail50_mfu is percent of it, absent where it is unknown.
    """
    tail = step_seconds[-TAIL_STEPS:]
    if not tail:
        return {}
    tok_per_sec = tokens_per_step * len(tail) / sum(tail)
    figures = {
        "tail_steps": len(tail),
        "tail50_tok_per_sec": tok_per_sec,
        "tail50_tok_per_sec_per_gpu": tok_per_sec / ranks,
        "tail50_dt_ms": 1000 * sum(tail) / len(tail),
        "tail50_step_ms": [1000 * seconds for seconds in tail],  # what the interval of their mean comes from
    }
    mfu = mfu_percent(tok_per_sec / ranks, flops_per_token, peak)
    return figures if mfu is None else {**figures, "tail50_mfu": mfu}
