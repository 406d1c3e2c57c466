"""From the statistics of micro-steps to the metrics of a step."""

from __future__ import annotations

import math

import pytest
import torch

from model.gpt import Stats
from model.stats import StepStats, StepTotals, bias_metrics, load_metrics
from ranks import RankPool


def micro_step(loss: float, tokens: list[list[int]], dropped: list[int], aux: list[float]) -> Stats:
    return Stats(
        torch.tensor(loss),
        torch.tensor(8),
        aux_loss_M=torch.tensor(aux),
        z_loss_M=torch.tensor(aux) * 3,
        entropy_M=torch.tensor(aux) * 0.1,
        tokens_per_expert_ME=torch.tensor(tokens),
        dropped_M=torch.tensor(dropped),
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


def test_losses_and_entropy_of_a_model_are_the_means_of_its_layers() -> None:
    two_layers = torch.tensor([[2.0, 6.0], [4.0, 20.0], [2 * math.log(2), 0.0], [0.0, 0.0]])
    found = StepTotals(2.0, 4.0, *two_layers, torch.full((2, 2), 8.0)).metrics([1, 3])
    assert (found["train/aux_loss"], found["train/z_loss"]) == (2.0, 6.0)
    assert (found["moe/layer_1/aux_loss"], found["moe/layer_3/aux_loss"]) == (1.0, 3.0)
    assert found["moe/router_entropy"] == pytest.approx(0.5)
    assert found["moe/layer_1/router_entropy"] == pytest.approx(1.0)
    assert found["moe/layer_3/router_entropy"] == 0.0


def two_micro_steps() -> dict[str, float]:
    """On every rank: loads that are even only when summed over both micro-steps and both ranks."""
    rank = torch.distributed.get_rank()
    stats = StepStats(1, 2, "cpu")
    stats.add(micro_step(1.0 + rank, [[8, 0]] if rank else [[4, 4]], [rank], [1.0]))
    stats.add(micro_step(3.0 + rank, [[0, 8]] if rank else [[4, 4]], [rank], [2.0]))
    return stats.reduce().metrics([0])


def test_a_step_is_the_mean_over_micro_steps_and_ranks(two_ranks: RankPool) -> None:
    for found in two_ranks.run(two_micro_steps):
        assert found["train/loss"] == pytest.approx((1 + 3 + 2 + 4) / 4)
        assert found["train/aux_loss"] == found["moe/layer_0/aux_loss"] == pytest.approx(1.5)
        assert found["train/z_loss"] == found["moe/layer_0/z_loss"] == pytest.approx(4.5)
        assert found["moe/router_entropy"] == found["moe/layer_0/router_entropy"] == pytest.approx(0.15 / math.log(2))
        assert found["moe/load_max_over_mean"] == 1.0
        assert found["moe/dropped_frac"] == pytest.approx(2 / 32)


def test_a_dense_model_has_a_loss_and_no_routing(two_ranks: RankPool) -> None:
    for found in two_ranks.run(a_dense_micro_step):
        assert found == {"train/loss": pytest.approx(2.5)}


def a_dense_micro_step() -> dict[str, float]:
    stats = StepStats(0, 0, "cpu")
    empty = torch.zeros(0)
    loss = torch.tensor(2.0 + torch.distributed.get_rank())
    stats.add(Stats(loss, torch.tensor(8), empty, empty, empty, empty.view(0, 0), empty))
    return stats.reduce().metrics([])


def test_the_range_of_biases_by_layer() -> None:
    found = bias_metrics(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.25, -0.5]]), moe_layers=[1, 3])
    assert found == {"moe/bias_range": 0.75, "moe/layer_1/bias_range": 0.0, "moe/layer_3/bias_range": 0.75}
