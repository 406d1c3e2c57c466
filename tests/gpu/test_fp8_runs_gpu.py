"""FP8 in compiled layers and in a run on a GPU. Slow, so `python -m tools.gpu_check` comes to it last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.run_config import REPO_ROOT
from model.compiling import CompileWatch
from model.config import FP8Config, MoEConfig
from model.fp8 import apply_fp8
from model.fp8_matmul import CAPABILITY
from model.fp8_weights import refresh_fp8
from model.moe import MoELayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="needs a GPU with FP8 products for every row (H100, H200)",
    ),
]
E, D, F = 4, 256, 512


@pytest.mark.parametrize("capacity_factor", [1.0, 0.0])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_compiled_layer_neither_waits_for_the_host_nor_compiles_again(fp8: bool, capacity_factor: float) -> None:
    torch._dynamo.reset()
    config = MoEConfig(num_experts=E, ffn_hidden_size=F, capacity_factor=capacity_factor)
    layer = MoELayer(D, config, "relu2").bfloat16().cuda()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.05)
    if fp8:
        apply_fp8(layer, FP8Config(enabled=True), emulate=False, compiled=False)
        refresh_fp8(layer)
    layer.compile(dynamic=False)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 512, D, generator=generator).bfloat16().cuda() for _ in range(4)]
    layer(batches[0])[0].sum().backward()
    watch = CompileWatch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches:
            layer(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        watch.close()
    assert watch.graphs == []


def test_an_fp8_run_trains_on_this_gpu(tmp_path: Path) -> None:
    settings = ["bf16.enabled=true", "run.fp8.enabled=true", "run.fp8.dense=true", "run.fp8.lm_head=true"]
    settings += ["run.compile.mode=static", "run.launch.num_gpus=1", "run.train.eval_every=5"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "train.py", "--config", "ds_configs/moe_tiny.json", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--set", *settings], cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["recompiles"]) == ("completed", 0)
    assert summary["fp8_matrices"] == {"converted": 25, "skipped": 3}
