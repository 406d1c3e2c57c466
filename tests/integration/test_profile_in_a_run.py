"""run.train.profile_steps in a run: what it leaves in the run folder, and that it changes nothing else."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY, metrics, summary, weights

from launch.run_dir import EXIT_COMPLETED, EXIT_STOPPED
from model.loop import WARM_UP_STEPS
from ranks import RankPool, train_on_this_rank

PARTS = ["attention", "router", "dispatch", "experts", "combine", "all-to-all", "head and loss", "optimizer", "data"]
LAST = WARM_UP_STEPS + 2  # the last step of a profile of two


def train(pool: RankPool, run_dir: Path, *assignments: str, code: int = EXIT_COMPLETED) -> None:
    assert pool.run(train_on_this_rank, TINY, run_dir, list(assignments)) == [code, code]


def found(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "profile" / "parts.json").read_text())


def timed_steps(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/dt_ms" in line]


@pytest.mark.parametrize("how", ["none", "block"])
def test_a_profile_divides_the_steps_after_the_warm_up_and_changes_no_result(
    how: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    settings = (f"run.train.activation_checkpointing={how}", "bf16.enabled=true")
    train(two_ranks, tmp_path / "plain", *settings)
    train(two_ranks, tmp_path / "profiled", *settings, "run.train.profile_steps=2")

    assert metrics(tmp_path / "profiled") == metrics(tmp_path / "plain")
    plain, profiled = weights(tmp_path / "plain", 10), weights(tmp_path / "profiled", 10)
    assert plain.keys() == profiled.keys()
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert timed_steps(tmp_path / "plain") == list(range(WARM_UP_STEPS + 1, 11))
    assert timed_steps(tmp_path / "profiled") == list(range(LAST + 1, 11))
    assert summary(tmp_path / "profiled")["tail_steps"] == 10 - LAST

    figures = found(tmp_path / "profiled")
    assert list(figures["parts_ms"]) == [*PARTS, "other"]
    assert all(time > 0 for time in figures["parts_ms"].values())
    assert math.isclose(sum(figures["parts_ms"].values()), figures["step_ms"])
    assert (figures["first_step"], figures["last_step"]) == (WARM_UP_STEPS + 1, LAST)
    assert "uncompiled_parts_ms" not in figures
    table = (tmp_path / "profiled" / "profile" / "table.md").read_text()
    assert table in (tmp_path / "profiled" / "log.txt").read_text()
    assert not (tmp_path / "plain" / "profile").exists()
    with gzip.open(tmp_path / "profiled" / "profile" / "trace.json.gz") as trace:
        names = [event["name"] for event in json.load(trace)["traceEvents"] if "name" in event]
    assert names.count("part: step") == 2, "and no other rank, and no other step"
    assert {"part: router", "moelab::all_to_all"} <= set(names)


def test_a_resumed_run_profiles_as_many_steps_as_are_left_after_its_own_warm_up(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    train(two_ranks, tmp_path, "run.train.stop_at_step=2", "run.train.profile_steps=1", code=EXIT_STOPPED)
    log = (tmp_path / "log.txt").read_text()
    assert "run.train.profile_steps=1: 2 steps are left, of which the first 3 warm up. None will be profiled." in log
    assert not (tmp_path / "profile").exists()
    train(two_ranks, tmp_path, "run.train.profile_steps=7")
    log = (tmp_path / "log.txt").read_text()
    assert "run.train.profile_steps=7: 8 steps are left, of which the first 3 warm up. 5 will be profiled." in log
    assert (found(tmp_path)["first_step"], found(tmp_path)["last_step"]) == (2 + WARM_UP_STEPS + 1, 10)
    assert timed_steps(tmp_path) == []
