"""The run folder: what lies in it, whether a run may begin or continue there, and files that are never half written.

config.json  env.json  metrics.jsonl  expert_load.jsonl  summary.json  log.txt  checkpoints/  wandb/
rank*.err  rank*.lost  faults of ranks other than 0, and that they lost another rank
requests.jsonl  rank*.stacks  of an attempt that was stopped or hung: who was asked, what every thread was doing
profile/  of the last attempt with run.train.profile_steps: trace.json.gz  table.md  parts.json (model/profile.py)
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import ConfigError

Status = Literal["running", "completed", "stopped", "failed", "oom", "nan", "hang"]
EXIT_COMPLETED, EXIT_REFUSED, EXIT_STOPPED, EXIT_FAILED = 0, 2, 3, 4
EXIT_CODES: dict[str, int] = {"completed": EXIT_COMPLETED, "stopped": EXIT_STOPPED}  # any other status: EXIT_FAILED


@dataclass(frozen=True)
class Beginning:
    """How a run starts in its folder."""

    action: Literal["fresh", "resume", "completed"]
    step: int  # the checkpoint to continue from; 0 when fresh
    steps: tuple[int, ...] = ()  # that one, and those to fall back to if it is damaged, in this order


def decide_beginning(run_dir: Path, config_hash: str, resume: str) -> Beginning:
    """Apply --resume to a folder. `resume` is "auto", "never" or a step. Writes nothing.

    Raises ConfigError if the folder belongs to another run, is not a run folder, or lacks the step asked for.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        if resume not in ("auto", "never"):
            raise ConfigError(
                f"--resume {resume}: {run_dir} holds no run. Use --resume auto, or name the run's folder."
            )
        return Beginning("fresh", 0)
    if not run_dir.is_dir():
        raise ConfigError(f"--run_dir {run_dir}: is a file. Name a folder.")
    if resume == "never":
        raise ConfigError(
            f"--resume never: {run_dir} is not empty. Use another --run_dir, or --resume auto to continue it."
        )
    env = read_json_object(run_dir / "env.json")
    if env is None:
        raise ConfigError(
            f"--run_dir {run_dir}: is not empty and not a run folder (no env.json). Use another --run_dir."
        )
    if env.get("config_hash") != config_hash:
        raise ConfigError(
            f"--run_dir {run_dir}: belongs to a run with another configuration (hash {env.get('config_hash')}, this "
            f"one {config_hash}). Use another --run_dir, or the run file in {run_dir / 'config.json'}."
        )
    if resume != "auto":
        steps_there = saved_steps(run_dir)
        if not resume.isdecimal() or int(resume) not in steps_there:
            saved = ", ".join(map(str, steps_there)) or "none"
            raise ConfigError(
                f"--resume {resume}: no such checkpoint in {run_dir} (saved steps: {saved}). Use one of them, or auto."
            )
        return Beginning("resume", int(resume), (int(resume),))
    summary = read_summary(run_dir)
    if summary is not None and summary.get("status") == "completed":
        return Beginning("completed", int(summary.get("step", 0)))
    steps = steps_to_resume(run_dir)
    if not steps and (run_dir / "checkpoints" / "latest").exists():
        raise ConfigError(
            f"{run_dir / 'checkpoints'}: `latest` is there, and no checkpoint. Restore one, or remove `latest` to "
            "begin afresh."
        )
    return Beginning("resume", steps[0], steps) if steps else Beginning("fresh", 0)


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoint folders, oldest first; also of one that was to be replaced (model/checkpoint.py)."""
    folder = run_dir / "checkpoints"
    names = {path.name.removeprefix("replaced_") for path in folder.glob("*") if path.is_dir()}
    numbers = [name.removeprefix("step_") for name in names if name.startswith("step_")]
    return sorted(int(number) for number in numbers if number.isdecimal() and number.isascii())


def steps_to_resume(run_dir: Path) -> tuple[int, ...]:
    """The steps to try, the preferred one first: what `latest` names, then older ones, then those of later steps.

    The latter come last because they are of a branch that was abandoned with --resume STEP. Where `latest` names none
    that is there, the newest is the preferred one. One that is there but damaged is found by who loads it.
    """
    saved, latest = saved_steps(run_dir), latest_step(run_dir)
    if latest not in saved:
        return tuple(reversed(saved))
    older, later = [step for step in saved if step < latest], [step for step in saved if step > latest]
    return (latest, *reversed(older), *reversed(later))


def latest_step(run_dir: Path) -> int | None:
    """The step that checkpoints/latest names, which is written after the checkpoint is whole; None if it names none."""
    try:
        name = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, IsADirectoryError):
        return None
    number = name.removeprefix("step_")
    is_name = number.isdecimal() and number.isascii() and name == checkpoint_name(int(number))
    return int(number) if is_name else None


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    return read_json_object(run_dir / "summary.json")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file of the run folder; None if there is none. Raises ConfigError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is not valid JSON, so the folder cannot be trusted. Use another --run_dir.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader, or a crash, finds the old file or the new one and nothing between."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably: a temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # only a failure leaves it
