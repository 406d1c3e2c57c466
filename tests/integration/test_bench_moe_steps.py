"""tools/bench_moe as a program: whole training steps of run files, and a compiled block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_config import REPO_ROOT

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
TIMEOUT = 240  # seconds; against hanging only


def bench(*options: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.bench_moe", *map(str, options)],
        cwd=REPO_ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_training_steps_are_measured_and_nothing_but_the_json_is_left(tmp_path: Path) -> None:
    """A run file of this checkout and the same one by RUNFILE@CHECKOUT, beside one whose data is not there."""
    temporary, broken, out = tmp_path / "tmp", tmp_path / "broken.json", tmp_path / "out.json"
    temporary.mkdir()
    broken.write_text(json.dumps({"base": str(TINY), "run": {"data": {"train": "nowhere/train"}}}))
    runs = ("ds_configs/moe_tiny.json", broken, f"ds_configs/moe_tiny.json@{REPO_ROOT}")
    settings = ("--set", "run.launch.num_gpus=1", "run.train.log_every=5")
    done = bench("--step", *runs, "--steps", "6", "--rounds", "1", "--json", out, *settings, TMPDIR=str(temporary))
    assert done.returncode == 1, done.stderr
    assert list(temporary.iterdir()) == []

    first, failed, second = json.loads(out.read_text())["rows"]
    for row in (first, second):
        assert row["run"] == "ds_configs/moe_tiny.json"
        assert len(row["commit"]) == 40
        assert row["set"] == ["run.launch.num_gpus=1", "run.train.log_every=5"]
        assert row["tail_steps"] == 3  # of 6, without the warm-up
        assert row["world_size"] == 1
        assert row["tok_per_sec_median"] * row["dt_ms_median"] / 1000 == pytest.approx(8 * 32)  # tokens of a step
        assert row["peak_mem_mib_median"] > 0
        assert row["launch_to_first_step_s_median"] > 0
        assert "mfu_median" not in row  # a CPU has no stated peak
        assert "dt_ms_iqr" not in row  # of a single round
    assert "nowhere/train" in failed["error"]
    assert "dt_ms_median" not in failed
    assert "`ds_configs/moe_tiny.json`" in done.stdout


def test_a_compiled_block_is_measured_beside_the_plain_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    shape = ("--shapes", "T64,D16,F16,E4,k2", "--dtypes", "fp32", "--rounds", "2")
    done = bench(*shape, "--blocks", "dense/iso_flop", "--compile", "--json", out)
    assert done.returncode == 0, done.stderr
    plain, compiled = json.loads(out.read_text())["rows"]
    assert (plain["block"], compiled["block"]) == ("dense/iso_flop", "dense/iso_flop+static")
    assert compiled["compile_s"] > 0
    assert "compile_s" not in plain
