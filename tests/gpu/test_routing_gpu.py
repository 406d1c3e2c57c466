"""Routing on a GPU: the choices of a CPU, and no wait for the host whatever the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.compiling import CompileWatch
from model.config import MoEConfig
from model.moe import MoELayer
from model.router import choose_top_k, update_selection_bias
from model.stats import StepStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
E, D, F, T = 8, 64, 128, 512
RULES: dict[str, dict[str, Any]] = {
    "seed": {"capacity_factor": 1.0},
    "drops by gates": {"capacity_factor": 0.5, "drop_policy": "probability"},
    "load over the global batch": {"aux_loss_scope": "global_batch", "z_loss_coeff": 0.1},
    "DeepSeek-V3's": {
        "top_k": 4,
        "num_groups": 4,
        "top_k_groups": 2,
        "score_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "balance": "bias",
        "aux_loss_coeff": 1e-4,
        "aux_loss_scope": "sequence",
    },
}


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("equal", [True, False])
def test_a_gpu_chooses_the_experts_that_a_cpu_chooses(equal: bool, groups: tuple[int, int]) -> None:
    scores_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    if equal:
        scores_TE = (scores_TE * 4).round() / 4  # many ties
    expected_TK = choose_top_k(scores_TE, 4, *groups)
    assert torch.equal(choose_top_k(scores_TE.cuda(), 4, *groups).cpu(), expected_TK)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_no_rule_waits_for_the_host_or_is_compiled_again(rule: str, compiled: bool) -> None:
    """Forward, backward, statistics and the step of the bias, after one of each that warms up."""
    torch._dynamo.reset()
    layer = MoELayer(D, MoEConfig(num_experts=E, ffn_hidden_size=F, **RULES[rule]), "relu2").bfloat16().cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.05)
    if compiled:
        layer.compile(dynamic=False)
    x_BSD = torch.randn(4, T // 4, D, device="cuda", dtype=torch.bfloat16)
    earlier_E = torch.zeros(E, device="cuda", dtype=torch.float64)

    def step() -> None:
        y_BSD, stats = layer(x_BSD, earlier_E)
        (y_BSD.sum() + stats.aux_loss + stats.z_loss).backward()
        update_selection_bias(layer, stats.tokens_per_expert_E.double().unsqueeze(0))

    step()
    watch = CompileWatch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        watch.close()
    assert watch.graphs == []


def test_statistics_of_a_step_stay_on_the_device() -> None:
    assert StepStats(2, E, "cuda").tokens_per_expert_ME.is_cuda
