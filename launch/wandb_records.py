"""Runs read back from Weights & Biases: its offline files, and its server. The only file that reads there.

wandb 0.31 has no reader of .wandb files in Python (its core, a Go program, has one). A file is a header, ":W&B", 0xBEE1
and a version, then the log format of LevelDB with zlib's CRC-32, little-endian:

    blocks of 32768 bytes, the header counting as part of the first; a block's last bytes are padding if fewer than 7
    chunk = crc of kind and data (4 bytes), length of data (2), kind (1), data;  it lies within one block
    record = one FULL chunk, or FIRST, any number of MIDDLE, LAST;               a wandb.proto Record, serialised
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.results import RunResult, Step
from launch.wandb_run import mode_with_key, reason, wandb_failures
from model.config import ConfigError

MAGIC = b":W&B\xe1\xbe\x00"
BLOCK = 32768
CHUNK = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Attempt:
    """One .wandb file: a run, or the part of a resumed run that one attempt left."""

    path: Path
    run_id: str = ""
    name: str = ""
    started: float = 0.0
    ended: bool = False
    lost: int = 0  # places where the file is damaged
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, Step] = field(default_factory=dict)


def read_offline(paths: Iterable[Path]) -> tuple[dict[Path, RunResult], list[str]]:
    """The runs of .wandb files by the first file of each, and warnings about what is not whole.

    Files of one run id are the attempts of one run. Raises ConfigError for a file that holds no whole record of a run.
    """
    runs: dict[str, list[Attempt]] = {}
    for path in paths:
        attempt = read_attempt(path)
        runs.setdefault(attempt.run_id, []).append(attempt)
    in_time = {attempts[0].path: sorted(attempts, key=lambda each: each.started) for attempts in runs.values()}
    warnings = [text for attempts in in_time.values() for text in doubts(attempts)]
    return {path: join(attempts) for path, attempts in in_time.items()}, warnings


def join(attempts: list[Attempt]) -> RunResult:
    """Attempts, the oldest first, as their run folder would hold them: what a later one takes again, it replaces."""
    steps: dict[int, Step] = {}
    for attempt in attempts:
        first = min(attempt.steps, default=math.inf)
        steps = {number: step for number, step in steps.items() if number <= first}
        for number, step in attempt.steps.items():
            steps[number] = steps.get(number, {}) | step
    last = attempts[-1]
    envs = [split(attempt.config)[1] for attempt in attempts]
    return RunResult(
        name=last.name or last.run_id,
        folder=last.path,
        config=split(last.config)[0],
        env={**envs[0], "attempts": envs[1:]},
        summary=without_hidden(last.summary),
        steps=[steps[number] for number in sorted(steps)],
    )


def doubts(attempts: list[Attempt]) -> list[str]:
    """What is not whole. An attempt without an end is usual if another one follows."""
    texts = [
        f"{attempt.path}: damaged or cut short ({attempt.lost} part{'s' * (attempt.lost > 1)} lost); the rest is read"
        for attempt in attempts
        if attempt.lost
    ]
    last = attempts[-1]
    if not last.ended and not last.lost:
        texts.append(f"{last.path}: has no end; the run goes on, was killed, or the file is cut short")
    return texts


def split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """W&B's config as the resolved run file and what WandbRun adds to it, the facts of the environment."""
    rest = {key: value for key, value in config.items() if key != "_wandb"}
    env = rest.pop("env") if isinstance(rest.get("env"), dict) else {}
    return rest, env


