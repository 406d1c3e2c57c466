"""What a nanochat training run printed becomes a RunResult, so that a report can show it beside runs of ours.

    step 00119/00360 (33.06%) | loss: 4.712345 | lrm: 1.00 | dt: 487.10ms | tok/sec: 1,076,345 | mfu: 13.02
    Step 00250 | Validation bpb: 0.9876
    Peak memory usage: 23429.12MiB

The lines of nanochat's scripts/base_train.py, from its first version on, and of forks that add fields ("bf16_mfu",
"epoch", "eta", "grad norm"): fields between bars, each `key: value`; what has no name here is passed over. Colours,
carriage returns of a bar, prefixes of a launcher and bytes that are no UTF-8 do no harm. What the numbers are:

* step      nanochat counts from 0 and prints a step's line when it is done: its step 119 is our 120, the steps done. It
            validates before the step of that number, so a validation keeps its number.
* loss      a moving average (0.9 of the old), debiased; ours is that of the step. summary["loss_is_smoothed"] is True.
* mfu       percent of the peak that nanochat assumed, by its own FLOPs per token; in the summary if the log has them.
* minutes   the sum of dt from the twelfth step on: without the first steps, validation and saving; ours is wall time.
* tail50_*  over the last 50 step lines: tokens over the sum of dt, so steps weigh by their time. Tokens per step are
            those that the log states, or tok/sec * dt if that is one number for all lines; else tok/s is absent.
* twice     where steps go back, a restart was appended: what stood there of the steps that it takes again is dropped.

A figure that the log lacks is absent. A last line without its end is being written, or its writer was killed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.results import RunResult, Step
from launch.run_log import TAIL_STEPS
from model.config import DataError

STEP_FIELDS = {  # as a line has it: our name, and the unit that may stand behind the number
    "loss": ("train/loss", ""),
    "grad norm": ("train/grad_norm", ""),
    "grad_norm": ("train/grad_norm", ""),
    "dt": ("train/dt_ms", "ms"),
    "tok/sec": ("train/tok_per_sec", ""),
    "mfu": ("train/mfu", "%"),
    "bf16_mfu": ("train/mfu", "%"),
    "validation bpb": ("val/bpb", ""),
    "validation loss": ("val/loss", ""),
}
UNTIMED_STEPS = 11  # which nanochat leaves out of its total time: they compile
DT_ROUNDING_MS = 0.05  # dt has two digits after the point, in some forks one
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


Said = dict[str, tuple[str, str]]  # `key: value` outside of step lines: (value, file:line) by key in lower case


@dataclass
class Log:
    """What the lines read so far say."""

    path: Path
    steps: list[Step] = field(default_factory=list)
    num_steps: int | None = None
    said: Said = field(default_factory=dict)
    said_since: Said = field(default_factory=dict)  # what of it came after the last step, and its "total time"


def read_nanochat_log(path: Path, name: str | None = None) -> RunResult:
    """Steps and figures of a log. Raises DataError if it has no step line, or one that cannot be read."""
    if not path.is_file():
        raise DataError(f"{path} is no file. Name a log of nanochat's base_train.")
    text = COLOUR.sub("", path.read_bytes().decode("utf-8", errors="replace"))
    log = Log(path)
    for line_number, line in enumerate(text.split("\n")[:-1], start=1):
        for part in line.split("\r"):  # a bar returns to the start of its line
            read_line(log, part, f"{path}:{line_number}")
    if not any("train/loss" in step for step in log.steps):
        raise DataError(
            f"{path} has no step line such as 'step 00119/00360 (33.06%) | loss: 4.712345 | dt: 487.10ms | ...'. "
            "Name the folder of a run, or what nanochat's base_train printed."
        )
    return RunResult(name=name or path.stem, folder=path.parent, summary=summarise(log), steps=log.steps)


def read_line(log: Log, line: str, place: str) -> None:
    head, *rest = line.split("|")
    fields = fields_of(rest)
    numbered = step_and_total(head)
    metrics = {
        ours: number(fields[theirs], unit, f"{place}: {theirs}")
        for theirs, (ours, unit) in STEP_FIELDS.items()
        if numbered and theirs in fields
    }
    if numbered and metrics:
        step, total = numbered
        trained = "train/loss" in metrics
        add_step(log, step + 1 if trained else step, total, metrics, place)
        if trained:
            log.said_since = {key: (fields[key], place) for key in ("total time",) if key in fields}
    else:
        head = head.replace("Total batch size ", "Total batch size: ")  # the one figure without a colon
        said = {key: (value, place) for key, value in fields_of([head, *rest]).items()}
        log.said |= said
        log.said_since |= said


def fields_of(parts: list[str]) -> dict[str, str]:
    return {key.strip().lower(): value.strip() for key, _, value in (part.partition(":") for part in parts)}


def step_and_total(head: str) -> tuple[int, int | None] | None:
    """(119, 360) from "step 00119/00360 (33.06%)", (119, None) from "Step 00119"; None if there is no such thing."""
    _, found, rest = head.lower().rpartition("step ")
    step, _, total = (rest.split() or [""])[0].partition("/")
    if not found or not step.isdecimal() or (total and not total.isdecimal()):
        return None
    return int(step), int(total) if total else None


def number(text: str, unit: str, place: str) -> float | None:
    """1080430.0 from "1,080,430", 487.1 from "487.10ms"; None if it is not finite."""
    word = (text.split() or [""])[0]
    try:
        value = float(word.removesuffix(unit).replace(",", ""))
    except ValueError:
        raise DataError(
            f"{place} is {text!r}, not a number{f' of {unit}' if unit else ''}. Mend the line, or leave it out."
        ) from None
    return value if math.isfinite(value) else None


def add_step(log: Log, step: int, total: int | None, metrics: dict[str, float | None], place: str) -> None:
    """Steps stay in order, each once: those after `step` belong to an attempt that a restart has given up."""
    if total is not None and log.num_steps not in (None, total):
        raise DataError(
            f"{place} is of a run of {total} steps, the lines above of one of {log.num_steps}. "
            "Give each run a file of its own."
        )
    log.num_steps = log.num_steps or total
    while log.steps and log.steps[-1]["step"] > step:
        log.steps.pop()
    if not log.steps or log.steps[-1]["step"] < step:
        log.steps.append({"step": step})
    log.steps[-1] |= metrics


# --- summary --------------------------------------------------------------------------------------------------------


def summarise(log: Log) -> dict[str, Any]:
    """The names of summary.json, and "notes": sentences that belong beside the figures."""
    trained = [line for line in log.steps if "train/loss" in line]
    micro_batch, of_a_rank = stated(log.said, "tokens / micro-batch"), stated(log.said, "tokens / micro-batch / rank")
    world_size = round(micro_batch / of_a_rank) if micro_batch and of_a_rank else None
    tokens, notes = tokens_per_step(trained, stated(log.said, "total batch size"))
    if not any(line.get("train/mfu") for line in trained):  # on a CPU nanochat divides by an infinite peak
        for line in trained:
            line.pop("train/mfu", None)
    since = log.said_since
    figures: dict[str, Any] = {
        "num_steps": log.num_steps,
        "step": log.steps[-1]["step"],
        "train/loss": trained[-1]["train/loss"],
        "val/bpb": next((line["val/bpb"] for line in reversed(log.steps) if "val/bpb" in line), None),
        "min_val_bpb": stated(since, "minimum validation bpb"),
        "device": log.said["gpu"][0] if "gpu" in log.said else None,
        "world_size": world_size,
        "tokens_per_step": tokens,
        "flops_per_token": stated(log.said, "estimated flops per token"),
        "peak_flops": stated(log.said, "peak flops (bf16)"),
        **tail_figures(trained, tokens, world_size),
        "peak_mem_mib": stated(since, "peak memory usage", "MiB"),
        "total_time_min": stated(since, "total training time", "m") or stated(since, "total time", "m"),
    }
    measured = {name: value for name, value in figures.items() if value is not None}
    status = "completed" if is_completed(log, trained) else "unknown"
    return {"status": status, "loss_is_smoothed": True, **measured, "notes": [*notes, *notes_on(trained, measured)]}


def stated(said: Said, key: str, unit: str = "") -> float | None:
    """A number outside of step lines; of "16 x 1024 = 16,384" the product. 0 is how nanochat prints the unmeasured."""
    if key not in said:
        return None
    text, place = said[key]
    return number(text.rpartition("= ")[2], unit, f"{place}: {key}") or None


def is_completed(log: Log, trained: list[Step]) -> bool:
    """Whether the last step was reached and the total time printed. With lines N steps apart it may be N - 1 later."""
    if log.num_steps is None or "total training time" not in log.said_since:
        return False
    apart = trained[-1]["step"] - trained[-2]["step"] if len(trained) > 1 else 1
    return log.steps[-1]["step"] + apart > log.num_steps


def tokens_per_step(trained: list[Step], tokens: float | None) -> tuple[float | None, list[str]]:
    """Tokens of a step, stated or from the lines, and what is to be said of them.

    tok/sec is int(tokens / dt) and dt is rounded, so a line says tokens between two bounds, and all lines between the
    closest ones. If these cross, steps differ. nanochat's first version printed the rate of one micro-step, times the
    number of which it is right: where the log states the tokens of a step, it is.
    """
    timed = [(line["train/tok_per_sec"], line["train/dt_ms"], line) for line in trained if is_timed(line)]
    if not timed:
        return tokens, []
    least = max(rate * (dt - DT_ROUNDING_MS) / 1000 for rate, dt, _ in timed)
    most = min((rate + 1) * (dt + DT_ROUNDING_MS) / 1000 for rate, dt, _ in timed)
    if least > most:
        return None, ["tok/sec * dt differs from step to step, so no tokens per step and no tail-50 tok/s"]
    if tokens is None:
        return float(round((least + most) / 2)), []
    if least <= tokens <= most:
        return tokens, []
    for _, dt, line in timed:
        line["train/tok_per_sec"] = 1000 * tokens / dt
    return tokens, ["tok/s is that of the total batch size stated; the lines have that of a smaller one"]


def is_timed(line: Step) -> bool:
    return bool(line.get("train/tok_per_sec") and line.get("train/dt_ms"))


def tail_figures(trained: list[Step], tokens: float | None, world_size: int | None) -> dict[str, Any]:
    tail = [line for line in trained if line.get("train/dt_ms")][-TAIL_STEPS:]
    if not tail:
        return {}
    times_ms = [line["train/dt_ms"] for line in tail]
    figures: dict[str, Any] = {"tail_steps": len(tail), "tail50_dt_ms": sum(times_ms) / len(tail)}
    if tokens:
        figures["tail50_tok_per_sec"] = 1000 * tokens * len(tail) / sum(times_ms)
        if world_size:
            figures["tail50_tok_per_sec_per_gpu"] = figures["tail50_tok_per_sec"] / world_size
    if all(line.get("train/mfu") is not None for line in tail):  # a rate, so weighted by time like tok/s
        figures["tail50_mfu"] = sum(line["train/mfu"] * line["train/dt_ms"] for line in tail) / sum(times_ms)
    return {**figures, "tail50_step_ms": times_ms}


def notes_on(trained: list[Step], figures: dict[str, Any]) -> list[str]:
    notes = ["a log of nanochat, whose loss is a moving average over about ten steps"]
    if "tail50_mfu" in figures:
        notes.append("MFU is against the peak, and by the FLOPs per token, that nanochat assumed")
    if "total_time_min" in figures:
        notes.append(f"minutes leave out the first {UNTIMED_STEPS} steps, validation and saving")
    tail = [line["step"] for line in trained if line.get("train/dt_ms")][-TAIL_STEPS:]
    if tail and tail[0] <= UNTIMED_STEPS:
        notes.append("the steps of its tail figures include the first, which compile")
    if len(tail) > 1 and tail[-1] - tail[0] >= len(tail):
        notes.append("its lines are more than one step apart, and the tail figures are of the lines")
    return notes
