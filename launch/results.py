"""What a run left behind, read from its folder alone: status, figures, logged steps, load of experts, environment."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.run_dir import read_json_object, read_summary

Step = dict[str, Any]  # one line of metrics.jsonl: "step" and metrics; None for what was not finite


@dataclass(frozen=True)
class RunResult:
    """One run. What it did not leave is empty, and a figure that it did not measure is absent."""

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # the resolved run file
    env: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    expert_load: list[dict[str, Any]] = field(default_factory=list)  # lines of expert_load.jsonl

    @property
    def status(self) -> str:
        return self.summary.get("status", "unknown")

    def figure(self, name: str) -> float | None:
        """A number of the summary; None where it was not measured."""
        value = self.summary.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was logged, and its values."""
        logged = [(line["step"], line[metric]) for line in self.steps if line.get(metric) is not None]
        return [step for step, _ in logged], [value for _, value in logged]


def read_run(folder: Path, name: str | None = None) -> RunResult:
    """A run folder, at whatever point its run is. Raises ConfigError if one of its JSON files is damaged."""
    return RunResult(
        name=name or folder.name,
        folder=folder,
        config=read_json_object(folder / "config.json") or {},
        env=read_json_object(folder / "env.json") or {},
        summary=read_summary(folder) or {},
        steps=read_lines(folder / "metrics.jsonl"),
        expert_load=read_lines(folder / "expert_load.jsonl"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects, one a line; a last line without its end is being written, or its writer was killed."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
