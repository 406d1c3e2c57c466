"""From the statistics of micro-steps to the metrics of a step."""

from __future__ import annotations

import pytest
import torch

from model.gpt import Stats
from model.stats import StepStats, load_metrics
from ranks import RankPool


def micro_step(loss: float, tokens: list[list[int]], dropped: list[int], aux: list[float]) -> Stats:
    return Stats(
        torch.tensor(loss),
        torch.tensor(8),
        torch.tensor(aux),
        torch.tensor(tokens),
        torch.tensor(dropped),
    )


def test_load_metrics_of_a_known_load() -> None:
    tokens_ME = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0]])
    found = load_metrics(tokens_ME, torch.tensor([0.0, 8.0]), moe_layers=[1, 3])
    assert found["moe/load_max_over_mean"] == 4.0
    assert found["moe/layer_1/load_max_over_mean"] == 1.0
    assert found["moe/layer_3/load_max_over_mean"] == 4.0
    assert found["moe/layer_1/load_cv"] == 0.0
    assert found["moe/layer_3/load_cv"] == pytest.approx(3**0.5)
    assert found["moe/load_cv"] == pytest.approx(3**0.5 / 2)
    assert found["moe/dead_experts"] == found["moe/layer_3/dead_experts"] == 3
    assert found["moe/dropped_frac"] == 0.25
    assert found["moe/layer_3/dropped_frac"] == 0.5


def two_micro_steps() -> dict[str, float]:
    """On every rank: loads that are even only when summed over both micro-steps and both ranks."""
    rank = torch.distributed.get_rank()
    stats = StepStats()
    stats.add(micro_step(1.0 + rank, [[8, 0]] if rank else [[4, 4]], [rank], [1.0]))
    stats.add(micro_step(3.0 + rank, [[0, 8]] if rank else [[4, 4]], [rank], [2.0]))
    return stats.reduce([0])


def test_a_step_is_the_mean_over_micro_steps_and_ranks(two_ranks: RankPool) -> None:
    for found in two_ranks.run(two_micro_steps):
        assert found["train/loss"] == pytest.approx((1 + 3 + 2 + 4) / 4)
        assert found["train/aux_loss"] == pytest.approx(1.5)
        assert found["moe/load_max_over_mean"] == 1.0
        assert found["moe/dropped_frac"] == pytest.approx(2 / 32)
