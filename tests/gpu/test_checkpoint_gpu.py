"""Runs on one GPU: the step after a resume has the loss of the undisturbed run, bit for bit, and a CPU can take over.

Later steps need not: torch's flash attention adds up the gradients of its queries in an order of its own (torch 2.11).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.run_config import REPO_ROOT
from model.checkpoint import read_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SETTINGS = ("bf16.enabled=true", "run.launch.num_gpus=1", "run.train.eval_every=5")
MUON = (
    "gradient_clipping=0",
    'optimizer={"type": "Muon", "params": {"lr": null, "muon_lr": 0.02, "adam_lr": 0.003, "weight_decay": 0.1}}',
)


def train(run_dir: Path, *settings: str, resume: str = "auto", gpu: bool = True) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {} if gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py", "--config", "ds_configs/moe_tiny.json", "--run_dir", str(run_dir)]
    done = subprocess.run(
        [*command, "--resume", resume, "--set", *SETTINGS, *settings],
        cwd=REPO_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stdout[-3000:] + done.stderr[-3000:]


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in lines]


def tensors(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
    return {(name, kind): values for name, kind, values in read_tensors(folder)}


@pytest.mark.parametrize("optimizer", [(), MUON], ids=["AdamW", "Muon"])
def test_the_step_after_a_resume_has_the_loss_of_the_undisturbed_run(
    tmp_path: Path, optimizer: tuple[str, ...]
) -> None:
    run_dir, settings = tmp_path / "run", ("run.train.save_every=4", "run.train.keep_last=9")
    train(run_dir, *optimizer, *settings)
    undisturbed = losses(run_dir)
    train(run_dir, *optimizer, *settings, resume="4")
    resumed = losses(run_dir)
    assert [step for step, *_ in resumed] == [step for step, *_ in undisturbed] == list(range(11))
    assert resumed[:5] == undisturbed[:5], "what was logged before is kept"
    assert resumed[5][1] == undisturbed[5][1], "the loss of step 5 is that of the state after step 4"
    for (step, loss, _), (_, expected, _) in zip(resumed[6:], undisturbed[6:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-3), step


def test_a_state_of_a_gpu_is_continued_on_the_cpu(tmp_path: Path) -> None:
    train(tmp_path / "run", "run.train.stop_at_step=4")
    before = tensors(tmp_path / "run")
    train(tmp_path / "run", "run.train.stop_at_step=5", gpu=False)
    after = tensors(tmp_path / "run")
    assert after.keys() == before.keys()
    steps = [step for step, *_ in losses(tmp_path / "run")]
    assert steps == [0, 1, 2, 3, 4, 5]