def without_hidden(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without W&B's own: _step, _runtime, _timestamp, _wandb."""
    return {key: value for key, value in metrics.items() if not key.startswith("_")}


def as_step(number: int, metrics: dict[str, Any]) -> Step:
    """A line as in metrics.jsonl: what is no finite number (W&B's server writes "NaN") is None."""
    kept = without_hidden(metrics).items()
    numbers = {key: value if isinstance(value, int | float) and math.isfinite(value) else None for key, value in kept}
    return {"step": number, **numbers}


# --- offline files ----------------------------------------------------------------------------------------------------


def read_attempt(path: Path) -> Attempt:
    """Raises ConfigError if no record in the file says whose it is."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name a .wandb file, or leave it out.") from None
    if not data.startswith(MAGIC):
        raise ConfigError(f"{path}: is not a .wandb file of a version that is known here. Leave it out.")
    attempt = Attempt(path)
    records, attempt.lost = whole_records(data)
    for each in records:
        try:
            take(Record.FromString(each), attempt)
        except DecodeError:
            attempt.lost += 1
    if not attempt.run_id:
        raise ConfigError(f"{path}: holds no whole record of a run (empty, or damaged). Leave it out.")
    return attempt


def whole_records(data: bytes) -> tuple[list[bytes], int]:
    """The records whose checksums hold, and the number of places where something is lost.

    After a damaged chunk lengths cannot be trusted, so reading goes on at the next block.
    """
    records: list[bytes] = []
    parts: list[bytes] | None = None  # of the record that has begun
    lost, at = 0, len(MAGIC)
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:
            at += left
            continue
        checksum, length, kind = CHUNK.unpack(data[at : at + CHUNK.size].ljust(CHUNK.size, b"\0"))
        content = data[at + CHUNK.size : at + CHUNK.size + length]
        size = CHUNK.size + length
        if not FULL <= kind <= LAST or size > left or zlib.crc32(bytes([kind]) + content) != checksum:
            lost, parts, at = lost + 1, None, at + left
            continue
        at += size
        if kind in (FULL, FIRST):
            lost += parts is not None
            parts = [content]
        elif parts is not None:  # else the rest of a record whose beginning was lost, and counted
            parts.append(content)
        if kind in (FULL, LAST) and parts is not None:
            records.append(b"".join(parts))
            parts = None
    return records, lost + (parts is not None)


def take(record: Any, attempt: Attempt) -> None:
    """Apply one Record: of what kinds there are, those that make the run's name, config, summary and history."""
    kind = record.WhichOneof("record_type")
    if kind == "run":
        attempt.run_id, attempt.name = record.run.run_id, record.run.display_name or attempt.name
        attempt.started = record.run.start_time.seconds + record.run.start_time.nanos / 1e9
        apply(record.run.config, attempt.config)
        apply(record.run.summary, attempt.summary)
    elif kind == "config":
        apply(record.config, attempt.config)
    elif kind == "summary":
        apply(record.summary, attempt.summary)
    elif kind == "history":
        metrics = {".".join(keys_of(item)): json.loads(item.value_json) for item in record.history.item}
        number = int(metrics.get("_step", record.history.step.num))
        attempt.steps[number] = attempt.steps.get(number, {}) | as_step(number, metrics)
    elif kind == "exit":
        attempt.ended = True


def apply(change: Any, tree: dict[str, Any]) -> None:
    """A ConfigRecord's or a SummaryRecord's updates and removals."""
    for item in itertools.chain(change.update, change.remove):
        *parents, name = keys_of(item)
        section = tree
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        if item.value_json:
            section[name] = json.loads(item.value_json)
        else:
            section.pop(name, None)


def keys_of(item: Any) -> list[str]:
    return list(item.nested_key) or [item.key]


# --- the server -------------------------------------------------------------------------------------------------------


def read_online(path: str) -> RunResult:
    """The run entity/project/run_id or project/run_id. Raises ConfigError if W&B does not give it."""
    failures = wandb_failures()
    import wandb

    try:
        mode_with_key("online")  # wandb.Api would ask for a key at the prompt
        run = wandb.Api().run(path)
        config, env = split(run.config)
        rows = [(row["_step"], row) for row in run.scan_history()]
        return RunResult(
            name=run.name or run.id,
            folder=Path(path),
            config=config,
            env=env,
            summary=without_hidden(run.summary_metrics),
            steps=[as_step(number, row) for number, row in sorted(rows, key=lambda each: each[0])],
        )
    except failures as error:
        raise ConfigError(f"{path}: W&B does not give this run: {reason(error)}") from None
