"""GPUs are sampled until a run ends, whatever the end is. NVML is a stand-in; the ranks compute on the CPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from launch.run_config import REPO_ROOT
from ranks import RankPool


def train_with_fake_gpus(run_dir: Path, *assignments: str) -> tuple[int, bool]:
    """On every rank: one run through train.main(); its exit code, and whether it left a sampling thread behind."""
    import train
    from fake_nvml import FakeNvml
    from launch import gpu_monitor
    from launch.begin import begin_or_exit

    config = str(REPO_ROOT / "ds_configs" / "moe_tiny.json")
    start = begin_or_exit(["--config", config, "--run_dir", str(run_dir), "--set", *assignments])
    with (
        patch.object(gpu_monitor, "pynvml", FakeNvml()),
        patch.object(gpu_monitor, "SAMPLE_SECONDS", 0.001),
        patch.object(train, "gpus_of_this_machine", lambda ranks: ["a", "b"]),
    ):
        code = train.main(start)
    return code, "gpu_monitor" in {thread.name for thread in threading.enumerate()}


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize(
    ("assignments", "code", "status"),
    [
        (("run.train.num_steps=4",), 0, "completed"),
        (("optimizer.params.lr=1e30", "gradient_clipping=0"), 4, "nan"),
    ],
)
def test_a_run_records_its_gpus_and_no_thread_outlives_it(
    assignments: tuple[str, ...], code: int, status: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert two_ranks.run(train_with_fake_gpus, run_dir, *assignments) == [(code, False), (code, False)]
    assert summary(run_dir)["status"] == status
    assert summary(run_dir)["gpu_util_percent_mean"] == 50.0
    assert summary(run_dir)["gpu_memory_used_mib_max"] == 3000.0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["gpu/temperature_c"] for line in lines if "gpu/temperature_c" in line} == {70.0}
    ranks = json.loads((run_dir / "env.json").read_text())["ranks"]
    assert len(ranks) == 2, "every rank tells where it runs"
