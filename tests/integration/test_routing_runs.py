"""Routing in whole runs of two ranks: what moves the biases, what the run folder says, and what a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.run_config import REPO_ROOT
from launch.run_dir import EXIT_COMPLETED, EXIT_STOPPED
from model.checkpoint import read_tensors
from model.gpt import GPT, Stats
from model.loop import WARM_UP_STEPS
from ranks import RankPool, train_on_this_rank

TINY = REPO_ROOT / "ds_configs" / "moe_tiny.json"
RATE = 0.003
STEPS = 8
# Uneven from the first steps on, validated after every step, with two micro-steps on each of two ranks.
BIASED = [
    "run.model.moe.balance=bias",
    f"run.model.moe.bias_update_rate={RATE}",
    "run.model.moe.score_func=sigmoid",
    f"run.train.num_steps={STEPS}",
    "run.train.eval_every=1",
    "optimizer.params.lr=3e-2",
    "bf16.enabled=true",
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(two_ranks: RankPool, run_dir: Path, *settings: str) -> int:
    codes = two_ranks.run(train_on_this_rank, TINY, run_dir, list(settings))
    assert codes[0] == codes[1]
    return codes[0]


@pytest.fixture(scope="module")
def biased(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "biased"
    assert train(two_ranks, run_dir, *BIASED) == EXIT_COMPLETED
    return run_dir


def test_a_bias_moves_once_in_every_step_by_the_load_of_all_ranks_and_micro_steps(biased: Path) -> None:
    """And in no validation: one after every step changed nothing."""
    lines = lines_of(biased / "expert_load.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    bias_ME, farthest = torch.zeros(2, 4), 0.0
    for line in lines:
        load_ME = torch.tensor(line["tokens_per_expert"])
        assert load_ME.sum(1).tolist() == [8 * 32 * 2] * 2, "the routes of a whole step, not of a rank or a micro-step"
        bias_ME = bias_ME + RATE * torch.sign(load_ME.float().mean(1, keepdim=True) - load_ME)
        torch.testing.assert_close(torch.tensor(line["selection_bias"]), bias_ME)
        farthest = max(farthest, float(bias_ME.abs().max()))
    assert farthest > 2.5 * RATE, "some expert was above or below the mean for a while"


def test_the_metrics_of_routing_agree_with_the_load_of_every_expert(biased: Path) -> None:
    for line, load in zip(lines_of(biased / "metrics.jsonl")[1:], lines_of(biased / "expert_load.jsonl"), strict=True):
        assert line["step"] == load["step"]
        for layer, tokens in zip(load["layers"], load["tokens_per_expert"], strict=True):
            assert line[f"moe/layer_{layer}/load_max_over_mean"] == pytest.approx(max(tokens) * 4 / sum(tokens))
        bias_ME = torch.tensor(load["selection_bias"])
        assert line["moe/bias_range"] == pytest.approx(float((bias_ME.amax(1) - bias_ME.amin(1)).max()))
        assert 0 < line["moe/router_entropy"] < 1 + 1e-6
        assert line["train/z_loss"] > 0


def saved_bias(run_dir: Path, step: int, layer: int) -> torch.Tensor:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    tensors = {name: values for name, kind, values in read_tensors(folder) if kind == "buffer"}
    return tensors[f"blocks.{layer}.mlp.deepspeed_moe.gate.selection_bias"]


def test_a_bias_is_saved_in_fp32_in_a_bf16_run(biased: Path) -> None:
    last = lines_of(biased / "expert_load.jsonl")[-1]
    for layer, bias_E in zip(last["layers"], last["selection_bias"], strict=True):
        found = saved_bias(biased, STEPS, layer)
        assert found.dtype == torch.float32
        assert found.tolist() == bias_E
        assert found.bfloat16().tolist() != bias_E, "it would have been rounded"


def test_a_resumed_run_continues_with_the_bias_that_it_had(two_ranks: RankPool, biased: Path, tmp_path: Path) -> None:
    halves = tmp_path / "halves"
    assert train(two_ranks, halves, *BIASED, "run.train.stop_at_step=5") == EXIT_STOPPED
    assert train(two_ranks, halves, *BIASED) == EXIT_COMPLETED
    assert lines_of(halves / "expert_load.jsonl") == lines_of(biased / "expert_load.jsonl")
    for layer in (0, 1):
        assert torch.equal(saved_bias(halves, STEPS, layer), saved_bias(biased, STEPS, layer))
    ours, theirs = (lines_of(folder / "metrics.jsonl")[-1] for folder in (halves, biased))
    assert ours["val/loss"] == theirs["val/loss"]


def test_results_of_forced_balance_say_so_wherever_they_stand(two_ranks: RankPool, tmp_path: Path) -> None:
    num_steps = WARM_UP_STEPS + 1
    forced = ["run.model.moe.force_balanced=true", "run.train.eval_every=1", "run.train.profile_steps=1"]
    run_dir = tmp_path / "run"
    assert train(two_ranks, run_dir, *forced, f"run.train.num_steps={num_steps}") == EXIT_COMPLETED
    lines = lines_of(run_dir / "metrics.jsonl")
    assert [line["moe/force_balanced"] for line in lines] == [1.0] * (1 + num_steps)
    assert all(line["moe/load_max_over_mean"] == 1.0 for line in lines[1:])
    assert json.loads((run_dir / "summary.json").read_text())["moe/force_balanced"] == 1.0
    steps = [line for line in (run_dir / "log.txt").read_text().splitlines() if line.startswith("step ")]
    assert len(steps) == 1 + num_steps
    assert all("load forced" in line for line in steps)
    loads = lines_of(run_dir / "expert_load.jsonl")
    assert [line["moe/force_balanced"] for line in loads] == [1.0] * num_steps
    assert json.loads((run_dir / "profile" / "parts.json").read_text())["moe/force_balanced"] == 1.0
    table = (run_dir / "profile" / "table.md").read_text()
    assert table.startswith("Load forced (run.model.moe.force_balanced).\n")
    assert table in (run_dir / "log.txt").read_text()


def test_a_run_that_forces_nothing_says_nothing_of_it(biased: Path) -> None:
    for name in ("metrics.jsonl", "expert_load.jsonl", "log.txt"):
        assert "force" not in (biased / name).read_text()
    assert "moe/force_balanced" not in json.loads((biased / "summary.json").read_text())


def test_the_load_of_experts_is_written_at_its_own_interval(two_ranks: RankPool, tmp_path: Path) -> None:
    settings = ["run.train.num_steps=7", "run.train.log_every=100", "run.train.expert_load_every=3"]
    assert train(two_ranks, tmp_path / "run", *settings) == EXIT_COMPLETED
    lines = lines_of(tmp_path / "run" / "expert_load.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6]
    metrics = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 7], "which have an interval of their own"
    assert lines[0]["layers"] == [0, 1]
    assert lines[0]["tokens_per_expert"] == [[128] * 4] * 2, "a zero gate loads all experts alike"
    assert "selection_bias" not in lines[0]


def train_and_watch_earlier(run_dir: Path, settings: list[str]) -> tuple[int, list[Any]]:
    """A run, and of every training pass the load of earlier micro-steps that it was given, beside its own load."""
    seen: list[Any] = []
    forward = GPT.forward

    def watched(model: GPT, tokens_BS: Tensor, targets_BS: Tensor, *earlier: Tensor) -> tuple[Tensor, Stats]:
        loss, stats = forward(model, tokens_BS, targets_BS, *earlier)
        if model.training:
            seen.append(([each.tolist() for each in earlier], stats.tokens_per_expert_ME.tolist()))
        return loss, stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", watched)
        code = train_on_this_rank(TINY, run_dir, settings)
    return code, seen


def test_a_micro_step_is_told_the_load_of_the_earlier_ones_of_its_step_for_the_scope_of_the_global_batch(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    settings = ["run.model.moe.aux_loss_scope=global_batch", "run.train.num_steps=4"]
    for code, seen in two_ranks.run(train_and_watch_earlier, tmp_path / "run", settings):
        assert code == EXIT_COMPLETED
        assert len(seen) == 8, "two micro-steps in each of four steps"
        for (first, load), (second, _) in zip(seen[::2], seen[1::2], strict=True):
            assert first == [[[0] * 4] * 2]
            assert second == [load]
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_no_other_scope_is_told(two_ranks: RankPool, tmp_path: Path) -> None:
    for code, seen in two_ranks.run(train_and_watch_earlier, tmp_path / "run", ["run.train.num_steps=1"]):
        assert (code, [earlier for earlier, _ in seen]) == (EXIT_COMPLETED, [[], []])
